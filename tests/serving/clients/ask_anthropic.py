"""Asks through anthropic: whole, streamed, tools, counting. Prints what held, as JSON."""

import asyncio
import json
import os

import anthropic

MODEL = "tiny"
MESSAGES: list = [{"role": "user", "content": "Hi"}]
TOOLS: list = [
    {
        "name": "weather",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
        },
    }
]
OPTIONS: dict = {
    "base_url": os.environ["SERVER"],
    "api_key": os.environ["API_KEY"],
    "max_retries": 0,
}
FIELDS: dict = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12}


def ask(client: anthropic.Anthropic) -> dict[str, bool]:
    held: dict[str, bool] = {}
    whole = client.messages.create(**FIELDS)
    text = "".join(block.text for block in whole.content if block.type == "text")
    held["whole"] = bool(text) and whole.stop_reason == "max_tokens"
    with client.messages.stream(**FIELDS) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    held["stream"] = streamed == text
    held["usage"] = final.usage.output_tokens == whole.usage.output_tokens == 12
    counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES)
    held["count"] = counted.input_tokens == whole.usage.input_tokens
    choice: dict = {"type": "any", "disable_parallel_tool_use": True}
    fields: dict = {**FIELDS, "max_tokens": 200, "tools": TOOLS, "tool_choice": choice}
    called = client.messages.create(**fields)
    [use] = [block for block in called.content if block.type == "tool_use"]
    held["tools"] = use.input["city"] in ("Oslo", "Rome") and called.stop_reason == "tool_use"
    with client.messages.stream(**fields) as stream:
        final = stream.get_final_message()
    [streamed_use] = [block for block in final.content if block.type == "tool_use"]
    held["tool stream"] = streamed_use.input == use.input
    thinking: dict = {"type": "enabled", "budget_tokens": 1024}
    with client.messages.stream(**{**FIELDS, "thinking": thinking}) as stream:
        kinds = {block.type for block in stream.get_final_message().content}
    held["thinking"] = "thinking" in kinds
    try:
        client.messages.create(**{**FIELDS, "model": "other"})
    except anthropic.NotFoundError as error:
        held["refusal"] = "other" in str(error) and bool(error.request_id)
    return held


async def ask_async() -> dict[str, bool]:
    async with anthropic.AsyncAnthropic(**OPTIONS) as client:
        answer = await client.messages.create(**FIELDS)
        return {"async": answer.role == "assistant"}


with anthropic.Anthropic(**OPTIONS) as client:
    print(json.dumps({**ask(client), **asyncio.run(ask_async())}))
