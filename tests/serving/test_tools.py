"""Argument text into JSON, by the tool's schema."""

import json

import pytest

from serving.tools import Tools


def tools(parameters: object) -> Tools:
    return Tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "2", "2"),
        ({"type": "string"}, " a\n", " a\n"),
        ({"type": "string"}, '"quoted"', '"quoted"'),
        ({"type": "integer"}, "2", 2),
        ({"type": "integer"}, " 2 ", 2),
        ({"type": "integer"}, "two", "two"),
        ({"type": "number"}, "2", 2),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "true", True),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"a": {"b": null}}', {"a": {"b": None}}),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "2", "2"),
        ({"type": ["string", "integer"]}, "2", 2),
        ({"type": ["string", "integer"]}, '"2"', '"2"'),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": "1"}, "1", "1"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "string"}, {}]}, "3", 3),
        ({"$ref": "#/$defs/word"}, "3", "3"),
        ({"$ref": "#/$defs/nowhere"}, "3", 3),
        ({"$ref": "#/properties/x"}, "3", 3),
        ({}, "3", 3),
        ({}, "three", "three"),
        ({}, '"three"', "three"),
        (True, "3", 3),
    ],
)
def test_an_argument_gets_the_type_its_schema_allows(schema, text, value):
    declared = tools({"properties": {"x": schema}, "$defs": {"word": {"type": "string"}}})
    found = json.loads(declared.to_json("f", "x", text))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("parameters", [None, {}, {"properties": []}, {"properties": {"y": {}}}])
def test_an_argument_no_schema_knows_is_json_where_it_can_be(parameters):
    assert tools(parameters).to_json("f", "x", "3") == "3"
    assert tools(parameters).to_json("f", "x", "[") == '"["'


def test_numbers_keep_their_digits():
    declared = tools({"properties": {"x": {"type": "number"}}})
    assert declared.to_json("f", "x", "1.10000000000000000001") == "1.10000000000000000001"


def test_only_declared_tools_are_known():
    assert "f" in tools({})
    assert "g" not in tools({})
