"""An answer is the same however many tokens come at once."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from glm_jax.engine.request import FinishReason, TokenEvent
from serving.answer import Answer, Part, Reading, Sampled, Usage
from serving.bridge import News, Stream, TokenRun
from serving.detokenizer import Detokenizer, StopStrings
from serving.metrics import Metrics
from serving.parsers import ChatParser, Delta, Parser, TextParser, ToolCall, join
from serving.tokenizer import Tag
from serving.tools import Tools
from tests.serving.scripted import TOKENIZER

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = Tools([{"type": "function", "function": {"name": "weather", "parameters": CITY}}])
PARSERS: dict[str, Callable[[], Parser]] = {
    "raw": TextParser,
    "chat": lambda: ChatParser(None, starts_in_reasoning=True),
    "tools": lambda: ChatParser(TOOLS, starts_in_reasoning=True),
    "one call": lambda: ChatParser(TOOLS, starts_in_reasoning=False, max_calls=1),
}
SILENT = TOKENIZER.control_tokens["<|user|>"]
TAGS = [TOKENIZER.control_tokens[tag] for tag in Tag]
# Of single bytes, so that characters are spread over tokens, and some are broken.
BYTES = [TOKENIZER.encode(text)[0] for text in "ab \n\"'"] + TOKENIZER.encode("é😀")
CALL = TOKENIZER.encode("<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value>")
TOKENS = st.lists(
    st.one_of(
        *(st.sampled_from(some).map(lambda token: [token]) for some in ([SILENT, *TAGS], BYTES)),
        st.just(CALL),
        st.just(BYTES),
    ),
    min_size=1,
    max_size=12,
).map(lambda lists: [token for some in lists for token in some])


class OneByOne(Reading):
    """Reads every token by itself."""

    reads_runs = False  # type: ignore[assignment]


def read(steps: Sequence[Sequence[News]], reading: Reading) -> tuple[Any, ...]:
    """All that an answer tells when the news of each step come together."""
    stream = Stream("a", lambda stream: None)
    usage = Usage(prompt_tokens=3)
    answer = Answer(
        stream, reading, usage, endpoint="/", arrived=0.0, metrics=Metrics(lambda: None)
    )

    async def parts() -> list[Part]:
        told: list[Part] = []
        with answer:
            iterator = answer.parts()
            for news in steps:
                for item in news:
                    if isinstance(item, TokenRun):
                        stream.push_run(item)
                    else:
                        stream.push(item)
                told.append((await anext(iterator))[1])
                if told[-1].finish is not None:
                    break
        return told

    told = asyncio.run(parts())
    deltas: list[Delta] = join(delta for part in told for delta in part.deltas)
    deltas = [replace(d, id="") if isinstance(d, ToolCall) else d for d in deltas]
    tokens: list[Sampled] = [token for part in told for token in part.tokens]
    return deltas, tokens, answer.finish, usage, round(answer.logprob, 6)


def in_columns(step: list[TokenEvent], *, is_first: bool) -> list[News]:
    """The same, but what is neither the first token nor the last one comes as a run."""
    middle = [event for event in step[is_first:] if event.finish_reason is None]
    rest: list[News] = [*step[is_first + len(middle) :]]
    if middle:
        tokens = [event.token for event in middle if event.token is not None]
        rest.insert(0, TokenRun(tokens, [event.logprob for event in middle]))
    return [*step[:is_first], *rest]


@given(
    TOKENS,
    st.data(),
    st.sampled_from(sorted(PARSERS)),
    st.sampled_from([(), ("a ",), ("b", "</think>")]),
    st.booleans(),
    st.sampled_from(["stop", "length"]),
)
def test_how_many_tokens_come_at_once_changes_nothing(tokens, data, parser, stops, keeps, ended):
    def reading(kind: type[Reading]) -> Reading:
        return kind(
            detokenizer=Detokenizer(TOKENIZER),
            stops=StopStrings(stops),
            parser=PARSERS[parser](),
            includes_stop=False,
            keeps_tokens=keeps,
        )

    reasons: list[FinishReason | None] = [*(None for _ in tokens[1:]), ended]
    events = [
        TokenEvent("a", token, -0.25 * index, reason, num_cached_tokens=2)
        for index, (token, reason) in enumerate(zip(tokens, reasons, strict=True))
    ]
    one_by_one = read([[event] for event in events], reading(OneByOne))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(events)), max_size=4)) | {len(events)})
    steps = [events[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
    assert read(steps, reading(Reading)) == one_by_one
    in_runs = [in_columns(step, is_first=step is steps[0]) for step in steps]
    assert read(in_runs, reading(Reading)) == one_by_one
    assert one_by_one[2] is not None
