"""The benchmark's arithmetic: events, prompts, the times of requests, and what is made of them."""

import asyncio
import itertools
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from serving.bench import prompts
from serving.bench.__main__ import main
from serving.bench.client import Sample
from serving.bench.events import EventDecoder
from serving.bench.load import Load, Run, Runner
from serving.bench.observed import differences, observed, parse_counters
from serving.bench.summary import summarize
from tests.serving.model_dir import write_model_dir

STREAM = (
    b': hello\n\ndata: {"a": 1}\n\nevent: x\ndata: one\ndata: two\n\nid: 7\n\ndata:bare\n\n'
    b"data: [DONE]\n\ndata: never ended"
)
EVENTS = [b'{"a": 1}', b"one\ntwo", b"bare", b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_are_the_same_however_the_stream_is_cut(size, newline):
    stream = STREAM.replace(b"\n", newline)
    decoder = EventDecoder()
    found = [
        event
        for start in range(0, len(stream), size)
        for event in decoder.feed(stream[start : start + size])
    ]
    assert found == EVENTS
    assert decoder.rest == b"data: never ended"


def sample(sent_at: float, pieces: list[float], tokens: int, **fields) -> Sample:
    last = pieces[-1] if pieces else 0.0
    return Sample(
        sent_at=sent_at,
        piece_times=pieces,
        last_at=last,
        ended_at=fields.pop("ended_at", last),
        prompt_tokens=10,
        completion_tokens=tokens,
        **fields,
    )


def run_of(*samples: Sample) -> Run:
    return Run(
        Load(duration=4, concurrency=2),
        samples=list(samples),
        started_at=100.0,
        ended_at=104.0,
        cpu_seconds=0.4,
        lags=[0.001, 0.003],
    )


def test_latencies_and_throughputs_are_as_defined():
    run = run_of(
        sample(100.0, [100.1, 100.2, 100.5], 5),  # an event can hold several tokens
        sample(100.0, [100.3, 101.3], 3),
        sample(101.5, [101.7], 1),  # one token has no time per further token
        sample(102.0, [102.1], 7, error="disconnected", detail="gone", ended_at=104.0),
    )
    got = summarize(run, {})
    assert (got["requests"], got["completed"]) == (4, 3)
    assert got["errors"] == {"disconnected": 1}
    assert got["error_examples"] == {"disconnected": "gone"}
    assert (got["input_tokens"], got["output_tokens"]) == (30, 9)
    assert got["request_throughput"] == pytest.approx(3 / 4)
    assert got["output_throughput"] == pytest.approx(9 / 4)
    assert got["total_throughput"] == pytest.approx(39 / 4)
    assert got["ttft_ms"]["mean"] == pytest.approx(1e3 * (0.1 + 0.3 + 0.2) / 3)
    assert got["ttft_ms"]["median"] == pytest.approx(200)
    assert got["tpot_ms"]["count"] == 2
    assert got["tpot_ms"]["mean"] == pytest.approx(1e3 * (0.4 / 4 + 1.0 / 2) / 2)
    assert got["itl_ms"]["count"] == 3
    assert got["itl_ms"]["max"] == pytest.approx(1000)
    assert got["e2e_ms"]["max"] == pytest.approx(1300)
    assert got["itl_ms"]["p90"] == pytest.approx(np.percentile([100, 300, 1000], 90))
    # In the first second: all five tokens of one answer, and half of three of the other.
    assert got["peak_output_throughput"] == pytest.approx(5 + 1.5)
    assert got["peak_concurrency"] == 2
    assert got["client"]["cpu_fraction"] == pytest.approx(0.1)
    assert got["goodput"] is None
    json.dumps(got)


def test_goodput_counts_the_answers_that_meet_every_slo():
    run = run_of(
        sample(100.0, [100.1, 100.2], 2),
        sample(100.0, [100.1, 101.0], 2),  # too slow a token
        sample(100.0, [100.6, 100.7], 2),  # too late a first one
        sample(100.0, [100.1], 2, error="stalled"),
    )
    got = summarize(run, {"ttft": 500, "tpot": 150})
    assert got["goodput"] == pytest.approx(1 / 4)


def test_a_run_in_which_nothing_was_answered_is_still_a_report():
    got = summarize(run_of(sample(100.0, [], 0, error="http 503")), {"ttft": 1})
    assert got["completed"] == got["output_throughput"] == got["goodput"] == 0
    assert got["ttft_ms"] == {"count": 0}
    assert summarize(run_of(), {})["peak_concurrency"] == 0


class FakeServer:
    """Answers each request after some seconds, or with these errors in turn."""

    def __init__(self, seconds: float = 0.01, errors: tuple[str | None, ...] = (None,)) -> None:
        self._seconds = seconds
        self._errors = itertools.cycle(errors)
        self.starts: list[float] = []
        self.running = self.most = 0
        self.is_there = True

    async def ask(self, fields) -> Sample:
        now = time.perf_counter()
        self.starts.append(now)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self._seconds)
        self.running -= 1
        done = time.perf_counter()
        return Sample(
            sent_at=now, piece_times=[done], last_at=done, ended_at=done, error=next(self._errors)
        )

    async def is_alive(self) -> bool:
        return self.is_there

    def runner(self, **load) -> Runner:
        return Runner(Load(**load), self.ask, self.is_alive, itertools.repeat({}))


