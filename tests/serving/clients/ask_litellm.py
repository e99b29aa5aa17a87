"""Asks through litellm: whole, streamed, tools, structured output. Prints what held, as JSON."""

import json
import os
from typing import Any

import litellm
from litellm.exceptions import BadRequestError

FIELDS: dict[str, Any] = {
    "model": "openai/tiny",
    "api_base": f"{os.environ['SERVER']}/v1",
    "api_key": os.environ["API_KEY"],
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 0,
    "extra_body": {"reasoning_effort": "none"},
}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


def completion(**fields: Any) -> Any:
    return litellm.completion(**FIELDS, **fields)


held: dict[str, bool] = {}
text = completion(max_tokens=12).choices[0].message.content
held["whole"] = bool(text)
events = completion(max_tokens=12, stream=True)
held["stream"] = "".join(event.choices[0].delta.content or "" for event in events) == text
[call, *_] = completion(tools=TOOLS, tool_choice="required").choices[0].message.tool_calls
held["tools"] = json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
schema = {"name": "weather", "schema": PARAMETERS, "strict": True}
response_format = {"type": "json_schema", "json_schema": schema}
answer = completion(response_format=response_format, max_tokens=300).choices[0].message.content
held["structured"] = json.loads(answer)["city"] in ("Oslo", "Rome")
try:
    completion(max_tokens=10**9)
except BadRequestError as error:
    held["refusal"] = "max_tokens" in str(error)
print(json.dumps(held))
