"""The bundled model from its directory to text, in process, on one device and on eight."""

import threading
from pathlib import Path

import jax
import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.runner import Runner
from serving.bridge import CannotStartError
from serving.model_engine import build_engine, step_options
from serving.server import Address
from serving.tokenizer import ModelTokenizer
from serving.wiring import Options

NANO = Path(__file__).parents[2] / "checkpoints" / "nano"
PROMPTS = [
    "What is the capital of France?",
    "What is the capital of Norway?",
    "Is Lima in Peru?",
    "What is 7 + 5?",
    "What is 12 - 9?",
    "What is 6 x 7?",
    "Hello!",
    "Good morning, how are you?",
    "Thank you very much.",
    "Count from 3 to 8.",
    "List three colors.",
    "Name a river in Egypt.",
    "What is the weather in Oslo?",
    "Which continent is Kenya in?",
    "Say hello in upper case.",
    "Tell me a joke.",
    "Who are you?",
    "Write {\"city\": \"Rome\"} as a sentence.",
    "zzz qqq 0xff \u00e9\u4e2d",
    "a",
]  # fmt: skip


def options(**changes) -> Options:
    fields = {
        "model_dir": NANO,
        "engine": None,
        "address": Address(host="127.0.0.1", port=1),
        "max_concurrency": 20,
        "max_batch_tokens": 64,
        "max_seq_len": 256,
        "max_new_tokens": 128,
        "max_prompt_tokens": 128,
        "num_gpus": 1,
        "queue_size": 8,
        "load_format": "auto",
        "served_model_names": (),
    }
    return Options(**(fields | changes))


def answers(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """The tokens of each request, all of them running together."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}

    def deliver(events) -> None:
        for event in events:
            assert event.error is None, event.error
            tokens[event.request_id].append(event.token)

    for request in requests:
        engine.submit(request)
    engine.stop()  # what is accepted is finished first
    thread = threading.Thread(target=engine.run, args=(deliver,))
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert engine.stats().num_pages_used == 0
    return tokens


@pytest.mark.slow
def test_eight_devices_and_one_say_the_same_to_twenty_prompts() -> None:
    tokenizer = ModelTokenizer.from_directory(NANO)
    requests = [
        Request(
            id=str(index),
            prompt=tuple(tokenizer.encode(f"[gMASK]<sop><|user|>{text}<|assistant|><think>")),
            sampling=SamplingParams(max_new_tokens=48, temperature=0.0),
        )
        for index, text in enumerate(PROMPTS)
    ]
    one, eight = (
        answers(build_engine(options(num_gpus=devices), tokenizer), requests) for devices in (1, 8)
    )
    assert eight == one
    assert all(len(tokens) == 48 for tokens in one.values())
    # A small model may answer two questions alike; answers that ignored their prompts would be few.
    assert len({tuple(tokens) for tokens in one.values()}) >= 15


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_seq_len": 8192}, "lower --max-seq-len"),
        ({"num_gpus": 3}, "3 devices cannot share"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_in_words(changes: dict, words: str) -> None:
    with pytest.raises(CannotStartError, match=words):
        build_engine(options(**changes), ModelTokenizer.from_directory(NANO))


def test_random_weights_of_any_config_answer() -> None:
    tokenizer = ModelTokenizer.from_directory(NANO)
    engine = build_engine(options(load_format="dummy"), tokenizer)
    sampling = SamplingParams(max_new_tokens=5, temperature=0.0)
    requests = [Request(id=str(n), prompt=(n + 1,), sampling=sampling) for n in range(3)]
    assert [len(tokens) for tokens in answers(engine, requests).values()] == [5, 5, 5]


def test_plain_sums_are_said_to_the_steps() -> None:
    assert step_options(options()).kernels.fused_all_reduce
    assert not step_options(options(plain_sums=True)).kernels.fused_all_reduce


@pytest.mark.parametrize("is_memory", [True, False])
def test_a_host_whose_devices_do_not_reach_each_other_is_told_what_helps(
    monkeypatch: pytest.MonkeyPatch, is_memory: bool
) -> None:
    said = "NCCL operation ncclGetPeerDevicePointer(…) failed" if is_memory else "out of memory"

    def fail(_: Runner) -> None:
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(Runner, "warm_up", fail)
    expected = CannotStartError if is_memory else jax.errors.JaxRuntimeError
    with pytest.raises(expected, match="--plain-sums" if is_memory else "out of memory"):
        build_engine(options(), ModelTokenizer.from_directory(NANO))
