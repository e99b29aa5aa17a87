"""What goes wrong for a client, as OpenAI's error body and status.

Knows neither routes nor requests: whoever finds the fault raises, the app answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

ErrorType = Literal[
    "invalid_request_error", "rate_limit_error", "service_unavailable_error", "server_error"
]

# A body that echoes its input must not grow with it.
MAX_MESSAGE_LENGTH = 1000


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: the HTTP status.
      message: what was wrong, where, and what to do; cut at MAX_MESSAGE_LENGTH.
      type, param, code: as OpenAI's error body has them; param is a path such as
        `messages[0].content`.
      retry_after: seconds after which trying again makes sense, if it does.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shorten(message, MAX_MESSAGE_LENGTH)
        self.type: ErrorType = type
        self.param = param if param is None else shorten(param, 200)
        self.code = code
        self.retry_after = retry_after

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same for clients of another API, whose fields have these names."""
        if self.param is None or self.param not in names:
            return self
        asked = names[self.param]
        return ApiError(
            self.status,
            self.message.replace(self.param, asked),
            type=self.type,
            param=asked,
            code=self.code,
            retry_after=self.retry_after,
        )

    def body(self) -> dict[str, Any]:
        """The JSON body, `{"error": {...}}`."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def shorten(text: str, length: int) -> str:
    """At most `length` characters of text, its end replaced by "…" when cut."""
    return text if len(text) <= length else text[: length - 1] + "…"


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """The request is at fault in one of its fields."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """A field asks for what this server cannot do yet; ignoring it would change the answer."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def context_length_exceeded(param: str, limit: int, used: str) -> ApiError:
    """Prompt and completion do not fit; clients look for the first sentence."""
    message = f"This model's maximum context length is {limit} tokens. However, {used}."
    return ApiError(400, message, param=param, code="context_length_exceeded")


def model_not_found(name: str, served: str) -> ApiError:
    """The request names a model that is not served here."""
    message = f"The model `{shorten(name, 100)}` does not exist; this server serves `{served}`."
    return ApiError(404, message, param="model", code="model_not_found")


def unauthorized(code: str | None) -> ApiError:
    """The request has no API key, or with a code, none that is known."""
    message = "You did not provide an API key: send it as 'Authorization: Bearer KEY'."
    if code is not None:
        message = "Incorrect API key provided."
    return ApiError(401, message, code=code)


def queue_full() -> ApiError:
    """Every slot and every place in the queue is taken."""
    message = "The server's queue is full; try again in a moment."
    return ApiError(429, message, type="rate_limit_error", code="slow_down", retry_after=1)


def queue_timeout() -> ApiError:
    """The request waited for as long as it may, and had not begun."""
    message = "The server is overloaded: the request did not begin in the time it may wait."
    return unavailable(message, "queue_timeout")


def unavailable(message: str, code: str, retry_after: int = 5) -> ApiError:
    """The server takes no requests now."""
    return ApiError(
        503, message, type="service_unavailable_error", code=code, retry_after=retry_after
    )


def internal(message: str) -> ApiError:
    """The fault is ours."""
    return ApiError(500, message, type="server_error")
