"""Days, months, seasons, and how many of one make another."""

from __future__ import annotations

from chroma_jax.synthesis.world.family import Family
from chroma_jax.synthesis.world.numbers import words

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]  # fmt: skip
SEASONS = ["spring", "summer", "autumn", "winter"]
_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"]  # fmt: skip


def _circle(names: list[str], step: int) -> tuple[dict[str, str], ...]:
    return tuple({"a": a, "b": names[(i + step) % len(names)]} for i, a in enumerate(names))


def _after(name: str, kind: str, names: list[str], share: float) -> Family:
    return Family(
        name=name,
        share=share,
        facts=_circle(names, 1),
        phrasings=(
            f"Which {kind} comes after {{a}}?",
            f"What {kind} comes after {{a}}?",
            f"What is the {kind} after {{a}}?",
            f"What {kind} follows {{a}}?",
            "What comes after {a}?",
        ),
        held_phrasings=(f"Which {kind} follows {{a}}?",),
        says="After {a} comes {b}.",
        follow_ups=("And after {a}?",),
    )


def _before(name: str, kind: str, names: list[str], share: float) -> Family:
    return Family(
        name=name,
        share=share,
        facts=_circle(names, -1),
        phrasings=(
            f"Which {kind} comes before {{a}}?",
            f"What {kind} comes before {{a}}?",
            f"What is the {kind} before {{a}}?",
            "What comes before {a}?",
        ),
        held_phrasings=(f"Which {kind} is before {{a}}?",),
        says="Before {a} comes {b}.",
        follow_ups=("And before {a}?",),
    )


def _season(month: int) -> str:
    return SEASONS[(month - 2) % 12 // 3]


FAMILIES = (
    _after("day after", "day", DAYS, 2),
    _before("day before", "day", DAYS, 2),
    _after("month after", "month", MONTHS, 2),
    _before("month before", "month", MONTHS, 2),
    _after("season after", "season", SEASONS, 1),
    _before("season before", "season", SEASONS, 1),
    Family(
        name="tomorrow",
        share=1.5,
        facts=_circle(DAYS, 1),
        phrasings=(
            "If today is {a}, what is tomorrow?",
            "Today is {a}. What day is tomorrow?",
            "Today is {a}. What is tomorrow?",
        ),
        held_phrasings=("It is {a} today. What day is tomorrow?",),
        says="Tomorrow is {b}.",
    ),
    Family(
        name="yesterday",
        share=1.5,
        facts=_circle(DAYS, -1),
        phrasings=(
            "If today is {a}, what was yesterday?",
            "Today is {a}. What day was yesterday?",
            "Today is {a}. What was yesterday?",
        ),
        held_phrasings=("It is {a} today. What day was yesterday?",),
        says="Yesterday was {b}.",
    ),
    Family(
        name="season",
        share=1.5,
        facts=tuple({"a": m, "b": _season(i)} for i, m in enumerate(MONTHS)),
        phrasings=(
            "In which season is {a}?",
            "Which season is {a} in?",
            "What season is it in {a}?",
            "What season is {a} in?",
        ),
        held_phrasings=("To which season does {a} belong?",),
        says="{a} is in {b}.",
        follow_ups=("And {a}?",),
    ),
    Family(
        name="month length",
        share=1.5,
        facts=tuple({"a": m, "b": words(n)} for m, n in zip(MONTHS, _LENGTHS, strict=True)),
        phrasings=(
            "How many days has {a}?",
            "How many days are in {a}?",
            "How many days does {a} have?",
            "How long is {a}?",
        ),
        held_phrasings=("How many days are there in {a}?",),
        says="{a} has {b} days.",
        follow_ups=("And {a}?",),
    ),
    Family(
        name="month number",
        share=1.5,
        facts=tuple({"a": o, "b": m} for o, m in zip(_ORDINALS, MONTHS, strict=True)),
        phrasings=(
            "What is the {a} month of the year?",
            "Which is the {a} month?",
            "Which month is the {a}?",
            "Name the {a} month of the year.",
        ),
        held_phrasings=("Which month is the {a} of the year?",),
        says="The {a} month is {b}.",
        follow_ups=("And the {a}?",),
    ),
    Family(
        name="day number",
        share=1,
        facts=tuple({"a": o, "b": d} for o, d in zip(_ORDINALS, DAYS, strict=False)),
        phrasings=(
            "What is the {a} day of the week?",
            "Which day is the {a} of the week?",
            "Name the {a} day of the week.",
        ),
        held_phrasings=("Which is the {a} day of the week?",),
        says="The {a} day is {b}.",
    ),
    Family(
        name="measure of time",
        share=2,
        facts=tuple(
            {"part": part, "whole": whole, "n": words(n)}
            for part, whole, n in (
                ("seconds", "a minute", 60),
                ("minutes", "an hour", 60),
                ("hours", "a day", 24),
                ("days", "a week", 7),
                ("weeks", "a year", 52),
                ("months", "a year", 12),
                ("days", "a year", 365),
                ("seasons", "a year", 4),
                ("years", "a century", 100),
                ("years", "a decade", 10),
                ("minutes", "half an hour", 30),
                ("hours", "two days", 48),
                ("days", "two weeks", 14),
                ("months", "two years", 24),
            )
        ),
        phrasings=(
            "How many {part} are in {whole}?",
            "How many {part} has {whole}?",
            "How many {part} does {whole} have?",
            "Tell me how many {part} are in {whole}.",
        ),
        held_phrasings=("How many {part} are there in {whole}?",),
        says="There are {n} {part} in {whole}.",
    ),
)