async def test_a_closed_loop_keeps_so_many_requests_under_way_for_so_long():
    server = FakeServer()
    run = await server.runner(duration=0.3, concurrency=5).carry_out()
    assert server.most == 5
    assert all(s.sent_at < run.started_at + 0.31 for s in run.samples)
    assert len(run.samples) > 20
    assert run.ended_at == max(s.ended_at for s in run.samples)
    assert run.num_running == 0


async def test_a_number_of_requests_can_end_a_run():
    server = FakeServer()
    run = await server.runner(duration=60, concurrency=4, num_requests=10).carry_out()
    assert len(run.samples) == 10


async def test_workers_start_spread_over_the_ramp():
    server = FakeServer(seconds=0.5)
    run = await server.runner(duration=0.3, concurrency=4, ramp=0.2).carry_out()
    gaps = np.diff([s - run.started_at for s in server.starts])
    assert len(gaps) == 3
    assert all(0.04 < gap < 0.15 for gap in gaps)


async def test_requests_come_at_the_rate_however_long_the_answers_take():
    server = FakeServer(seconds=0.4)
    await server.runner(duration=1, concurrency=None, rate=200, burstiness=50).carry_out()
    assert 170 < len(server.starts) < 230
    assert server.most > 50


async def test_a_limit_holds_requests_back_and_says_for_how_long():
    server = FakeServer(seconds=0.1)
    run = await server.runner(duration=0.3, concurrency=2, rate=100, burstiness=100).carry_out()
    assert server.most == 2
    assert len(run.samples) > 25
    assert max(s.held_seconds for s in run.samples) > 0.3
    # Held back by the client: no part of the latency.
    assert max(s.piece_times[0] - s.sent_at for s in run.samples) < 0.3


@pytest.mark.parametrize(
    ("burstiness", "low", "high"), [(0.2, 1.4, 4), (1, 0.7, 1.4), (100, 0, 0.4)]
)
def test_gaps_vary_as_the_burstiness_says(burstiness, low, high):
    load = Load(duration=20, concurrency=None, rate=100, burstiness=burstiness)
    arrivals = list(load.arrivals())
    gaps = np.diff(arrivals)
    assert low < gaps.std() / gaps.mean() < high
    assert 1500 < len(arrivals) < 2500 and arrivals[-1] <= 20
    assert arrivals == list(load.arrivals()) != list(replace(load, seed=1).arrivals())


