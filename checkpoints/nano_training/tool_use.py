"""Requests answered through tools: the call, what the tool returned, the final answer.

Knows how signatures of tool_catalog's families are drawn and how arguments are said in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from checkpoints.nano_training.conversation import (
    Call,
    Check,
    Exchange,
    Message,
    Tool,
    answer,
    assistant,
    tool_result,
    user,
)
from checkpoints.nano_training.draw import Draw
from checkpoints.nano_training.tool_catalog import FAMILIES, Arguments, Family, Parameter
from checkpoints.nano_training.tool_names import FAMOUS, made_up_name, telling_names

# Of the tools that are alone on offer, the share whose name says nothing of what they do. Among several
# such a name would have to be found through its description: more than an hour's training learns.
MADE_UP_NAMES = 0.25
# How many tools are on offer. Training has several more often: choosing is the hard part.
_COUNTS: dict[int, float] = {1: 4, 2: 4, 3: 2}
_HELD_OUT_COUNTS: dict[int, float] = {1: 7, 2: 2, 3: 1}


@dataclass(frozen=True, slots=True)
class Signature:
    """One guise of a family, as one conversation offers it.

    Attributes:
      family: what it does.
      name: the function's name.
      parameters: the family's parameters that this guise has, by the name it gives them.
      tool: the OpenAI definition.
      is_unseen: whether training never offers a function under this name.
    """

    family: Family
    name: str
    parameters: dict[str, Parameter]
    tool: Tool
    is_unseen: bool


def draw_signatures(draw: Draw) -> list[Signature]:
    """One to three tools of different families, under different names.

    A tool alone may have a name that says nothing: such a name can only be copied, never remembered.
    """
    counts = _HELD_OUT_COUNTS if draw.held_out else _COUNTS
    families = draw.sample(FAMILIES, draw.weighted(counts))
    if draw.chance(0.25) and FAMILIES[0] not in families:
        # The weather is what people try first.
        families[0] = FAMILIES[0]
    unseen = draw.held_out and draw.chance(0.4)
    made_up = len(families) == 1 and draw.chance(MADE_UP_NAMES)
    return [
        _signature(
            draw,
            family,
            made_up=made_up,
            unseen=unseen or (draw.held_out and not family.parameters),
        )
        for family in families
    ]


def ask_tool(draw: Draw, signature: Signature) -> Exchange:
    """A request for one tool, sometimes for two calls of it; held out: arguments, and names."""
    pairs = signature.family.pairs
    two = bool(pairs) and draw.chance(0.15)
    while True:
        phrasing = draw.choice(pairs if two else signature.family.questions)
        arguments = _two_calls(draw, signature) if two else [_arguments(draw, signature)]
        said = [value for each in arguments for value in each.values()]
        # An unseen name makes any request a held-out one.
        if signature.is_unseen or draw.admits(signature.name, phrasing, *said):
            break
    if two:
        question = phrasing.format(*(next(iter(each.values())) for each in arguments))
    else:
        question = _question(draw, signature, phrasing, arguments[0])
    return _exchange(draw, signature, question, arguments)


def ask_without_tool(draw: Draw, signatures: Sequence[Signature] = ()) -> Exchange:
    """A request that none of the tools on offer can serve: nano says so and calls nothing."""
    offered = [signature.family for signature in signatures]
    while True:
        signature = _signature(draw, draw.choice(FAMILIES), made_up=False, unseen=False)
        phrasing, arguments = draw.choice(signature.family.questions), _arguments(draw, signature)
        if not (signature.family in offered or _is_answerable(signature.family)) and draw.admits(
            "no tool", phrasing, *arguments.values()
        ):
            break
    question = _question(draw, signature, phrasing, arguments)
    # Any of them: where one serves, the model is to look at that one.
    looked_at = draw.choice(signatures) if signatures else None
    content = "I have no tool for that."
    return answer(
        "no tool",
        question,
        _thought(signature.family, looked_at, "No tool can do that."),
        content,
        Check(equals=content),
    )


def _is_answerable(family: Family) -> bool:
    """Whether nano answers by itself, or the request reads like one that it does."""
    return any(parameter.key in ("expression", "a") for parameter in family.parameters)


def _two_calls(draw: Draw, signature: Signature) -> list[Arguments]:
    """Two calls with the required parameter only, each with a value of its own."""
    name, parameter = next(iter(signature.parameters.items()))
    first = second = parameter.value(draw)
    while second == first:
        second = parameter.value(draw)
    return [{name: first}, {name: second}]


def _signature(draw: Draw, family: Family, *, made_up: bool, unseen: bool) -> Signature:
    if made_up:
        name = made_up_name(draw, unseen=unseen)
    elif family is FAMILIES[0] and not unseen and draw.chance(0.2):
        name = FAMOUS
    else:
        name = draw.choice(telling_names(family, unseen=unseen))
    given = [each for each in family.parameters if not each.mention or draw.chance(0.4)]
    parameters = {draw.choice(each.names): each for each in given}
    described = draw.chance(0.2)
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            key: _property(each, described=described) for key, each in parameters.items()
        },
    }
    if parameters or draw.chance(0.5):
        schema["required"] = [key for key, each in parameters.items() if not each.mention]
    if draw.chance(0.1):
        schema["additionalProperties"] = False
    function: dict[str, Any] = {"name": name}
    if made_up or draw.chance(0.75):
        function["description"] = draw.choice(family.descriptions)
    function["parameters"] = schema
    tool = {"type": "function", "function": function}
    return Signature(family, name, parameters, tool, unseen)


def _property(parameter: Parameter, *, described: bool) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": parameter.type}
    if parameter.type == "array":
        schema["items"] = {"type": "string"}
    if parameter.enum:
        schema["enum"] = list(parameter.enum)
    if described:
        schema["description"] = f"The {parameter.key}"
    return schema


def _arguments(draw: Draw, signature: Signature) -> Arguments:
    return {
        name: parameter.value(draw)
        for name, parameter in signature.parameters.items()
        if not parameter.mention or draw.chance(0.5)
    }


def _question(draw: Draw, signature: Signature, phrasing: str, arguments: Arguments) -> str:
    said = _said(signature, arguments)
    question = phrasing.format(**said)
    mentions = "".join(
        signature.parameters[name].mention.format(value) for name, value in arguments.items()
    )
    if not mentions:
        return question if said else draw.casual(question)
    ending = question[-1] if question[-1] in "?." else ""
    return question.removesuffix(ending) + mentions + ending


def _said(signature: Signature, arguments: Arguments) -> dict[str, str]:
    """The arguments by the family's own keys, as a sentence has them."""
    return {signature.parameters[name].key: _in_words(value) for name, value in arguments.items()}


