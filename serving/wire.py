"""How a request's JSON becomes data: strictly, and with errors that name the field at fault.

Knows no API: what the fields are is each protocol's to say.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json

from serving import errors

# Field -> the values that ask for nothing. Any other value is refused.
Refused = dict[str, tuple[Any, ...]]

# The branches of a union are parts of pydantic's path, not of the client's.
_BRANCHES = frozenset({"str", "list[int]", "ToolChoice", "literal['auto','none','required']"})

# What pydantic's messages begin with; the field's name stands there already.
_SUBJECT = re.compile(r"^(Input|Value|String|List|Dictionary) (?=should )")


class Wire(BaseModel):
    """A JSON object: no type is converted into another, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def parse[Body: Wire](kind: type[Body], body: bytes, refused: Refused) -> Body:
    """A request from the bytes of its body.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    fields = json_object(body)
    _refuse_unsupported(fields, refused)
    return validate(kind, fields)


def json_object(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
      ApiError: 400, it holds none.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise errors.ApiError(400, f"The body is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise errors.ApiError(400, "The body must be a JSON object.", code="invalid_type")
    return fields


def validate[Body: Wire](kind: type[Body], fields: dict[str, Any]) -> Body:
    """A request from its fields.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _api_error(error.errors(include_url=False)[0]) from None


def _refuse_unsupported(fields: dict[str, Any], refused: Refused) -> None:
    for name in fields.keys() & refused.keys():
        value, harmless = fields[name], refused[name]
        if value is not None and value not in harmless:
            advice = f" or set it to {json.dumps(harmless[0])}" if harmless else ""
            raise errors.unsupported(name, f"'{name}' is not supported: leave it out{advice}.")


def _api_error(detail: ErrorDetails) -> errors.ApiError:
    param = _path(detail["loc"]) or None
    kind = detail["type"]
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
        return errors.invalid(param, message, "missing_required_parameter")
    if kind in ("invalid_type", "unsupported_parameter"):
        code = kind
    else:
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    what = _SUBJECT.sub("", detail["msg"]).replace(" after validation", "")
    value = detail["input"]
    if isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**256):
        what += f", not {errors.shorten(json.dumps(value, ensure_ascii=False), 100)}"
    return errors.invalid(param, f"Invalid '{param}': {what}.", code)


def _path(where: tuple[int | str, ...]) -> str:
    """`messages[0].content` of ("messages", 0, "content")."""
    where = tuple(part for part in where if part not in _BRANCHES)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return path.removeprefix(".")
