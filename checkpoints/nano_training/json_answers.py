"""Questions that want JSON of a given shape: facts taken out of a sentence.

Knows the fields a sentence can carry and how it says them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from checkpoints.nano_training.conversation import Check, Exchange, answer
from checkpoints.nano_training.draw import Draw
from checkpoints.nano_training.world import ANIMALS, CITIES, COLORS, FIRST_NAMES, THINGS


@dataclass(frozen=True, slots=True)
class _Field:
    """A key, its JSON type, and the sentences that state it ({} is the value)."""

    key: str
    type: str
    sentences: tuple[str, ...]


# "name" opens the sentence and is always asked for; the others follow in any order.
_FIELDS = (
    _Field("age", "integer", ("is {} years old", "turned {} this year")),
    _Field("city", "string", ("lives in {}", "comes from {}")),
    _Field("color", "string", ("likes {}", "has a {} bike")),
    _Field("pet", "string", ("has a {}", "owns a {}")),
    _Field("count", "integer", ("has {} {thing}", "bought {} {thing}")),
    _Field("member", "boolean", ("is a member", "is not a member")),
    _Field("friend", "string", ("is a friend of {}", "knows {}")),
)
_INSTRUCTIONS = (
    "Answer in JSON with the keys {keys}: {sentence}",
    "Extract {keys} as JSON: {sentence}",
    "Give me JSON with {keys}. {sentence}",
    "{sentence} Return a JSON object with the keys {keys}.",
    "{sentence} Answer with JSON that matches this schema: {schema}",
    "Use this JSON schema: {schema} {sentence}",
    "Fill in the schema {schema} from this text: {sentence}",
)
_UNSEEN_INSTRUCTIONS = (
    "Return JSON with {keys}: {sentence}",
    "{sentence} Answer as JSON with this schema: {schema}",
)


def ask_json(draw: Draw) -> Exchange:
    """One sentence to be turned into JSON; held out: sets of keys with their values, and wordings."""
    while True:
        fields = draw.sample(_FIELDS, draw.integer(1, 3))
        told = [(field, _value(draw, field)) for field in fields]
        name = draw.choice(FIRST_NAMES)
        if draw.admits("json", *(field.key for field in fields), name):
            break
    sentence = f"{name} {_joined([_clause(draw, *fact) for fact in told])}."
    values: dict[str, Any] = {"name": name} | {field.key: value for field, value in told}
    types = {"name": "string"} | {field.key: field.type for field in fields}
    unseen = draw.held_out and draw.chance(0.3)
    question = draw.choice(_UNSEEN_INSTRUCTIONS if unseen else _INSTRUCTIONS).format(
        keys=_joined([f'"{key}"' for key in types] if draw.chance(0.5) else list(types)),
        schema=_schema(draw, types),
        sentence=sentence,
    )
    content = json.dumps(values, ensure_ascii=False)
    thinking = "The user wants JSON with " + _joined(list(types)) + "."
    return answer("json", question, thinking, content, Check(json=values))


def _value(draw: Draw, field: _Field) -> Any:
    match field.key:
        case "age":
            return draw.integer(5, 99)
        case "count":
            return draw.integer(2, 40)
        case "city":
            return draw.choice(CITIES)
        case "color":
            return draw.choice(COLORS)
        case "pet":
            return draw.choice(ANIMALS)
        case "friend":
            return draw.choice(FIRST_NAMES)
        case _:
            return draw.chance(0.5)


def _clause(draw: Draw, field: _Field, value: Any) -> str:
    if field.type == "boolean":
        return field.sentences[0 if value else 1]
    return draw.choice(field.sentences).format(value, thing=draw.choice(THINGS))


def _schema(draw: Draw, types: dict[str, str]) -> str:
    if draw.chance(0.5):
        return json.dumps(types)
    properties = {key: {"type": kind} for key, kind in types.items()}
    return json.dumps({"type": "object", "properties": properties, "required": list(types)})


def _joined(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]
