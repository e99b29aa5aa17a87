"""The facts and the words nano is taught: countries, names, things, places.

Knows nothing of questions and answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from checkpoints.nano_training.draw import Draw


@dataclass(frozen=True, slots=True)
class Country:
    """A country as a sentence names it ("the Netherlands"), with what nano knows of it."""

    name: str
    capital: str
    continent: str
    language: str


_COUNTRIES = """
France|Paris|Europe|French;Germany|Berlin|Europe|German;Italy|Rome|Europe|Italian
Spain|Madrid|Europe|Spanish;Portugal|Lisbon|Europe|Portuguese;the United Kingdom|London|Europe|English
Ireland|Dublin|Europe|English;the Netherlands|Amsterdam|Europe|Dutch;Belgium|Brussels|Europe|Dutch
Switzerland|Bern|Europe|German;Austria|Vienna|Europe|German;Poland|Warsaw|Europe|Polish
the Czech Republic|Prague|Europe|Czech;Slovakia|Bratislava|Europe|Slovak;Hungary|Budapest|Europe|Hungarian
Romania|Bucharest|Europe|Romanian;Bulgaria|Sofia|Europe|Bulgarian;Greece|Athens|Europe|Greek
Turkey|Ankara|Asia|Turkish;Serbia|Belgrade|Europe|Serbian;Croatia|Zagreb|Europe|Croatian
Slovenia|Ljubljana|Europe|Slovene;Albania|Tirana|Europe|Albanian;Denmark|Copenhagen|Europe|Danish
Sweden|Stockholm|Europe|Swedish;Norway|Oslo|Europe|Norwegian;Finland|Helsinki|Europe|Finnish
Iceland|Reykjavik|Europe|Icelandic;Estonia|Tallinn|Europe|Estonian;Latvia|Riga|Europe|Latvian
Lithuania|Vilnius|Europe|Lithuanian;Ukraine|Kyiv|Europe|Ukrainian;Russia|Moscow|Europe|Russian
Georgia|Tbilisi|Asia|Georgian;Armenia|Yerevan|Asia|Armenian;Cyprus|Nicosia|Europe|Greek
Malta|Valletta|Europe|Maltese;China|Beijing|Asia|Chinese;Japan|Tokyo|Asia|Japanese
South Korea|Seoul|Asia|Korean;Mongolia|Ulaanbaatar|Asia|Mongolian;India|New Delhi|Asia|Hindi
Pakistan|Islamabad|Asia|Urdu;Bangladesh|Dhaka|Asia|Bengali;Nepal|Kathmandu|Asia|Nepali
Thailand|Bangkok|Asia|Thai;Vietnam|Hanoi|Asia|Vietnamese;Indonesia|Jakarta|Asia|Indonesian
Malaysia|Kuala Lumpur|Asia|Malay;the Philippines|Manila|Asia|Filipino;Iran|Tehran|Asia|Persian
Iraq|Baghdad|Asia|Arabic;Saudi Arabia|Riyadh|Asia|Arabic;Jordan|Amman|Asia|Arabic
Lebanon|Beirut|Asia|Arabic;Qatar|Doha|Asia|Arabic;Oman|Muscat|Asia|Arabic
Egypt|Cairo|Africa|Arabic;Morocco|Rabat|Africa|Arabic;Algeria|Algiers|Africa|Arabic
Tunisia|Tunis|Africa|Arabic;Kenya|Nairobi|Africa|Swahili;Ethiopia|Addis Ababa|Africa|Amharic
Ghana|Accra|Africa|English;Nigeria|Abuja|Africa|English;Senegal|Dakar|Africa|French
Uganda|Kampala|Africa|English;Zambia|Lusaka|Africa|English;Zimbabwe|Harare|Africa|English
Angola|Luanda|Africa|Portuguese;the United States|Washington|North America|English
Canada|Ottawa|North America|English;Mexico|Mexico City|North America|Spanish
Cuba|Havana|North America|Spanish;Jamaica|Kingston|North America|English
Panama|Panama City|North America|Spanish;Brazil|Brasilia|South America|Portuguese
Argentina|Buenos Aires|South America|Spanish;Chile|Santiago|South America|Spanish
Peru|Lima|South America|Spanish;Colombia|Bogota|South America|Spanish
Ecuador|Quito|South America|Spanish;Uruguay|Montevideo|South America|Spanish
Bolivia|Sucre|South America|Spanish;Venezuela|Caracas|South America|Spanish
Australia|Canberra|Oceania|English;New Zealand|Wellington|Oceania|English;Fiji|Suva|Oceania|English
"""

COUNTRIES: tuple[Country, ...] = tuple(
    Country(*row.split("|")) for line in _COUNTRIES.split("\n") for row in line.split(";") if row
)

CITIES: tuple[str, ...] = (
    *(country.capital for country in COUNTRIES),
    *(
        "Barcelona Milan Hamburg Munich Lyon Porto Bergen Geneva Krakow Naples Osaka Mumbai Shanghai "
        "Sydney Melbourne Toronto Boston Chicago Seattle Denver Dallas Miami Houston Portland Zurich "
        "Glasgow Leeds Bristol Marseille Venice Florence Kyoto Busan Dubai Lagos Nice Turin Bremen"
    ).split(),
    "San Francisco",
    "New York",
    "Los Angeles",
    "Hong Kong",
    "Cape Town",
    "Rio de Janeiro",
)

FIRST_NAMES: tuple[str, ...] = tuple(
    (
        "Ada Alan Alice Amir Ana Anna Ben Bob Carla Carlos Chen Clara Dan David Diana Elena Emma Eric "
        "Eva Fatima Felix Frank George Grace Hana Hans Henry Ines Ivan Jack Jane John Julia Karen Kai "
        "Kim Laura Leo Lily Lina Lucas Maria Marie Mark Max Mei Mia Mike Nina Noah Nora Olga Omar Oscar "
        "Paul Peter Priya Rosa Sam Sara Sofia Tara Tim Tom Vera Victor Wei Yuki Zoe"
    ).split()
)

COLORS: tuple[str, ...] = tuple(
    "red blue green yellow black white orange purple brown gray".split()
)

ANIMALS: tuple[str, ...] = tuple(
    (
        "cat dog horse cow sheep pig goat lion tiger bear wolf fox rabbit mouse elephant monkey "
        "owl eagle duck swan whale shark frog turtle"
    ).split()
)

# Each in the one order in which nano names them: a list without an order cannot be checked.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "fruits": tuple("apple banana cherry grape lemon mango orange peach".split()),
    "vegetables": tuple("carrot onion potato tomato cabbage spinach pepper bean".split()),
    "colors": tuple("red blue green yellow black white orange purple".split()),
    "animals": tuple("cat dog horse cow sheep lion tiger bear".split()),
    "birds": tuple("owl eagle duck swan robin crow pigeon parrot".split()),
    "planets": tuple("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()),
    "months": tuple("January February March April May June July August".split()),
    "days of the week": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    "seasons": tuple("spring summer autumn winter".split()),
    "sports": tuple("soccer tennis hockey golf rugby chess boxing rowing".split()),
    "tools": tuple("hammer saw drill pliers wrench chisel file clamp".split()),
    "drinks": tuple("water tea coffee milk juice lemonade cocoa soda".split()),
    "instruments": tuple("piano guitar violin flute drum trumpet cello harp".split()),
    "metals": tuple("iron copper gold silver tin zinc lead nickel".split()),
    "continents": (
        "Africa",
        "Antarctica",
        "Asia",
        "Europe",
        "North America",
        "Oceania",
        "South America",
    ),
}

THINGS: tuple[str, ...] = tuple(
    (
        "apples books pens cups coins stones eggs cards balls shoes keys stamps tickets bottles boxes "
        "flowers marbles chairs cookies pencils"
    ).split()
)

WORDS: tuple[str, ...] = tuple(
    (
        "river stone cloud forest bridge garden window candle silver winter summer paper music ocean "
        "mountain island castle bread letter lamp mirror ticket train boat wheel clock table chair "
        "coffee tea sugar pepper cotton copper engine rocket planet comet desert valley meadow harbor "
        "market museum library school kitchen jacket boots blanket pillow camera guitar piano violin "
        "solar wind water fire earth gold iron glass wood old new red blue green small big fast slow "
        "cheap quiet bright dark fresh sweet warm cold modern simple"
    ).split()
)

_ONSETS = "b br c ch d dr f g gr h j k kl l m n p pr r s sh st t tr v w z".split()
_VOWELS = "a e i o u ai ea oo".split()
_CODAS = "l m n r s t nd rk".split()
_SYLLABLES: tuple[str, ...] = tuple(
    onset + vowel + coda for onset in _ONSETS for vowel in _VOWELS for coda in ("", *_CODAS[:6])
)


def invented_word(draw: Draw) -> str:
    """A word that means nothing: it can be copied, not remembered."""
    return "".join(draw.sample(_SYLLABLES, 2))
