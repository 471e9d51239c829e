"""A small world that is computed: a few thousand facts, many phrasings of each, and some of both kept apart for validation.

    script = write(number, split="train", seed=0)

What is kept apart for validation, and stands in a script's `apart`:

    phrasing      a known fact asked in words that are never trained
    fact          numbers that are never trained together
    combination   fact and phrasing are trained, never with each other

A row is a function of its number, its split and the seed alone.
"""

from __future__ import annotations

import random

from chroma_jax.synthesis.script import Line, Script
from chroma_jax.synthesis.world import animals, chat, countries, numbers, sentences, things, times
from chroma_jax.synthesis.world.family import (
    COMBINATION,
    FACT,
    PHRASING,
    TRAINED,
    Family,
    kept_apart,
)

FAMILIES: tuple[Family, ...] = (
    *numbers.FAMILIES,
    *countries.FAMILIES,
    *times.FAMILIES,
    *animals.FAMILIES,
    *things.FAMILIES,
    *chat.FAMILIES,
)
_FOLLOW_UPS = (
    0.12  # the share of rows that go on from an earlier question, where a family has such phrasings
)


def count_facts() -> int:
    """How many different facts there are."""
    return sum(len(family.facts) for family in FAMILIES)


def write(number: int, split: str, seed: int, reading: float = 0.0) -> Script:
    """Row `number` of a split.

    Args:
      number: of the row.
      split: "train" or "validation".
      seed: of everything that is drawn.
      reading: the share of rows that only say a given sentence; their request is written, not spoken.
    """
    rng = random.Random(f"{seed}/{split}/{number}")
    if rng.random() < reading:
        return _reading(rng, split)
    validation = split == "validation"
    families = [family for family in FAMILIES if family.apart or not validation]
    (family,) = rng.choices(families, [family.share for family in families])
    kind = rng.choice(family.apart) if validation else TRAINED
    fact, asked = family.draw(rng, kind)
    earlier: tuple[Line, ...] = ()
    if family.follow_ups and kind != PHRASING and rng.random() < _FOLLOW_UPS:
        before, how = family.draw(rng, TRAINED)
        if before != fact:
            earlier = (
                Line("user", family.question(before, how)),
                Line("assistant", family.answer(before)),
            )
            asked = rng.choice(family.follow_ups)
    return Script(
        turns=(*earlier, Line("user", family.question(fact, asked))),
        answer=family.answer(fact),
        split=split,
        kind=family.name,
        apart=kind if validation else "",
    )


def _reading(rng: random.Random, split: str) -> Script:
    text = sentences.draw(rng, split)
    return Script(
        turns=(Line("user", sentences.REQUEST.format(text=text), spoken=False),),
        answer=text,
        split=split,
        kind="reading",
        apart=COMBINATION if split == "validation" else "",
    )


__all__ = [
    "COMBINATION",
    "FACT",
    "FAMILIES",
    "PHRASING",
    "Family",
    "count_facts",
    "kept_apart",
    "write",
]
