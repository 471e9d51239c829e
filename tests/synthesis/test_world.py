"""The program of facts: right, repeatable, and what is kept apart is never trained."""

import re

import pytest

from chroma_jax.synthesis import filters, world
from chroma_jax.synthesis.config import FilterConfig
from chroma_jax.synthesis.world import countries, numbers, things
from chroma_jax.synthesis.writers import plain

ROWS = 4000


@pytest.fixture(scope="module")
def trained():
    return [world.write(i, "train", 0, reading=0.1) for i in range(ROWS)]


@pytest.fixture(scope="module")
def held():
    return [world.write(i, "validation", 0, reading=0.1) for i in range(600)]


def test_a_few_thousand_facts():
    assert world.count_facts() > 2300
    assert len(countries.CAPITALS) > 150


def test_a_row_depends_on_its_number_alone(trained):
    assert world.write(17, "train", 0, reading=0.1) == trained[17]
    assert world.write(17, "train", 1, reading=0.1) != trained[17]
    assert world.write(17, "validation", 0, reading=0.1).question != trained[17].question


@pytest.mark.parametrize(
    ("n", "words"),
    [(0, "zero"), (13, "thirteen"), (21, "twenty-one"), (40, "forty"), (100, "one hundred"), (399, "three hundred ninety-nine")],
)  # fmt: skip
def test_words(n, words):
    assert numbers.words(n) == words


def test_sums_differences_and_products_are_right():
    value = {numbers.words(n): n for n in range(1000)}
    signs = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    seen = set()
    for family in numbers.FAMILIES[:3]:
        for fact in range(len(family.facts)):
            a, sign, b, c = re.fullmatch(
                r"(.+) (plus|minus|times) (.+) is (.+)\.", family.answer(fact).lower()
            ).groups()
            assert signs[sign](value[a], value[b]) == value[c]
            seen.add((value[a], sign, value[b]))
    assert len(seen) == 21 * 21 * 2 + 21 * 22 // 2


def test_nothing_that_is_kept_apart_is_trained(trained, held):
    asked = {tuple(plain(line.text) for line in script.turns) for script in trained}
    assert not [s for s in held if tuple(plain(line.text) for line in s.turns) in asked]
    answers = {script.answer for script in trained}
    pairs = [s for s in held if s.apart == world.FACT]
    assert pairs and not [s for s in pairs if s.answer in answers]
    # Phrasings that are kept apart occur in no row of training, whatever the fact.
    for family in world.FAMILIES:
        for phrasing in family.held_phrasings:
            pattern = re.escape(phrasing).replace(r"\{", "{").replace(r"\}", "}")
            pattern = re.compile(re.sub("{[a-z]+}", ".+", pattern), re.I)
            assert not [s for s in trained if pattern.fullmatch(s.question)], phrasing


def test_a_product_that_is_kept_apart_is_trained_the_other_way_round():
    product = numbers.FAMILIES[2]
    held = {(product.facts[i]["a"], product.facts[i]["b"]) for i in product.held_facts}
    assert len(held) > 10
    assert not {(b, a) for a, b in held} & held


def test_all_kinds_of_apart_are_asked(held):
    assert {script.apart for script in held} == {world.PHRASING, world.FACT, world.COMBINATION}


def test_every_text_can_be_spoken(trained, held):
    config = FilterConfig(max_words=30, max_wer=None, min_similarity=None, min_mos=None, mos_drop=None)  # fmt: skip
    for script in [*trained, *held]:
        for line in script.turns:
            assert filters.speakable(line.text, config), line.text
        assert filters.speakable(script.answer, config), script.answer
        assert script.question[0].isupper() and "  " not in script.question


def test_a_follow_up_goes_on_from_a_question_of_its_kind(trained):
    talks = [script for script in trained if len(script.turns) == 3]
    assert len(talks) > 100
    assert all(s.turns[1].role == "assistant" for s in talks)
    of = [s for s in talks if s.question.startswith("And of ") and s.kind == "capital"]
    assert of and all(s.answer.startswith("The capital of ") for s in of)


def test_no_word_has_two_opposites():
    opposite = next(family for family in things.FAMILIES if family.name == "opposite")
    asked = [fact["a"] for fact in opposite.facts]
    assert len(asked) == len(set(asked))
