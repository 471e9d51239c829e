"""Opposites, colours, the letters of words and of the alphabet, what things are for."""

from __future__ import annotations

import itertools
import string

from chroma_jax.synthesis.world.family import Family


def _pairs(table: str) -> list[tuple[str, str]]:
    rows = (entry.split() for entry in table.replace("\n", " ").split(";"))
    return [(a.replace("_", " "), b.replace("_", " ")) for a, b in rows]


_OPPOSITES = """
big small; hot cold; up down; in out; on off; left right; day night; black white; good bad; fast slow; high low; new old; wet dry;
hard soft; light dark; loud quiet; long short; happy sad; open closed; early late; full empty; strong weak; rich poor; thick thin;
wide narrow; clean dirty; easy difficult; first last; near far; young old; deep shallow; heavy light; sweet sour; true false; yes no;
above below; before after; always never; front back; inside outside; begin end; push pull; give take; come go; love hate;
win lose; buy sell; laugh cry; remember forget; ask answer; north south; east west; summer winter; morning evening; friend enemy;
war peace; king queen; man woman; boy girl; brother sister; father mother; uncle aunt; husband wife; smooth rough; sharp blunt;
brave afraid; awake asleep; alive dead; more less; many few; everything nothing; everybody nobody; top bottom; sink swim; tall short;
safe dangerous; right wrong; cheap expensive; raw cooked; polite rude; tight loose; fresh stale; noisy silent; modern ancient
"""
_COLOURS = """
sky blue; grass green; snow white; coal black; blood red; banana yellow; tomato red; lemon yellow; milk white; sun yellow;
leaf green; sea blue; frog green; elephant grey; carrot orange; night black; cherry red; chocolate brown; cloud white; mouse grey;
pumpkin orange; swan white; crow black; gold yellow; rose red; cucumber green; strawberry red; wood brown; salt white; plum purple;
flamingo pink; pig pink; potato brown; pea green; lion yellow; ash grey; sugar white; polar_bear white; fire_engine red; honey yellow
"""
_MIXES = """
red_and_yellow orange; blue_and_yellow green; red_and_blue purple; black_and_white grey; red_and_white pink; yellow_and_red orange;
yellow_and_blue green; blue_and_red purple; white_and_black grey; white_and_red pink
"""
_SPELLED = [
    "cat",
    "dog",
    "sun",
    "moon",
    "red",
    "blue",
    "fish",
    "bird",
    "tree",
    "book",
    "hand",
    "milk",
    "bread",
    "house",
    "water",
    "apple",
    "green",
    "mouse",
    "horse",
    "chair",
    "table",
    "light",
    "night",
    "day",
    "star",
    "snow",
    "rain",
    "wind",
    "fire",
    "ice",
    "sea",
    "ship",
    "boat",
    "car",
    "bus",
    "train",
    "road",
    "bed",
    "door",
    "key",
    "cup",
    "tea",
    "egg",
    "jam",
    "nut",
    "hat",
    "coat",
    "shoe",
    "sock",
    "ring",
    "bell",
    "ball",
    "game",
    "king",
    "queen",
    "boy",
    "girl",
    "man",
    "baby",
    "name",
    "word",
    "song",
    "love",
    "time",
    "year",
    "week",
    "home",
    "farm",
    "cow",
    "pig",
    "hen",
    "duck",
    "goat",
    "lion",
    "tiger",
    "bear",
    "wolf",
    "fox",
    "frog",
    "bee",
    "ant",
    "fly",
    "leaf",
    "rose",
    "seed",
    "corn",
    "rice",
    "cake",
    "soup",
    "salt",
    "soap",
    "lamp",
    "desk",
    "pen",
    "ink",
    "map",
    "box",
    "bag",
    "pan",
    "pot",
    "fork",
    "spoon",
    "knife",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "yes",
    "no",
    "hello",
    "world",
]
_USES = """
pen writing; knife cutting; bed sleeping; chair sitting; cup drinking; car driving; book reading; broom sweeping; oven baking;
needle sewing; axe chopping; brush painting; drum music; phone calling; spoon eating; soap washing; scissors cutting; clock telling_time;
lamp giving_light; key opening_doors; boat crossing_water; umbrella keeping_dry; coat keeping_warm; hammer driving_nails; ladder climbing;
bicycle riding; camera taking_pictures; kettle boiling_water; towel drying; map finding_the_way
"""


