"""Tools as the client declared them: their names, and the JSON types of their arguments.

Knows neither the wire nor the model's output.

The model writes an argument as bare text: `2` may be a number or a string. The tool's JSON schema
tells which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_JSON_TYPES = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    type(None): "null",
    int: "integer",
    float: "number",
}


class Tools:
    """The functions a request declares.

    Args:
      tools: OpenAI's tool objects, `{"type": "function", "function": {"name": …}}`.
    """

    def __init__(self, tools: Iterable[Mapping[str, Any]]) -> None:
        functions = [tool["function"] for tool in tools]
        self._schemas = {f["name"]: f.get("parameters") or {} for f in functions}

    def __contains__(self, name: str) -> bool:
        return name in self._schemas

    @property
    def names(self) -> list[str]:
        return list(self._schemas)

    def arguments(self, name: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """Each argument of a tool: its name, a schema that stands alone, whether it must be given."""
        root = self._schemas[name]
        properties, required = root.get("properties"), root.get("required")
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        for key, schema in properties.items() if isinstance(properties, Mapping) else ():
            alone = {**schema, **definitions} if isinstance(schema, Mapping) else {}
            yield key, alone, isinstance(required, list) and key in required

    def takes_any(self, name: str) -> bool:
        """Whether a tool's schema names no arguments and allows some, as `{"type": "object"}` does."""
        root = self._schemas[name]
        is_named = isinstance(root.get("properties"), Mapping)
        return bool(root) and not is_named and root.get("additionalProperties") is not False

    def may_be_string(self, name: str, key: str) -> bool:
        """Whether an argument can be a string, as one that its schema says nothing of can."""
        types = self._types(name, key)
        return not types or "string" in types

    def is_string(self, name: str, key: str) -> bool:
        """Whether an argument can only be a string, so that its text needs no interpretation."""
        return self._types(name, key) == {"string"}

    def to_json(self, name: str, key: str, text: str) -> str:
        """JSON of an argument that the model wrote as `text`.

        Text that is JSON of a type the schema allows is taken as it stands; anything else is a
        string, written bare. Where no string is allowed, any JSON is better than one.
        """
        types = self._types(name, key)
        if types != {"string"}:
            stripped = text.strip()
            type_ = _json_type(stripped)
            if "string" in types:
                is_json = type_ in types - {"string"}
            else:
                is_json = type_ is not None
            if is_json:
                return stripped
        return json.dumps(text)

    def _types(self, name: str, key: str) -> set[str]:
        """The JSON types an argument may have; empty when the schema does not say."""
        schema = self._schemas.get(name, {})
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or key not in properties:
            return set()
        return _types_of(properties[key], schema, depth=0)


def _types_of(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    # Schemas come from clients: anything may be missing, wrong, or refer to itself.
    if not isinstance(schema, Mapping) or depth > 8:
        return set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return _widened({declared})
    if isinstance(declared, list):
        return _widened({name for name in declared if isinstance(name, str)})
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return _widened({_JSON_TYPES.get(type(value), "object") for value in values})
    for keyword in ("anyOf", "oneOf", "allOf"):
        options = schema.get(keyword)
        if isinstance(options, list) and options:
            found = [_types_of(option, root, depth + 1) for option in options]
            return set().union(*found) if all(found) else set()
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        return _types_of(target, root, depth + 1)
    return set()


def _widened(types: set[str]) -> set[str]:
    return types | {"integer"} if "number" in types else types


def _json_type(text: str) -> str | None:
    """The JSON type of a text; None when it is no JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return _JSON_TYPES[type(value)]


def _refuse(constant: str) -> None:
    # NaN and Infinity, which Python takes for JSON.
    raise ValueError(constant)
