"""The tools nano learns to call: families of signatures, what people ask them, what they return.

Knows no conversations; a family says how one call looks in every guise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpoints.nano_training.draw import Draw
from checkpoints.nano_training.world import (
    CATEGORIES,
    CITIES,
    COUNTRIES,
    FIRST_NAMES,
    THINGS,
    WORDS,
    invented_word,
)

Arguments = dict[str, Any]

ROOMS: tuple[str, ...] = tuple(
    (
        "kitchen bedroom garden library hall garage office bathroom attic cellar corridor studio "
        "lobby terrace nursery workshop pantry lounge porch stable"
    ).split()
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a family.

    Attributes:
      key: what the family's own templates call it.
      names: what signatures call it; one is drawn per tool.
      type: its JSON type.
      value: draws an argument.
      mention: empty for a required parameter; else what the question adds when it is given.
      enum: the only values it takes, if limited.
    """

    key: str
    names: tuple[str, ...]
    type: str
    value: Callable[[Draw], Any]
    mention: str = ""
    enum: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """Tools that do the same thing under different names.

    Attributes:
      topic: what a request for it wants.
      names: function names that are no verb and noun.
      verbs, nouns: what function names of two words are made of, tool_names says how.
      descriptions: what signatures say it does.
      parameters: required ones first.
      questions: requests, with {key} for each required argument.
      outcome: draws what the tool returns and what nano then answers.
      pairs: requests with {0} and {1} for two calls that differ in the first argument.
    """

    topic: str
    names: str
    verbs: str
    nouns: str
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    questions: tuple[str, ...]
    outcome: Callable[[Draw, Arguments], tuple[str, str]]
    pairs: tuple[str, ...] = ()


def _invented(draw: Draw) -> str:
    """Now and then a word that nano has never seen, else none."""
    return invented_word(draw) if draw.chance(0.2) else ""


def _phrase(draw: Draw) -> str:
    count = draw.integer(1, 3)
    return " ".join(_invented(draw) or word for word in draw.sample(WORDS, count))


_SYMBOLS = (
    "AAPL AMZN GOOG MSFT NVDA TSLA META NFLX AMD INTC IBM ORCL SAP ASML SONY TSM UBER DIS KO PEP "
    "NKE MCD BA GE GM F T V MA JPM"
).split()


def _symbol(draw: Draw) -> str:
    return draw.choice(_SYMBOLS)


def _clock(draw: Draw) -> str:
    return f"{draw.integer(6, 23)}:{draw.choice('012345')}{draw.choice('05')}"


def _items(draw: Draw) -> list[str]:
    return draw.sample(CATEGORIES["drinks"] + CATEGORIES["fruits"], draw.integer(1, 3))


def _city(draw: Draw) -> str:
    return _invented(draw).capitalize() or draw.choice(CITIES)


def _name(draw: Draw) -> str:
    return _invented(draw).capitalize() or draw.choice(FIRST_NAMES)


def _number(low: int, high: int) -> Callable[[Draw], int]:
    return lambda draw: draw.integer(low, high)


def _sum(draw: Draw) -> str:
    return f"{draw.integer(2, 99)} {draw.choice('+-*/')} {draw.integer(2, 99)}"


def _weather(draw: Draw, arguments: Arguments) -> tuple[str, str]:
    degrees = draw.integer(-9, 39)
    sky = draw.choice(("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear"))
    degrees_key = draw.choice(("temperature", "temp", "degrees", "temp_c"))
    sky_key = draw.choice(("condition", "sky", "weather", "conditions"))
    result = draw.choice(
        (
            f'{{"{degrees_key}": {degrees}, "{sky_key}": "{sky}"}}',
            f'{{"{sky_key}": "{sky}", "{degrees_key}": {degrees}}}',
            f"{degrees} degrees, {sky}",
            f"{sky}, {degrees} degrees",
        )
    )
    return result, f"It is {sky} with {degrees} degrees in {arguments['city']}."


def _value(
    answer: str, value: Callable[[Draw], Any], keys: tuple[str, ...]
) -> Callable[[Draw, Arguments], tuple[str, str]]:
    """An outcome of one value, bare or in an object; {value} is where the answer repeats it."""

    def outcome(draw: Draw, arguments: Arguments) -> tuple[str, str]:
        drawn = value(draw)
        key = draw.choice(keys)
        shown = f'"{drawn}"' if isinstance(drawn, str) else str(drawn)
        result = draw.choice((str(drawn), f'{{"{key}": {shown}}}'))
        return result, answer.format(value=drawn, **arguments)

    return outcome


def _done(answer: str) -> Callable[[Draw, Arguments], tuple[str, str]]:
    """An outcome that only says it worked."""

    def outcome(draw: Draw, arguments: Arguments) -> tuple[str, str]:
        result = draw.choice(("ok", "done", '{"status": "ok"}', '{"success": true}', "true"))
        return result, answer.format(**arguments)

    return outcome