def _plain(table: str) -> tuple[dict[str, str], ...]:
    return tuple({"a": a, "b": b} for a, b in _pairs(table))


def _both_ways(table: str) -> tuple[dict[str, str], ...]:
    """Each word once as what is asked: the first pair that has it decides."""
    found: dict[str, str] = {}
    for a, b in _pairs(table):
        found.setdefault(a, b)
    for a, b in _pairs(table):
        found.setdefault(b, a)
    return tuple({"a": a, "b": b} for a, b in found.items())


def _article(thing: str) -> str:
    if thing == "scissors":
        return "a pair of scissors"
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def _spelled(word: str) -> str:
    return ", ".join(word.upper())


_LETTERS = string.ascii_uppercase

FAMILIES = (
    Family(
        name="opposite",
        share=7,
        facts=_both_ways(_OPPOSITES),
        phrasings=(
            "What is the opposite of {a}?",
            "What's the opposite of {a}?",
            "Tell me the opposite of {a}.",
            "Which word is the opposite of {a}?",
            "Do you know the opposite of {a}?",
        ),
        held_phrasings=("Can you tell me the opposite of {a}?",),
        says="The opposite of {a} is {b}.",
        follow_ups=("And of {a}?", "And the opposite of {a}?"),
    ),
    Family(
        name="colour",
        share=4,
        facts=_plain(_COLOURS),
        phrasings=(
            "What color is the {a}?",
            "Which color is the {a}?",
            "What is the color of the {a}?",
            "Which color has the {a}?",
        ),
        held_phrasings=("Tell me the color of the {a}.",),
        says="The {a} is {b}.",
        follow_ups=("And the {a}?", "And what color is the {a}?"),
    ),
    Family(
        name="mix of colours",
        share=1,
        facts=_plain(_MIXES),
        phrasings=(
            "What do {a} make?",
            "Which color do {a} make?",
            "What color do you get from {a}?",
        ),
        held_phrasings=("If I mix {a}, what do I get?",),
        says="{a} make {b}.",
    ),
    Family(
        name="spelling",
        share=7,
        facts=tuple({"a": w, "b": _spelled(w)} for w in _SPELLED),
        phrasings=(
            "How do you spell {a}?",
            "Spell the word {a}.",
            "Can you spell {a}?",
            "Spell {a}, please.",
            "How is {a} spelled?",
        ),
        held_phrasings=("Please spell the word {a}.",),
        says="The letters are {b}.",
        follow_ups=("And {a}?",),
    ),
    Family(
        name="letter after",
        share=2,
        facts=tuple({"a": a, "b": b} for a, b in itertools.pairwise(_LETTERS)),
        phrasings=(
            "Which letter comes after {a}?",
            "What letter comes after {a}?",
            "What is the letter after {a}?",
        ),
        held_phrasings=("Which letter follows {a}?",),
        says="The letter after {a} is {b}.",
    ),
    Family(
        name="first letter",
        share=3,
        facts=tuple({"a": w, "b": w[0].upper()} for w in _SPELLED),
        phrasings=(
            "What is the first letter of {a}?",
            "With which letter does {a} begin?",
            "Which letter does {a} begin with?",
        ),
        held_phrasings=("What letter does {a} start with?",),
        says="{a} begins with {b}.",
    ),
    Family(
        name="use",
        share=3,
        facts=tuple({"a": _article(a), "b": b} for a, b in _pairs(_USES)),
        phrasings=(
            "What is {a} for?",
            "What is {a} used for?",
            "What do you use {a} for?",
            "What can I do with {a}?",
        ),
        held_phrasings=("Tell me what {a} is for.",),
        says="{a} is for {b}.",
        follow_ups=("And {a}?",),
    ),
)
