"""What was heard beside what was to be said; judges by name."""

import dataclasses

import pytest

from chroma_jax.synthesis.config import FilterConfig
from chroma_jax.synthesis.judging import Heard, Judges, compare, open_judges

OFF = FilterConfig(max_wer=None, min_similarity=None, min_mos=None, mos_drop=None)


@pytest.mark.parametrize(
    ("said", "heard", "wanted"),
    [
        ("Twelve plus three is fifteen.", "12 plus 3 is 15", Heard(0.0, True)),
        ("Six times nine is fifty-four.", "6 x 9 is 54.", Heard(0.0, True)),
        ("Six plus nine is fifteen.", "6 + 9 = 15", Heard(0.0, True)),
        ("Nine minus six is three.", "9 - 6 is 3", Heard(0.0, True)),
        ("Twenty minus six is fourteen.", "20-6 is 14.", Heard(0.0, True)),
        ("The letters are C, A, T.", "The letters are C-A-T.", Heard(0.0, True)),
        ("The sky is blue.", "the sky blue", Heard(0.25, True)),
        ("The sky is blue.", "The sky is", Heard(0.25, False)),
        ("The sky is blue.", "", Heard(1.0, False)),
    ],
)
def test_compare(said, heard, wanted):
    assert compare(said, heard) == wanted


def test_text_without_words():
    with pytest.raises(ValueError, match="has no words to be heard"):
        compare("...", "what")


def test_no_names_no_judges():
    assert open_judges(OFF, "en") == Judges()


@pytest.mark.parametrize("judge", ["words", "speaker", "quality"])
def test_an_unknown_judge(judge):
    with pytest.raises(ValueError, match="nobody"):
        open_judges(dataclasses.replace(OFF, **{judge: "nobody"}), "en")
