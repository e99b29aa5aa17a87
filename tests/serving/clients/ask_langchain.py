"""Asks through langchain-openai: whole, streamed, tools, structured output. Prints what held, as JSON."""

import json
import os
from typing import Any, Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]


def model(**fields: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="tiny",
        base_url=f"{os.environ['SERVER']}/v1",
        api_key=SecretStr(os.environ["API_KEY"]),
        temperature=0,
        max_retries=0,
        extra_body={"reasoning_effort": "none"},
        **fields,
    )


held: dict[str, bool] = {}
short = model(max_completion_tokens=12)
text = short.invoke("Hi").content
held["whole"] = bool(text)
held["stream"] = "".join(str(part.content) for part in short.stream("Hi")) == text
called = model().bind_tools([Weather], tool_choice="Weather", parallel_tool_calls=False)
[call] = getattr(called.invoke("Hi"), "tool_calls", [])
held["tools"] = call["name"] == "Weather" and call["args"]["city"] in ("Oslo", "Rome")
for method in ("json_schema", "function_calling"):
    structured = model().with_structured_output(Weather, method=method)
    held[method] = isinstance(structured.invoke("Hi"), Weather)
print(json.dumps(held))
