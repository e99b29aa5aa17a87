"""Random small JSON schemas, the same ones every time.

Knows no server.
"""

import random
from typing import Any

_WORDS = ("name", "age", "kind", "tags", "size", "ok", "note", "city")


def random_schema(seed: int) -> dict[str, Any]:
    """An object of a few properties, each of some small kind."""
    rng = random.Random(seed)
    return _object(rng, depth=0)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    required = [name for name in names if rng.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: _value(rng, depth + 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "enum", "const", "null or string", "pattern"]
    if depth < 3:
        kinds += ["object", "array", "array"]
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": rng.randint(1, 8)}
        case "integer":
            low = rng.randint(-5, 5)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": rng.choice([1, 10.5])}
        case "boolean":
            return {"type": "boolean"}
        case "enum":
            return {"enum": rng.sample(["a", "b", 1, 2.5, None, True, "é"], rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(["x", 7, False])}
        case "null or string":
            return {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 4}]}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-c]{2}$", "^[0-9]{4}-[0-9]{2}$"])}
        case "object":
            return _object(rng, depth)
        case _:
            most = rng.randint(1, 3)
            return {"type": "array", "items": _value(rng, depth + 1), "maxItems": most}
