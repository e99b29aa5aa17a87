"""Asks through openai: sync, async, parsed; completions, chat, responses. Prints what held, as JSON."""

import asyncio
import json
import os
from typing import Literal

import openai
from pydantic import BaseModel

MODEL = "tiny"
MESSAGES: list = [{"role": "user", "content": "Hi"}]
URL, KEY = f"{os.environ['SERVER']}/v1", os.environ["API_KEY"]
OFF = "none"  # reasoning


class Verdict(BaseModel):
    kind: Literal["good", "bad"]
    is_sure: bool


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "parameters": PARAMETERS}
TOOLS: list = [{"type": "function", "function": FUNCTION}]


def ask(client: openai.OpenAI) -> dict[str, bool]:
    held: dict[str, bool] = {}
    held["models"] = [model.id for model in client.models.list()] == [MODEL]
    fields: dict = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 12}
    fields |= {"temperature": 0, "reasoning_effort": OFF}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    logprobs = choice.logprobs and choice.logprobs.content
    held["logprobs"] = bool(logprobs) and len(logprobs or ()) == 12
    text = ""
    for event in client.chat.completions.create(**fields, stream=True):
        text += event.choices[0].delta.content or ""
    held["stream"] = text == choice.message.content
    several = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=3)
    held["choices"] = len(several.choices) == 4
    fields["max_completion_tokens"] = 400
    called = client.chat.completions.create(
        **fields, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    [call, *_] = called.choices[0].message.tool_calls or [None]
    if call is not None and call.type == "function":
        held["tools"] = json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    names = ""
    events = client.chat.completions.create(
        **fields,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
        stream=True,
    )
    for event in events:
        for part in event.choices[0].delta.tool_calls or []:
            names += (part.function and part.function.name) or ""
    held["tool stream"] = names == "weather"
    parsed = client.chat.completions.parse(**fields, response_format=Verdict)
    held["parse"] = isinstance(parsed.choices[0].message.parsed, Verdict)
    response = client.responses.create(
        model=MODEL, input="Hi", reasoning={"effort": OFF}, max_output_tokens=9, temperature=0
    )
    with client.responses.stream(
        model=MODEL, input="Hi", reasoning={"effort": OFF}, max_output_tokens=9, temperature=0
    ) as stream:
        streamed = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    held["responses"] = bool(response.output_text) and streamed == response.output_text
    try:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, n=0)
    except openai.BadRequestError as error:
        held["refusal"] = error.param == "n" and bool(error.request_id)
    return held


async def ask_async() -> dict[str, bool]:
    async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0) as client:
        text = ""
        fields: dict = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        fields["reasoning_effort"] = OFF
        async for event in await client.chat.completions.create(**fields, stream=True):
            text += event.choices[0].delta.content or ""
        whole = await client.chat.completions.create(**fields)
        return {"async": text == whole.choices[0].message.content}


with openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0) as client:
    print(json.dumps({**ask(client), **asyncio.run(ask_async())}))