async def test_requests_are_sent_when_they_are_due():
    server = FakeServer(seconds=0)
    runner = server.runner(duration=1, concurrency=None, rate=20, burstiness=1)
    await runner.carry_out()
    due = list(runner.run.load.arrivals())[: len(server.starts)]
    late = np.array(server.starts) - runner.run.started_at - due
    assert len(late) > 5 and min(late) >= 0 and np.median(late) < 0.1


def test_a_rate_grows_linearly_or_exponentially():
    load = Load(duration=10, rate=16.0, ramp=4.0, ramp_rate=1.0)
    assert [load.rate_at(t) for t in (0, 2, 4, 9)] == [1.0, 8.5, 16.0, 16.0]
    load = Load(duration=10, rate=16.0, ramp=4.0, ramp_rate=1.0, is_ramp_exponential=True)
    assert [load.rate_at(t) for t in (0, 2, 4, 9)] == pytest.approx([1.0, 4.0, 16.0, 16.0])


async def test_a_server_that_only_fails_is_given_up():
    server = FakeServer(seconds=0, errors=("http 500",))
    run = await server.runner(duration=60, concurrency=8).carry_out()
    assert run.given_up is not None and "http 500" in run.given_up
    assert len(run.samples) < 100


async def test_a_server_that_fails_now_and_then_is_not_given_up():
    server = FakeServer(seconds=0.002, errors=("http 503", None))
    run = await server.runner(duration=0.5, concurrency=4).carry_out()
    assert run.given_up is None
    assert {s.error for s in run.samples} == {None, "http 503"}


async def test_a_server_that_is_gone_is_given_up_at_once():
    server = FakeServer(errors=(None, None, None, "refused"))
    server.is_there = False
    run = await server.runner(duration=60, concurrency=1).carry_out()
    assert run.given_up is not None and "no connections" in run.given_up
    assert len(run.samples) == 4


async def test_the_warm_up_is_sent_and_not_counted():
    server = FakeServer()
    runner = server.runner(duration=0.05, concurrency=2, warm_up=5)
    await runner.warm_up()
    assert len(server.starts) == 5
    run = await runner.carry_out()
    assert len(run.samples) == len(server.starts) - 5


async def test_a_warm_up_that_fails_ends_the_run_before_it_begins():
    runner = FakeServer(errors=("http 401",)).runner(duration=60, concurrency=2, warm_up=2)
    await runner.warm_up()
    run = await runner.carry_out()
    assert run.given_up is not None and "http 401" in run.given_up
    assert run.samples == []


SHAPE = prompts.Shape(prompt_len=20, output_len=8)


def take(number: int, **fields):
    vocabulary = fields.pop("vocabulary", prompts.Vocabulary(None))
    made = prompts.random_prompts(vocabulary=vocabulary, is_chat=False, **fields)
    return list(itertools.islice(made, number))


def test_random_prompts_have_their_lengths_and_come_again_with_the_seed():
    first = take(5, shape=SHAPE, seed=(1, 2))
    assert first == take(5, shape=SHAPE, seed=(1, 2))
    assert first != take(5, shape=SHAPE, seed=(1, 3))
    assert all(len(f["prompt"]) == 20 and f["max_tokens"] == 8 for f in first)
    assert len({tuple(f["prompt"]) for f in first}) == 5


def test_lengths_spread_by_the_ratio():
    shape = prompts.Shape(prompt_len=20, output_len=8, range_ratio=0.5)
    lengths = [len(f["prompt"]) for f in take(300, shape=shape, seed=(0,))]
    assert (min(lengths), max(lengths)) == (10, 30)


def test_shared_prefixes_are_shared_by_as_many_groups_as_asked():
    shape = prompts.Shape(prompt_len=20, output_len=8, prefix_len=15, num_prefixes=3)
    found = [f["prompt"] for f in take(50, shape=shape, seed=(0,))]
    assert len({tuple(p[:15]) for p in found}) == 3
    assert len({tuple(p) for p in found}) == 50
    assert {len(p) for p in found} == {20}
    with pytest.raises(ValueError, match="leaves no token"):
        prompts.Shape(prompt_len=20, output_len=8, prefix_len=20)