def _in_words(value: Any) -> str:
    match value:
        case bool():
            return "on" if value else "off"
        case [*first, last] if first:
            return ", ".join(first) + " and " + last
        case [only]:
            return only
        case _:
            return str(value)


def _exchange(
    draw: Draw, signature: Signature, question: str, arguments: list[Arguments]
) -> Exchange:
    calls = tuple(Call(signature.name, each) for each in arguments)
    outcomes = [_outcome(draw, signature, each) for each in arguments]
    final = " ".join(text for _, text in outcomes)
    conclusion = f'Call "{signature.name}"{" twice" if len(calls) > 1 else ""}.'
    plan = _thought(signature.family, signature, conclusion)
    messages: list[Message] = [user(question), assistant(plan, "", calls)]
    messages += [tool_result(result) for result, _ in outcomes]
    got = "I have the result." if len(calls) == 1 else "I have both results."
    messages.append(assistant(got, final))
    skill = "tool call, unseen name" if signature.is_unseen else "tool call"
    return Exchange(skill, tuple(messages), (Check(calls=calls), Check(equals=final)))


def _outcome(draw: Draw, signature: Signature, arguments: Arguments) -> tuple[str, str]:
    keyed: Arguments = {
        signature.parameters[name].key: value if isinstance(value, bool) else _in_words(value)
        for name, value in arguments.items()
    }
    return signature.family.outcome(draw, keyed)


def _thought(wanted: Family, looked_at: Signature | None, conclusion: str) -> str:
    """What is wanted, and what one tool on offer is for: whether it serves is then read off both.

    Quoted, the name is the same tokens as in the definition and in the call.
    """
    seen = f' "{looked_at.name}": {looked_at.family.topic}.' if looked_at else ""
    return f"The user wants {wanted.topic}.{seen} {conclusion}"
