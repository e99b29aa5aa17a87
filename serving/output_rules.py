"""What form an answer must have, by all the names clients have for it.

Knows no grammar: a rule says what is wanted, not how it is enforced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from serving import errors
from serving.wire import Wire

MAX_RULE_LENGTH = 100_000

Kind = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A form that an answer must have.

    Attributes:
      param: the field that asked for it.
      kind: "json": JSON of the schema `source`; "regex": the pattern `source`; "choice": one of the
        strings `source`; "grammar": the Lark or EBNF grammar `source`.
      source: see kind.
    """

    param: str
    kind: Kind
    source: Any


class JsonSchema(Wire):
    """OpenAI's wrapping of a schema."""

    name: str = "answer"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Wire):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema", "regex", "ebnf"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    ebnf: str | None = None

    @model_validator(mode="after")
    def _check_source(self) -> ResponseFormat:
        source = {
            "json_schema": self.json_schema,
            "regex": self.regex,
            "ebnf": self.ebnf,
        }.get(self.type, True)
        if source is None:
            raise PydanticCustomError(
                "invalid_value", "must hold what its type says: {kind}", {"kind": self.type}
            )
        return self

    def rule(self, param: str) -> Rule | None:
        match self.type:
            case "json_object":
                return Rule(param, "json", {"type": "object"})
            case "json_schema":
                assert self.json_schema is not None
                return Rule(param, "json", self.json_schema.schema_ or {})
            case "regex":
                return Rule(param, "regex", self.regex)
            case "ebnf":
                return Rule(param, "grammar", self.ebnf)
            case _:
                return None


Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]
Schema = dict[str, Any] | str


class StructuredOutputs(Wire):
    """vLLM's structured_outputs."""

    json_: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None


class RuledRequest(Wire):
    """The fields of a request that ask for a form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    json_schema: Schema | None = None
    regex: str | None = None
    ebnf: str | None = None

    @property
    def rule(self) -> Rule | None:
        """The form asked for.

        Raises:
          ApiError: 400, several are.
        """
        rules = list(self._rules())
        if len(rules) > 1:
            fields = " and ".join(f"'{rule.param}'" for rule in rules[:2])
            message = f"Invalid '{rules[1].param}': an answer has one form, not that of {fields}."
            raise errors.invalid(rules[1].param, message)
        return rules[0] if rules else None

    def _rules(self):
        if self.response_format is not None:
            rule = self.response_format.rule("response_format")
            if rule is not None:
                yield rule
        outer = self.structured_outputs or StructuredOutputs()
        if outer.json_object:
            yield Rule("structured_outputs.json_object", "json", {"type": "object"})
        fields: list[tuple[str, Kind, Any]] = [
            ("structured_outputs.json", "json", outer.json_),
            ("structured_outputs.regex", "regex", outer.regex),
            ("structured_outputs.choice", "choice", outer.choice),
            ("structured_outputs.grammar", "grammar", outer.grammar),
            ("guided_json", "json", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
            ("json_schema", "json", self.json_schema),
            ("regex", "regex", self.regex),
            ("ebnf", "grammar", self.ebnf),
        ]
        for param, kind, source in fields:
            if source is not None:
                yield Rule(param, kind, source)
