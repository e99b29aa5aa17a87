"""The answers of OpenAI's completions and chat completions: whole ones, and streams of events.

Knows neither requests nor the engine.

A stream repeats the same bytes around every piece of text, so they are made once per answer, and
per delta only the text is encoded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from serving.answer import Finish, Part, Sampled, Usage
from serving.errors import ApiError
from serving.formats import Format, calls_of, content_of, dumps, event, reasoning_of
from serving.parsers import Arguments, Content, Delta, Reasoning, ToolCall
from serving.reply import Choice

DONE = b"data: [DONE]\n\n"

Spell = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Head:
    """What all objects of one answer begin with.

    Attributes:
      id: of the answer.
      created: seconds since 1970.
      model: the name the client knows it by.
    """

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a client wants to be told beside the answer.

    Attributes:
      usage: the usage, at the end of a stream; every event then has the field.
      continuous_usage: with it, the usage so far in every event.
      logprobs: log-probabilities, with so many alternatives a token; None: none at all.
      prompt_logprobs: the same of the prompt.
    """

    usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class OpenAIFormat(Format):
    """What both endpoints share.

    Args:
      head: the beginning of every object.
      wanted: what is told.
      spell: a token as it is written.
      num_choices: of the reply.
    """

    _chunk_kind: str
    _kind: str
    _delta_field: str  # what stands between a choice's index and its piece of the answer

    def __init__(self, head: Head, wanted: Wanted, spell: Spell, num_choices: int = 1) -> None:
        self._head = head
        self._wanted = wanted
        self._spell = spell
        fields = dumps(head.fields(self._chunk_kind))[:-1]
        self._opens = [
            f'data: {fields},"choices":[{{"index":{index},{self._delta_field}'
            for index in range(num_choices)
        ]
        self._close = self._closing("null", "null", None)

    @abstractmethod
    def _piece(self, delta: Delta) -> str:
        """JSON of a delta, from `_delta_field` on."""

    @abstractmethod
    def _nothing(self) -> str:
        """JSON of no delta, for events with a finish reason or log-probabilities alone."""

    @abstractmethod
    def _logprobs(self, index: int, tokens: Sequence[Sampled]) -> dict[str, Any]:
        """The object of log-probabilities of a piece of this answer."""

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]:
        """The fields of a whole choice that are this endpoint's own."""

    def part_events(self, index: int, part: Part, usage: Usage) -> bytes:
        close, opening = self._close, self._opens[index]
        is_plain = not (part.tokens or part.finish or self._wanted.continuous_usage)
        if is_plain and len(part.deltas) == 1:  # as nearly always
            return f"{opening}{self._piece(part.deltas[0])}{close}".encode("ascii")
        so_far = usage_fields(usage) if self._wanted.continuous_usage else None
        if so_far:
            close = self._closing("null", "null", so_far)
        events = [f"{opening}{self._piece(delta)}{close}" for delta in part.deltas]
        if part.tokens:
            told = self._closing(dumps(self._logprobs(index, part.tokens)), "null", so_far)
            if events:
                events[-1] = f"{opening}{self._piece(part.deltas[-1])}{told}"
            else:
                events.append(f"{opening}{self._nothing()}{told}")
        if part.finish is not None:
            close = self._closing("null", _finish_json(part.finish), so_far)
            events.append(f"{opening}{self._nothing()}{close}")
        return "".join(events).encode("ascii")

    def last_events(self, usage: Usage) -> bytes:
        if not self._wanted.usage:
            return DONE
        fields = self._head.fields(self._chunk_kind)
        return event({**fields, "choices": [], "usage": usage_fields(usage)}) + DONE

    def error_events(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        return {
            **self._head.fields(self._kind),
            "choices": [self._whole_choice(*entry) for entry in enumerate(choices)],
            "usage": usage_fields(usage),
        }

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        has_logprobs = self._wanted.logprobs is not None
        return {
            "index": index,
            **self._choice(choice),
            "logprobs": self._logprobs(index, choice.tokens) if has_logprobs else None,
            "finish_reason": choice.finish.reason,
            "stop_reason": choice.finish.stop,
        }

    def _prompt_logprobs(self, choice: Choice) -> list[dict[str, Any] | None]:
        """vLLM's form: by token id, the prompt's own token in each place and the likeliest ones."""

        def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
            text = token_text(self._spell(token))
            return {"logprob": logprob, "rank": rank, "decoded_token": text}

        told: list[dict[str, Any] | None] = [None]
        for own in choice.prompt:
            top = own.top[: self._wanted.prompt_logprobs]
            entries = {
                str(token): entry(token, logprob, rank)
                for rank, (token, logprob) in enumerate(top, start=1)
            }
            told.append({str(own.token): entry(own.token, own.logprob, own.rank)} | entries)
        return told

    def _closing(self, logprobs: str, finish: str, usage: dict[str, Any] | None) -> str:
        told = f',"usage":{dumps(usage)}' if self._wanted.usage else ""
        return f',"logprobs":{logprobs},"finish_reason":{finish}}}]{told}}}\n\n'


class CompletionFormat(OpenAIFormat):
    """/v1/completions. `echoes` are the prompts that the answers begin with, if they do."""

    _kind = _chunk_kind = "text_completion"
    _delta_field = '"text":'

    def __init__(
        self, head: Head, wanted: Wanted, spell: Spell, num_choices: int, echoes: Sequence[str]
    ) -> None:
        super().__init__(head, wanted, spell, num_choices)
        self._echoes = echoes
        self._offsets = [0] * num_choices  # of tokens; an echo's are among them

    def first_events(self, usage: Usage) -> bytes:
        return "".join(
            f"{opening}{encode_basestring_ascii(echo)}{self._close}"
            for opening, echo in zip(self._opens, self._echoes, strict=False)
            if echo
        ).encode("ascii")

    def _piece(self, delta: Delta) -> str:
        assert isinstance(delta, Content), delta
        return encode_basestring_ascii(delta.text)

    def _nothing(self) -> str:
        return '""'

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        fields = super()._whole_choice(index, choice)
        if self._echoes:
            fields["text"] = self._echoes[index] + fields["text"]
        if self._wanted.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._prompt_logprobs(choice)
        return fields

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {"text": content_of(choice.deltas)}

    def _logprobs(self, index: int, tokens: Sequence[Sampled]) -> dict[str, Any]:
        texts = [token_text(self._spell(sampled.token)) for sampled in tokens]
        offsets = []
        for sampled in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._spell(sampled.token).decode("utf-8", "ignore"))
        return {
            "tokens": texts,
            "token_logprobs": [sampled.logprob for sampled in tokens],
            "top_logprobs": [
                {
                    token_text(self._spell(token)): logprob
                    for token, logprob in sampled.top[: self._wanted.logprobs]
                }
                if self._wanted.logprobs and sampled.logprob is not None
                else None
                for sampled in tokens
            ],
            "text_offset": offsets,
        }


