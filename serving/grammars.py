"""Grammars that answers are held to: rules and required tools, compiled with llguidance.

Knows no HTTP. The engine's thread asks a constraint which tokens may come next while the device runs
the rest of the batch; a grammar begins to hold where the reasoning ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from serving import errors
from serving.output_rules import MAX_RULE_LENGTH, Rule
from serving.protocol import ChatRequest, GenerationRequest
from serving.tokenizer import ModelTokenizer, Tag
from serving.tools import Tools

_NUM_CACHED = 256
# Between the parts of JSON: a space, or a new line and its indentation. A small model that may say
# any white space at times says nothing else until its tokens run out.
_SPACING = {"x-guidance": {"whitespace_pattern": r"[ ]?|\n[ \t]{0,20}"}}

# What the compiler's words begin with, and the lines of the grammar that it shows after them.
_PLACE = re.compile(r"^at \d+\(\d+\): ")
_EXCERPT = re.compile(r"^ +\d+ \|.*", re.MULTILINE | re.DOTALL)


class _Masks(NamedTuple):
    """Masks that need no grammar.

    Attributes:
      reasoning: the reasoning goes on or ends; the answer does not end with it.
      end_think: the reasoning ends.
      stop: the answer ends.
    """

    reasoning: NDArray[np.int32]
    end_think: NDArray[np.int32]
    stop: NDArray[np.int32]


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
      tokenizer: the model's.
      stop_tokens: the tokens that end an answer, allowed where the grammar is complete.
    """

    def __init__(self, tokenizer: ModelTokenizer, stop_tokens: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_tokens = sorted(stop_tokens)
        self._vocabulary = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, self._stop_tokens[0])),
            n_vocab=tokenizer.size,
            eos_token=self._stop_tokens,
        )
        self._checked = lru_cache(_NUM_CACHED)(self._check)
        control = set(tokenizer.control_tokens.values())
        end_think = tokenizer.control_tokens[Tag.END_THINK]
        self._end_think = end_think
        self._masks = _Masks(
            reasoning=self._mask(set(range(tokenizer.size)) - control | {end_think}),
            end_think=self._mask([end_think]),
            stop=self._mask(self._stop_tokens),
        )

    def of(self, body: GenerationRequest, tools: Tools | None) -> str | None:
        """The grammar that a request asks for; None when it asks for none.

        Args:
          tools: those that it offers.

        Raises:
          ApiError: 400, it asks for forms that exclude each other, or for none that there is.
        """
        is_chat = isinstance(body, ChatRequest)
        return self.grammar(
            body.rule,
            tools,
            required=body.required_tools if is_chat else (),
            is_strict=is_chat and body.has_strict_tools,
            has_one_call=is_chat and body.parallel_tool_calls is False,
        )

    def grammar(
        self,
        rule: Rule | None,
        tools: Tools | None,
        *,
        required: Sequence[str],
        is_strict: bool = False,
        has_one_call: bool,
    ) -> str | None:
        """The grammar of an answer after its reasoning; None when it is free.

        Args:
          rule: the form of its text.
          tools: what it may call; calls then stand beside the text that the rule asks for.
          required: tools of which it must call some; they then stand in place of any text.
          is_strict: whether the calls that it makes of its own accord fit their schemas.
          has_one_call: whether it makes one call at most.

        Raises:
          ApiError: 400, in the compiler's words.
        """
        if required:
            assert tools is not None
            lark = self._calls(tools, required, has_one_call)
            return self._compiled("tool_choice", llguidance.LLMatcher.grammar_from_lark(lark))
        if rule is None:
            if tools is None or not is_strict:
                return None
            calls = self._calls(tools, tools.names, has_one_call).removeprefix("start: calls\n")
            lark = f"start: TEXT calls?\n{calls}"
            return self._compiled("tools", llguidance.LLMatcher.grammar_from_lark(lark))
        if tools is None:
            return self._compiled(rule.param, _alone(rule))
        if rule.kind in ("grammar", "regex"):
            message = f"Invalid '{rule.param}': not together with tools; set tool_choice to none."
            raise errors.invalid(rule.param, message)
        text = f"%json {_schema(rule)}" if rule.kind == "json" else _alternatives(rule.source)
        calls = self._calls(tools, tools.names, has_one_call).removeprefix("start: calls\n")
        lark = f"start: calls | text\ntext: {text}\n{calls}"
        return self._compiled(rule.param, llguidance.LLMatcher.grammar_from_lark(lark))

    def constraint(
        self, grammar: str | None, *, starts_in_reasoning: bool, budget: int | None
    ) -> Constraint | None:
        """What holds one answer to a grammar and to a budget of reasoning tokens, if anything does."""
        has_budget = budget is not None and starts_in_reasoning
        if grammar is None and not has_budget:
            return None
        matcher = None
        if grammar is not None:
            matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        return Constraint(
            matcher,
            masks=self._masks,
            end_think=self._end_think,
            starts_in_reasoning=starts_in_reasoning,
            budget=budget,
        )

    def _mask(self, tokens: Iterable[int]) -> NDArray[np.int32]:
        bits = np.zeros(-(-self._tokenizer.size // 32) * 32, np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def _compiled(self, param: str, grammar: str) -> str:
        if len(grammar) > MAX_RULE_LENGTH:
            message = f"Invalid '{param}': it has more than {MAX_RULE_LENGTH} characters."
            raise errors.invalid(param, message)
        if problem := self._checked(grammar):
            problem = _EXCERPT.sub("", problem)
            if param in ("tools", "tool_choice"):
                problem = _PLACE.sub("", problem)  # in lines that the client never saw
            raise errors.invalid(param, f"Invalid '{param}': {' '.join(problem.split())}")
        return grammar

    def _check(self, grammar: str) -> str:
        return llguidance.LLMatcher.validate_grammar(grammar, self._vocabulary)

    def _calls(self, tools: Tools, names: Sequence[str], has_one_call: bool) -> str:
        """Lark of one or more calls in GLM's format, arguments in the order of the schema."""
        tags = {tag: f"<[{self._tokenizer.control_tokens[tag]}]>" for tag in Tag}
        lines = ["start: calls", f"calls: call{'' if has_one_call else '+'}"]
        functions = [f"function_{index}" for index in range(len(names))]
        alternatives = " | ".join(functions)
        lines.append(f"call: {tags[Tag.CALL]} ({alternatives}) {tags[Tag.END_CALL]}")
        for function, name in zip(functions, names, strict=True):
            arguments = []
            for index, (key, schema, is_required) in enumerate(tools.arguments(name)):
                argument = f"{function}_{index}"
                arguments.append(argument if is_required else f"{argument}?")
                value = _value(tools, name, key, schema)
                lines.append(
                    f"{argument}: {tags[Tag.KEY]} {json.dumps(key)} {tags[Tag.END_KEY]} "
                    f"{tags[Tag.VALUE]} {value} {tags[Tag.END_VALUE]}"
                )
            if tools.takes_any(name):
                arguments = ["any_argument*"]
            lines.append(f"{function}: {' '.join([json.dumps(name), *arguments])}")
        key, value = f"{tags[Tag.KEY]} TEXT {tags[Tag.END_KEY]}", f"TEXT {tags[Tag.END_VALUE]}"
        lines.append(f"any_argument: {key} {tags[Tag.VALUE]} {value}")
        lines.append(r"TEXT: /(.|\n)*/")
        return "\n".join(lines)


class Constraint:
    """Holds one answer to a grammar after its reasoning, and its reasoning to a budget.

    Implements the engine's protocol of the same name.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher | None,
        *,
        masks: _Masks,
        end_think: int,
        starts_in_reasoning: bool,
        budget: int | None,
    ) -> None:
        self._matcher = matcher
        self._masks = masks
        self._end_think = end_think
        self._is_reasoning = starts_in_reasoning
        self._budget = budget
        self._num_tokens = 0

    def binds(self, index: int) -> bool:
        if self._matcher is not None:
            return True  # the reasoning may end at any token before this one
        return self._is_reasoning and self._budget is not None and index >= self._budget

    def accept(self, token: int) -> None:
        self._num_tokens += 1
        if not self._is_reasoning:
            if self._matcher is not None:
                self._matcher.consume_token(token)
        elif token == self._end_think:
            self._is_reasoning = False

    def mask(self) -> NDArray[np.int32]:
        if self._is_reasoning:
            is_spent = self._budget is not None and self._num_tokens >= self._budget
            return self._masks.end_think if is_spent else self._masks.reasoning
        words = np.zeros_like(self._masks.stop)
        if self._matcher is not None and not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return words if words.any() else self._masks.stop


class _Vocabulary:
    """The tokenizer as llguidance wants to see it: control tokens apart from any text."""

    def __init__(self, tokenizer: ModelTokenizer, stop_token: int) -> None:
        self.eos_token_id = stop_token
        self.bos_token_id = None
        self.tokens = [tokenizer.spelling(token) for token in range(tokenizer.size)]
        self.special_token_ids = sorted(tokenizer.control_tokens.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._tokenizer.encode_text([text])[0]


def _alone(rule: Rule) -> str:
    match rule.kind:
        case "json":
            return llguidance.LLMatcher.grammar_from_json_schema(_schema(rule))
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(rule.source)
        case "choice":
            return llguidance.LLMatcher.grammar_from_lark(f"start: {_alternatives(rule.source)}")
        case "grammar":
            try:
                return llguidance.LLMatcher.grammar_from_lark(any_to_lark(rule.source))
            except Exception as error:  # the converter raises what it likes
                message = f"Invalid '{rule.param}': {error or type(error).__name__}."
                raise errors.invalid(rule.param, message) from None


def _schema(rule: Rule) -> str:
    """The JSON text of a rule's schema."""
    if not isinstance(rule.source, str):
        return json.dumps(_SPACING | rule.source)
    try:
        schema = json.loads(rule.source)
    except (ValueError, RecursionError) as error:
        raise errors.invalid(rule.param, f"Invalid '{rule.param}': {error}.") from None
    if not isinstance(schema, dict):
        raise errors.invalid(rule.param, f"Invalid '{rule.param}': a schema is an object.")
    return json.dumps(_SPACING | schema)


def _alternatives(texts: Iterable[str]) -> str:
    return " | ".join(json.dumps(text) for text in texts)


def _value(tools: Tools, name: str, key: str, schema: Mapping[str, Any]) -> str:
    """Lark of an argument as GLM writes it: strings bare, anything else as JSON."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and "" not in values and any(isinstance(v, str) for v in values):
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        return f"({_alternatives(texts)})"
    if tools.may_be_string(name, key):
        return "TEXT"
    return f"%json {json.dumps({**_SPACING, **schema})}"
