"""Numbers in words; sums, differences and products of those up to twenty; what comes before and after."""

from __future__ import annotations

from chroma_jax.evaluation.rules import TENS, UNITS
from chroma_jax.synthesis.world.family import Family, kept_apart

_SMALL = [*UNITS, TENS[0]]
_TENS = ["_", "_", *TENS]
TOP = 20


def words(n: int) -> str:
    """A number from 0 to 999 in words, as in "two hundred twenty-one"."""
    if not 0 <= n <= 999:
        raise ValueError(f"a number from 0 to 999 is wanted, got {n}")
    if n <= TOP:
        return _SMALL[n]
    if n < 100:
        return _TENS[n // 10] + (f"-{_SMALL[n % 10]}" if n % 10 else "")
    rest = f" {words(n % 100)}" if n % 100 else ""
    return f"{_SMALL[n // 100]} hundred{rest}"


def _pairs(kind: str) -> list[tuple[int, int]]:
    numbers = range(TOP + 1)
    return [(a, b) for a in numbers for b in numbers if kind != "difference" or a >= b]


def _facts(kind: str) -> tuple[dict[str, str], ...]:
    results = {"sum": lambda a, b: a + b, "difference": lambda a, b: a - b, "product": lambda a, b: a * b}  # fmt: skip
    return tuple(
        {"a": words(a), "b": words(b), "c": words(results[kind](a, b))} for a, b in _pairs(kind)
    )


def _held(kind: str) -> frozenset[int]:
    """Sums and differences: pairs in either order. Products: one order of a pair whose other order is trained."""

    def apart(a: int, b: int) -> bool:
        low, high = sorted((a, b))
        if not kept_apart(f"{kind}/{low}/{high}", 10):
            return False
        first = kept_apart(f"{kind}/{high}/{low}/order", 2)
        return kind != "product" or (a != b and (a < b) == first)

    return frozenset(i for i, (a, b) in enumerate(_pairs(kind)) if apart(a, b))


_SUM = Family(
    name="sum",
    share=14,
    facts=_facts("sum"),
    phrasings=(
        "What is {a} plus {b}?",
        "How much is {a} plus {b}?",
        "{a} plus {b}?",
        "What do {a} and {b} make?",
        "Can you add {a} and {b}?",
        "What is the sum of {a} and {b}?",
        "Tell me what {a} plus {b} is.",
        "Add {a} to {b}.",
    ),
    held_phrasings=("Please add {a} and {b} for me.", "How much do {a} and {b} make?"),
    says="{a} plus {b} is {c}.",
    held_facts=_held("sum"),
    follow_ups=("And {a} plus {b}?", "And what is {a} plus {b}?"),
)
_DIFFERENCE = Family(
    name="difference",
    share=10,
    facts=_facts("difference"),
    phrasings=(
        "What is {a} minus {b}?",
        "How much is {a} minus {b}?",
        "{a} minus {b}?",
        "What is {a} less {b}?",
        "Take {b} from {a}.",
        "Tell me what {a} minus {b} is.",
        "Can you take {b} from {a}?",
    ),
    held_phrasings=("If I take {b} from {a}, what is left?", "Please tell me {a} minus {b}."),
    says="{a} minus {b} is {c}.",
    held_facts=_held("difference"),
    follow_ups=("And {a} minus {b}?", "And what is {a} minus {b}?"),
)
_PRODUCT = Family(
    name="product",
    share=14,
    facts=_facts("product"),
    phrasings=(
        "What is {a} times {b}?",
        "How much is {a} times {b}?",
        "{a} times {b}?",
        "Can you multiply {a} by {b}?",
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
        "Tell me what {a} times {b} is.",
    ),
    held_phrasings=("Please multiply {a} by {b} for me.", "What does {a} times {b} make?"),
    says="{a} times {b} is {c}.",
    held_facts=_held("product"),
    follow_ups=("And {a} times {b}?", "And what is {a} times {b}?"),
)


def _neighbours(step: int) -> tuple[dict[str, str], ...]:
    return tuple({"a": words(n), "b": words(n + step)} for n in range(1, 100))


_HELD_NEIGHBOURS = frozenset(i for i in range(99) if kept_apart(f"neighbour/{i}", 12))
_AFTER = Family(
    name="number after",
    share=4,
    facts=_neighbours(1),
    phrasings=(
        "What comes after {a}?",
        "Which number comes after {a}?",
        "What number follows {a}?",
        "What is the next number after {a}?",
        "Tell me the number after {a}.",
    ),
    held_phrasings=("Which number follows {a}?",),
    says="After {a} comes {b}.",
    held_facts=_HELD_NEIGHBOURS,
    follow_ups=("And after {a}?",),
)
_BEFORE = Family(
    name="number before",
    share=4,
    facts=_neighbours(-1),
    phrasings=(
        "What comes before {a}?",
        "Which number comes before {a}?",
        "Which number is just before {a}?",
        "What number stands before {a}?",
        "Tell me the number before {a}.",
    ),
    held_phrasings=("What is the number just before {a}?",),
    says="Before {a} comes {b}.",
    held_facts=_HELD_NEIGHBOURS,
    follow_ups=("And before {a}?",),
)

FAMILIES = (_SUM, _DIFFERENCE, _PRODUCT, _AFTER, _BEFORE)
