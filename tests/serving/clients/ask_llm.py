"""Asks through llm, configured as its users do: whole, streamed, schema, tools. Prints what held, as JSON."""

import json
import os
from pathlib import Path

import llm

entry = {
    "model_id": "tiny",
    "model_name": "tiny",
    "api_base": f"{os.environ['SERVER']}/v1",
    "api_key_name": "tiny",
    "reasoning": True,
    "supports_schema": True,
    "supports_tools": True,
}
directory = Path(os.environ["LLM_USER_PATH"])
(directory / "extra-openai-models.yaml").write_text(json.dumps([entry]))  # JSON is YAML
(directory / "keys.json").write_text(json.dumps({"tiny": os.environ["API_KEY"]}))

model = llm.get_model("tiny")
held: dict[str, bool] = {}
text = model.prompt("Hi", stream=False, temperature=0, max_tokens=12).text()
held["whole"] = isinstance(text, str)
held["stream"] = "".join(model.prompt("Hi", stream=True, temperature=0, max_tokens=12)) == text
schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: cold"


answer = model.prompt("Hi", schema=schema, stream=False, temperature=0, reasoning_effort="none")
held["tools"] = isinstance(
    model.prompt("Hi", tools=[weather], stream=False, temperature=0, max_tokens=12).text(), str
)
held["structured"] = json.loads(answer.text() or "{}").get("city") in ("Oslo", "Rome")
print(json.dumps(held))
