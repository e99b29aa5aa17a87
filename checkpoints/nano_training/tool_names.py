"""What tools are called: names made of a verb and a noun that say what a tool does, and names that do not.

Knows which of them training never sees; what a tool does is tool_catalog's.
"""

from __future__ import annotations

from functools import cache

from checkpoints.nano_training.draw import Draw, is_held_out
from checkpoints.nano_training.tool_catalog import Family
from checkpoints.nano_training.world import WORDS, invented_word

# What everyone tries first, so it comes often and is never held out.
FAMOUS = "get_weather"
_ENDINGS = "lookup info service tool request job".split()


@cache
def telling_names(family: Family, *, unseen: bool) -> tuple[str, ...]:
    """The family's names, those that training uses or those that it does not.

    Unseen is a name as a whole: its words occur in other names of the family.
    """
    verbs, nouns = family.verbs.split(), family.nouns.split()
    names = [f"{verb}_{noun}" for noun in nouns for verb in verbs]
    names += [f"{noun}_{ending}" for noun in nouns for ending in _ENDINGS]
    kept = [name for name in names if name != FAMOUS and is_held_out("tool function", name)]
    if unseen:
        return tuple(kept)
    # A word alone is as likely as the names that a verb makes of it.
    single = [*family.names.split(), *nouns]
    return tuple(name for name in (*names, *single, *single) if name not in kept)


def made_up_name(draw: Draw, *, unseen: bool) -> str:
    """Two or three words that say nothing; whether training may use them is decided by the words."""
    while True:
        words = draw.sample(WORDS, draw.weighted({2: 3, 3: 1}))
        if draw.chance(0.3):
            words[-1] = invented_word(draw)
        if is_held_out("tool name", *words) == unseen:
            return "_".join(words)
