"""Animals: what they say, their young, their legs, where they live."""

from __future__ import annotations

from chroma_jax.synthesis.world.family import Family


def _facts(table: str) -> tuple[dict[str, str], ...]:
    rows = (entry.split() for entry in table.replace("\n", " ").split(";"))
    return tuple(
        {"a": a, "an": f"an {a}" if a[0] in "aeiou" else f"a {a}", "b": b.replace("_", " ")}
        for a, b in rows
    )


_SOUNDS = """
dog barks; cat meows; cow moos; sheep bleats; goat bleats; horse neighs; pig grunts; duck quacks; hen clucks; rooster crows;
lion roars; tiger roars; wolf howls; snake hisses; bee buzzes; fly buzzes; frog croaks; owl hoots; mouse squeaks; donkey brays;
elephant trumpets; bird sings; crow caws; turkey gobbles; goose honks; dove coos; cricket chirps; bear growls; parrot talks;
monkey chatters; seal barks
"""
_YOUNG = """
dog a_puppy; cat a_kitten; cow a_calf; sheep a_lamb; goat a_kid; horse a_foal; pig a_piglet; duck a_duckling; hen a_chick;
lion a_cub; bear a_cub; wolf a_pup; goose a_gosling; frog a_tadpole; deer a_fawn; owl an_owlet; kangaroo a_joey; elephant a_calf;
whale a_calf; seal a_pup; butterfly a_caterpillar; swan a_cygnet
"""
_LEGS = """
dog four; cat four; cow four; horse four; sheep four; spider eight; ant six; bee six; fly six; beetle six; butterfly six;
bird two; duck two; hen two; goose two; snake no; fish no; worm no; frog four; lion four; elephant four; mouse four; ostrich two;
penguin two; crab ten; scorpion eight; octopus no
"""
_HOMES = """
fish in_the_water; whale in_the_sea; shark in_the_sea; camel in_the_desert; penguin in_the_ice; bee in_a_hive; bird in_a_nest;
lion in_the_grassland; monkey in_the_forest; frog in_the_pond; cow on_a_farm; pig on_a_farm; mole under_the_ground; ant in_a_hill;
spider in_a_web; bat in_a_cave; fox in_a_den; rabbit in_a_burrow; dolphin in_the_sea; owl in_the_forest; sheep on_a_farm;
crab on_the_beach; goat on_the_mountain; horse in_a_stable; dog in_a_house
"""
_FOLLOW = ("And the {a}?", "And what about the {a}?")

FAMILIES = (
    Family(
        name="animal sound",
        share=4,
        facts=_facts(_SOUNDS),
        phrasings=(
            "What does the {a} do?",
            "What sound does {an} make?",
            "What noise does the {a} make?",
            "Which sound does the {a} make?",
            "How does the {a} sound?",
        ),
        held_phrasings=("Tell me the sound of the {a}.",),
        says="The {a} {b}.",
        follow_ups=_FOLLOW,
    ),
    Family(
        name="young animal",
        share=3,
        facts=_facts(_YOUNG),
        phrasings=(
            "What is the young of {an} called?",
            "What do you call a young {a}?",
            "What is a baby {a} called?",
            "What is a young {a} called?",
        ),
        held_phrasings=("What do you call a baby {a}?",),
        says="A young {a} is {b}.",
        follow_ups=("And a young {a}?",),
    ),
    Family(
        name="legs",
        share=3,
        facts=_facts(_LEGS),
        phrasings=(
            "How many legs has {an}?",
            "How many legs does {an} have?",
            "How many legs does the {a} have?",
            "On how many legs does the {a} walk?",
        ),
        held_phrasings=("Tell me how many legs {an} has.",),
        says="{an} has {b} legs.",
        follow_ups=_FOLLOW,
    ),
    Family(
        name="home",
        share=3,
        facts=_facts(_HOMES),
        phrasings=(
            "Where does the {a} live?",
            "Where does {an} live?",
            "Where is the home of the {a}?",
            "Where can I find {an}?",
        ),
        held_phrasings=("Tell me where the {a} lives.",),
        says="The {a} lives {b}.",
        follow_ups=_FOLLOW,
    ),
)