class ChatFormat(OpenAIFormat):
    """/v1/chat/completions. Reasoning goes by both of its names."""

    _kind = "chat.completion"
    _chunk_kind = "chat.completion.chunk"
    _delta_field = '"delta":'

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        fields = super().whole(choices, usage)
        if self._wanted.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._prompt_logprobs(choices[0])
        return fields

    def first_events(self, usage: Usage) -> bytes:
        piece = '{"role":"assistant","content":""}'
        return "".join(f"{opening}{piece}{self._close}" for opening in self._opens).encode("ascii")

    def _piece(self, delta: Delta) -> str:
        match delta:
            case Content(text):
                return f'{{"content":{encode_basestring_ascii(text)}}}'
            case Reasoning(text):
                json_text = encode_basestring_ascii(text)
                return f'{{"reasoning_content":{json_text},"reasoning":{json_text}}}'
            case ToolCall(index, id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": id, "type": "function", "function": function}
                return dumps({"tool_calls": [call]})
            case Arguments(index, text):
                call = {"index": index, "function": {"arguments": text}}
                return dumps({"tool_calls": [call]})

    def _nothing(self) -> str:
        return "{}"

    def _choice(self, choice: Choice) -> dict[str, Any]:
        content, reasoning = content_of(choice.deltas), reasoning_of(choice.deltas)
        calls = [_whole_call(*call) for call in calls_of(choice.deltas)]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if calls else ""),
            "refusal": None,
            "reasoning_content": reasoning or None,
            "reasoning": reasoning or None,
        }
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _logprobs(self, index: int, tokens: Sequence[Sampled]) -> dict[str, Any]:
        return {"content": chat_logprobs(self._spell, tokens), "refusal": None}


def chat_logprobs(spell: Spell, tokens: Sequence[Sampled]) -> list[dict[str, Any]]:
    """OpenAI's objects for tokens and their alternatives."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        spelled = spell(token)
        return {"token": token_text(spelled), "logprob": logprob, "bytes": list(spelled)}

    return [
        {
            **entry(sampled.token, sampled.logprob),
            "top_logprobs": [entry(*other) for other in sampled.top],
        }
        for sampled in tokens
    ]


def _whole_call(call: ToolCall, arguments: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _finish_json(finish: Finish) -> str:
    return f'"{finish.reason}","stop_reason":{dumps(finish.stop)}'


def token_text(spelled: bytes) -> str:
    """A token's bytes as text; `bytes:\\xe2\\x98` where they are only a part of a character."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def usage_fields(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def model_object(name: str, created: int, max_seq_len: int) -> dict[str, Any]:
    """OpenAI's model object, with the context length that vLLM's clients look for."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "glm-jax",
        "max_model_len": max_seq_len,
    }
