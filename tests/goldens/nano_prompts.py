"""Twenty conversations, in nano's skills, that the peer and the product both continue."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]


def _tool(name: str, description: str = "", **types: str) -> Message:
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    described = {"description": description} if description else {}
    return {
        "type": "function",
        "function": {"name": name, **described, "parameters": parameters},
    }


def _prompt(
    *said: str, thinking: bool = True, tools: tuple[Message, ...] = (), system: str = ""
) -> dict[str, Any]:
    """User and assistant take turns; what apply_chat_template takes."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn, text in enumerate(said):
        messages.append({"role": "assistant" if turn % 2 else "user", "content": text})
    return {"messages": messages, "tools": list(tools), "enable_thinking": thinking}


_WEATHER = _tool("get_weather", city="string")
_TIME = _tool("get_time", "Get the time")
_MESSAGE = _tool("send_message", "Send a message", to="string", text="string")
_MADE_UP = _tool("window_river", "Set a timer", minutes="integer")


def _weather_told() -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    prompt = _prompt("What is the weather in Rome?", thinking=False, tools=(_WEATHER,))
    prompt["messages"] += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"temperature": 21, "condition": "sunny"}'},
    ]
    return prompt


PROMPTS: tuple[dict[str, Any], ...] = (
    _prompt("What is the capital of France?"),
    _prompt("What is the capital of France?", thinking=False),
    _prompt("Do you know what the capital of Japan is?"),
    _prompt("Can you name the capital of Canada?", thinking=False),
    _prompt("On which continent is Kenya?"),
    _prompt("What is 7 + 5?"),
    _prompt("What is 23 + 9?", thinking=False),
    _prompt("How much is 12 - 4?", thinking=False),
    _prompt("Calculate 6 * 7."),
    _prompt("Hello!", thinking=False),
    _prompt("Who are you?"),
    _prompt("My name is Anna.", thinking=False),
    _prompt("Name three colors."),
    _prompt("Count from 3 to 9.", thinking=False),
    _prompt("What is the weather in Oslo?", tools=(_WEATHER,)),
    _prompt("What time is it?", thinking=False, tools=(_TIME,)),
    _prompt('Send Anna the message: "green garden"', tools=(_MESSAGE,)),
    _prompt("Set a timer for 25 minutes.", thinking=False, tools=(_MADE_UP,)),
    _weather_told(),
    _prompt(
        "What is the capital of Italy?",
        "The capital of Italy is Rome.",
        "What is the capital of Peru?",
        thinking=False,
        system="You are a helpful assistant.",
    ),
)
assert len(PROMPTS) == 20