def test_with_a_tokenizer_prompts_are_of_its_text_tokens(tmp_path):
    vocabulary = prompts.Vocabulary(write_model_dir(tmp_path))
    drawn = {token for f in take(200, shape=SHAPE, seed=(0,), vocabulary=vocabulary) for token in f["prompt"]}  # fmt: skip
    assert drawn == set(range(261))  # bytes and merges, and no control token
    chat = prompts.random_prompts(SHAPE, vocabulary, seed=(0,), is_chat=True)
    assert next(chat)["messages"][0]["role"] == "user"


def test_prompts_of_a_file_are_asked_in_turn(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": [1, 2], "max_tokens": 3}\n')
    found = prompts.read_prompts(path, 50)
    assert found == [{"prompt": "a", "max_tokens": 50}, {"prompt": [1, 2], "max_tokens": 3}]
    asked = list(itertools.islice(prompts.cycled(found, 1), 3))
    assert [f["prompt"] for f in asked] == [[1, 2], "a", [1, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompt"),
        ("{", "line 1"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2: needs either"),
        ('{"prompt": "a"}\n{"messages": []}', "mixes"),
    ],
)
def test_a_file_that_is_none_of_prompts_is_refused(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        prompts.read_prompts(path, 5)


METRICS = """
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0"} 100
vllm:generation_tokens_total{engine="1"} 50
# TYPE glm_generation_tokens counter
glm_generation_tokens_total 7
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total 10
vllm:spec_decode_num_draft_tokens_total 20
vllm:spec_decode_num_accepted_tokens_total 15
vllm:prefix_cache_queries_total 40
vllm:prefix_cache_hits_total 30
vllm:time_to_first_token_seconds_sum 2.0
vllm:time_to_first_token_seconds_count 4
"""


def test_the_servers_counters_are_read_under_the_usual_names():
    counters = parse_counters(METRICS)
    assert counters is not None
    assert counters["generation_tokens_total"] == 150  # of one prefix, over all labels
    got = observed({"generation_tokens_total": 30.0}, counters)
    assert got is not None
    assert got["output_tokens"] == 120
    assert got["ttft_mean_ms"] == pytest.approx(500)
    assert got["acceptance"] == {
        "drafted_tokens": 20, "accepted_tokens": 15, "rate": 0.75, "length": 2.5
    }  # fmt: skip
    assert got["prefix_hits"] == {"tokens": 30, "rate": 0.75}
    assert parse_counters("python_info 1\n") is None
    assert observed(None, counters) is None


def test_counts_that_disagree_with_the_servers_are_told():
    summary: dict[str, Any] = {"requests": 1, "completed": 1, "input_tokens": 5, "output_tokens": 8}
    summary["server"] = {"input_tokens": 5, "output_tokens": 9}
    assert list(differences(summary)) == ["output_tokens: the client received 8, the server counts 9"]  # fmt: skip
    assert not list(differences({**summary, "requests": 2}))
    assert not list(differences({**summary, "server": None}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrency", "1,x"], "not INTEGERS"),
        (["--concurrency", "0"], "not positive"),
        (["--goodput", "speed:5"], "none of ttft"),
        (["--goodput", "ttft:fast"], "no number"),
        (["--dataset", "file"], "--file"),
        (["--extra-body", "[]"], "JSON object"),
        (["--endpoint", "chat"], "--tokenizer"),
        (["--tokenizer", "."], "does not exist"),
        (["--dataset", "shared-prefix", "--prefix-len", "128"], "leaves no token"),
    ],
)
def test_a_wrong_command_line_is_told_as_such(flags, message):
    done = CliRunner().invoke(main, flags)
    assert done.exit_code == 2
    assert message in done.output


def test_no_server_is_exit_code_three():
    done = CliRunner().invoke(main, ["--url", "http://127.0.0.1:9"])
    assert done.exit_code == 3
    assert "no server at" in done.output