def _switched(draw: Draw, arguments: Arguments) -> tuple[str, str]:
    state = "on" if arguments["on"] else "off"
    return draw.choice(("ok", "done", '{"status": "ok"}')), f"The light is {state}."


FAMILIES: tuple[Family, ...] = (
    Family(
        "the weather",
        "getWeather", "get check fetch show find read", "weather forecast",
        ("Get the weather", "Get the weather in a city", "Current weather for a location",
         "Get current weather information for a location"),
        (
            Parameter("city", ("city", "location", "place", "town", "city_name"), "string", _city),
            Parameter("days", ("days", "num_days"), "integer", _number(2, 9), " for {} days"),
            Parameter("unit", ("unit", "units"), "string",
                      lambda draw: draw.choice(("celsius", "fahrenheit")), " in {}",
                      ("celsius", "fahrenheit")),
        ),
        ("What is the weather in {city}?", "What's the weather like in {city}?",
         "How is the weather in {city}?", "Weather in {city}?", "Tell me the weather in {city}.",
         "Is it raining in {city}?", "How warm is it in {city}?", "Check the weather in {city}.",
         "What is the weather in {city} today?", "Do I need an umbrella in {city}?"),
        _weather,
        ("What is the weather in {0} and {1}?", "Compare the weather in {0} and in {1}.",
         "How is the weather in {0} and in {1}?"),
    ),
    Family(
        "a calculation",
        "calculate compute evaluate calc", "run use do start open", "calculation calculator math",
        ("Evaluate an expression", "Calculate", "A calculator", "Perform a calculation"),
        (Parameter("expression", ("expression", "expr", "formula", "input"), "string", _sum),),
        ("What is {expression}?", "Calculate {expression}.", "How much is {expression}?",
         "Use the calculator: {expression}", "Compute {expression}.", "{expression} = ?"),
        _value("{expression} = {value}", _number(2, 9999), ("result", "value", "answer")),
    ),
    Family(
        "a product",
        "multiply multiply_numbers multiply_two", "get find give make", "product multiplication",
        ("Multiply two numbers", "The product of two numbers"),
        (
            Parameter("a", ("a", "x", "first"), "integer", _number(2, 99)),
            Parameter("b", ("b", "y", "second"), "integer", _number(2, 99)),
        ),
        ("Multiply {a} by {b}.", "What is {a} times {b}?", "Multiply {a} and {b}."),
        _value("{a} times {b} is {value}.", _number(2, 9999), ("result", "product")),
    ),
    Family(
        "a search",
        "web_search search_web search_docs find_pages", "run do start make use", "search websearch",
        ("Search the web", "Search for documents", "Find pages about something"),
        (
            Parameter("query", ("query", "q", "text", "search_query"), "string", _phrase),
            Parameter("limit", ("limit", "top_k", "max_results"), "integer", _number(2, 20),
                      ", {} results"),
        ),
        ('Search for "{query}"', 'Find pages about "{query}"', 'Look up "{query}"', 'Search: "{query}"',
         'Search the web for "{query}"'),
        _value("I found this: {value}", _phrase, ("title", "result", "page")),
        ('Search for "{0}" and then for "{1}"', 'Look up "{0}" and also "{1}"'),
    ),
    Family(
        "the time",
        "now", "get show read tell check", "time clock",
        ("Get the time", "The current time", "Get the current time"),
        (),
        ("What time is it?", "What is the time?", "Tell me the time.", "Time?",
         "What time is it now?", "Can you tell me the time?"),
        _value("It is {value}.", _clock, ("time", "now")),
    ),
    Family(
        "the date",
        "today", "get show read tell check", "date day",
        ("Get the date", "The date of today"),
        (),
        ("What day is it?", "What is the date today?", "Tell me the date.", "Which date is today?"),
        _value("Today is {value}.",
               lambda draw: f"{draw.integer(1, 28)} {draw.choice(CATEGORIES['months'])}",
               ("date", "today")),
    ),
    Family(
        "the battery level",
        "battery_level battery_percent", "get check read show fetch", "battery charge",
        ("Get the battery level", "Battery level in percent"),
        (),
        ("How full is the battery?", "What is the battery level?", "Check the battery.",
         "How much battery is left?"),
        _value("The battery is at {value} percent.", _number(1, 99), ("level", "percent")),
    ),
    Family(
        "a roll of the dice",
        "roll", "roll throw cast toss shake", "dice die",
        ("Roll a die", "Throw a die"),
        (),
        ("Roll a die.", "Throw the dice.", "Roll the dice for me.", "Please roll a die."),
        _value("You got a {value}.", _number(1, 6), ("value", "roll")),
    ),
    Family(
        "a message sent",
        "notify", "send write post type", "message text sms",
        ("Send a message", "Send a text to a person"),
        (
            Parameter("to", ("to", "recipient", "person", "name"), "string", _name),
            Parameter("text", ("text", "message", "body", "content"), "string", _phrase),
        ),
        ('Send {to} the message: "{text}"', 'Text {to}: "{text}"', 'Tell {to} this: "{text}"',
         'Write to {to}: "{text}"'),
        _done("I sent the message to {to}."),
    ),
    Family(
        "a timer",
        "", "set start create add make", "timer alarm countdown",
        ("Set a timer", "Start a timer in minutes"),
        (Parameter("minutes", ("minutes", "duration", "mins"), "integer", _number(1, 90)),),
        ("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.",
         "Timer for {minutes} minutes, please.", "Wake me in {minutes} minutes."),
        _done("The timer is set for {minutes} minutes."),
    ),
    Family(
        "a stock price",
        "share_price", "get fetch check show find", "price quote",
        ("Get a stock price", "The price of a stock"),
        (Parameter("symbol", ("symbol", "ticker", "stock"), "string", _symbol),),
        ("What is the price of {symbol}?", "How much is {symbol} stock?", "Price of {symbol}?",
         "Get the stock price of {symbol}."),
        _value("{symbol} costs {value}.", _number(2, 999), ("price", "usd", "value")),
        ("What are the prices of {0} and {1}?", "Get the price of {0} and of {1}."),
    ),
    Family(
        "a translation",
        "translate translate_text", "get make do create", "translation translator",
        ("Translate text", "Translate text to a language"),
        (
            Parameter("text", ("text", "input", "phrase"), "string", _phrase),
            Parameter("language", ("language", "target", "to", "lang"), "string",
                      lambda draw: draw.choice(COUNTRIES).language),
        ),
        ('Translate "{text}" to {language}', 'Say "{text}" in {language}',
         'How do you say "{text}" in {language}?'),
        _value("In {language} it is: {value}", _phrase, ("translation", "result")),
    ),
    Family(
        "money converted",
        "convert", "convert exchange change swap", "currency money cash",
        ("Convert money", "Convert an amount to another currency"),
        (
            Parameter("amount", ("amount", "value"), "number",
                      lambda draw: draw.choice((draw.integer(1, 99), draw.integer(1, 9) + 0.5))),
            Parameter("source", ("from", "source", "from_currency"), "string",
                      lambda draw: draw.choice(("USD", "EUR", "GBP", "JPY"))),
            Parameter("target", ("to", "target", "to_currency"), "string",
                      lambda draw: draw.choice(("CHF", "SEK", "INR", "CNY"))),
        ),
        ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?"),
        _value("{amount} {source} is {value} {target}.", _number(1, 9999), ("amount", "result")),
    ),
    Family(
        "a light switched",
        "", "set switch turn control", "light lamp lights",
        ("Switch a light", "Turn a light on or off"),
        (
            Parameter("room", ("room", "area", "where"), "string",
                      lambda draw: draw.choice(ROOMS)),
            Parameter("on", ("on", "enabled", "state"), "boolean",
                      lambda draw: draw.chance(0.5)),
        ),
        ("Turn {on} the light in the {room}.", "Switch the {room} light {on}.",
         "Light {on} in the {room}, please."),
        _switched,
    ),
    Family(
        "an event",
        "schedule", "create add make plan", "event appointment meeting",
        ("Create an event", "Add an event to the calendar"),
        (
            Parameter("title", ("title", "name", "event"), "string", _phrase),
            Parameter("time", ("time", "start", "at"), "string", _clock),
        ),
        ('Create the event "{title}" at {time}.', 'Put "{title}" in my calendar at {time}.',
         'Add "{title}" at {time}.'),
        _done("I added {title} at {time}."),
    ),
    Family(
        "a shopping list",
        "shopping_list", "add put update extend", "items groceries list",
        ("Add items to the shopping list", "Add items to a list"),
        (Parameter("items", ("items", "products", "things"), "array", _items),),
        ("Add {items} to my shopping list.", "Put {items} on the list.", "I need to buy {items}."),
        _done("I added {items}."),
    ),
    Family(
        "the stock",
        "", "count check get show fetch", "stock inventory",
        ("Count what is in stock", "How many of a thing are in stock"),
        (Parameter("item", ("item", "product", "thing"), "string",
                   lambda draw: draw.choice(THINGS + CATEGORIES["fruits"])),),
        ("How many {item} do we have in stock?", "Are there {item} in stock?",
         "Check the stock of {item}."),
        _value("There are {value} {item} in stock.", _number(0, 99), ("count", "in_stock")),
        ("How many {0} and how many {1} do we have in stock?",),
    ),
)  # fmt: skip
