"""Questions about countries: capitals, continents, languages.

Knows the phrasings, and which of them training never sees.
"""

from __future__ import annotations

from collections.abc import Callable

from checkpoints.nano_training.conversation import Check, Exchange, answer
from checkpoints.nano_training.draw import Draw
from checkpoints.nano_training.world import CITIES, COUNTRIES, Country, invented_word

CAPITAL_PHRASINGS: tuple[str, ...] = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "What is the capital city of {}?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Name the capital of {}.",
    "Capital of {}?",
    "Give me the capital of {}.",
    "What city is the capital of {}?",
    "I need the capital of {}.",
    "The capital of {} is which city?",
    "Can you tell me the capital of {}?",
    "Do you know the capital of {}?",
    "What do we call the capital of {}?",
    "For {}, what is the capital?",
    "{}: what is its capital?",
    "What is the name of the capital of {}?",
    "Which city is {}'s capital?",
    "What is {}'s capital?",
    "What is {}'s capital city?",
    "I am going to {}. What is its capital?",
    "My friend lives in {}. What is the capital there?",
    "Quiz: the capital of {}?",
    "Please name the capital city of {}.",
    "Where is the government of {}? Name the capital.",
    "Which capital belongs to {}?",
)
UNSEEN_CAPITAL_PHRASINGS: tuple[str, ...] = (
    "Can you name the capital of {}?",
    "Which city is the capital city of {}?",
    "Do you know what the capital of {} is?",
    "Please tell me the name of the capital of {}.",
    "I want to know the capital of {}.",
    "Tell me, what is {}'s capital city?",
    "What city do we call the capital of {}?",
    "My friend is going to {}. What is its capital city?",
)
_COUNTRY_OF = (
    "Which country has {} as its capital?",
    "{} is the capital of which country?",
    "Of which country is {} the capital?",
    "What country is {} the capital of?",
    "In which country is {}?",
    "Where is {}?",
)
_CONTINENT = (
    "On which continent is {}?",
    "Which continent is {} on?",
    "What continent is {} in?",
    "Is {} in Europe, Asia, Africa, America or Oceania?",
    "Name the continent of {}.",
)
_LANGUAGE = (
    "What language do people speak in {}?",
    "Which language is spoken in {}?",
    "What do people in {} speak?",
    "Name the language of {}.",
)


def ask_geography(draw: Draw) -> Exchange:
    """One question about a country."""
    ask: Callable[[Draw], Exchange] = draw.weighted(
        {ask_capital: 6, _country_of: 1, _continent: 1, _language: 1, _yes_or_no: 1, _two: 1,
         _unknown: 0.4}
    )  # fmt: skip
    return ask(draw)


def ask_capital(draw: Draw) -> Exchange:
    """The capital of a country; held out: phrasings, and pairs of phrasing and country."""
    if draw.held_out and draw.chance(0.7):
        country, phrasing = draw.choice(COUNTRIES), draw.choice(UNSEEN_CAPITAL_PHRASINGS)
        skill = "capitals, unseen phrasing"
    else:
        country, phrasing = _combination(draw, CAPITAL_PHRASINGS)
        skill = "capitals"
    return answer(
        skill,
        _fill(draw, phrasing, country.name),
        f"The user asks for the capital of {country.name}. It is {country.capital}.",
        f"The capital of {country.name} is {country.capital}.",
        Check(contains=(country.capital,)),
    )


def _country_of(draw: Draw) -> Exchange:
    country, phrasing = _combination(draw, _COUNTRY_OF)
    return answer(
        "geography",
        _fill(draw, phrasing, country.capital),
        f"{country.capital} is a capital. The country is {country.name}.",
        f"{country.capital} is the capital of {country.name}.",
        Check(contains=(country.name,)),
    )


def _continent(draw: Draw) -> Exchange:
    country, phrasing = _combination(draw, _CONTINENT)
    return answer(
        "geography",
        _fill(draw, phrasing, country.name),
        f"The user asks for the continent of {country.name}. It is {country.continent}.",
        f"{_capitalized(country.name)} is in {country.continent}.",
        Check(contains=(country.continent,)),
    )


def _language(draw: Draw) -> Exchange:
    country, phrasing = _combination(draw, _LANGUAGE)
    return answer(
        "geography",
        _fill(draw, phrasing, country.name),
        f"The user asks for the language of {country.name}. It is {country.language}.",
        f"People in {country.name} speak {country.language}.",
        Check(contains=(country.language,)),
    )


def _yes_or_no(draw: Draw) -> Exchange:
    while True:
        country = draw.choice(COUNTRIES)
        city = country.capital if draw.chance(0.5) else draw.choice(CITIES)
        if draw.admits("is capital", country.name, city):
            break
    yes = city == country.capital
    statement = f"the capital of {country.name} is {country.capital}."
    return answer(
        "geography",
        draw.casual(f"Is {city} the capital of {country.name}?"),
        f"{_capitalized(statement)} The user says {city}. "
        + ("That is right." if yes else "That is wrong."),
        ("Yes, " if yes else "No, ") + statement,
        Check(contains=("Yes" if yes else "No", country.capital)),
    )


def _two(draw: Draw) -> Exchange:
    while True:
        first, second = draw.sample(COUNTRIES, 2)
        if draw.admits("two capitals", first.name, second.name):
            break
    phrasing = draw.choice(
        (
            "What are the capitals of {} and {}?",
            "Name the capitals of {} and {}.",
            "Tell me the capitals of {} and {}.",
        )
    )
    return answer(
        "geography",
        draw.casual(phrasing.format(first.name, second.name)),
        f"{_capitalized(first.name)}: {first.capital}. {_capitalized(second.name)}: {second.capital}.",
        f"The capital of {first.name} is {first.capital}, "
        f"and the capital of {second.name} is {second.capital}.",
        Check(contains=(first.capital, second.capital)),
    )


def _unknown(draw: Draw) -> Exchange:
    """A country that does not exist: the answer says so."""
    while True:
        place = invented_word(draw).capitalize()
        if draw.admits("no such country", place):
            break
    return answer(
        "geography",
        draw.choice(CAPITAL_PHRASINGS).format(place),
        f"The user asks for the capital of {place}. I do not know that country.",
        f"I do not know a country called {place}.",
        Check(contains=("do not know", place)),
    )


def _combination(draw: Draw, phrasings: tuple[str, ...]) -> tuple[Country, str]:
    while True:
        country, phrasing = draw.choice(COUNTRIES), draw.choice(phrasings)
        if draw.admits(phrasing, country.name):
            return country, phrasing


def _fill(draw: Draw, phrasing: str, name: str) -> str:
    return draw.casual(_capitalized(phrasing.format(name)))


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
