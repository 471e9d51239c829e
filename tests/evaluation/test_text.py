"""Normalisation as the protocols have it, and errors counted by hand."""

import pytest

from chroma_jax.evaluation import text


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("It's a well-known dog, isn't it?", "it's a wellknown dog isn't it"),
        ("“It’s” — no.", "its  no".replace("  ", " ")),
        ("Mr. Smith: 3,000 (three)!", "mr smith 3000 three"),
    ],
    ids=["apostrophe_stays_hyphen_goes", "curly_apostrophe_is_chinese_punctuation", "figures_stay"],
)
def test_seed_tts_english(given, want):
    assert text.seed_tts(given) == want


def test_seed_tts_chinese_is_characters():
    assert text.seed_tts("你好，世界！ 123", "zh") == "你 好 世 界 1 2 3"


def test_whisper_english():
    pytest.importorskip("whisper_normalizer", reason="pip install whisper-normalizer")
    assert text.whisper_english("Mr. Brown's colour: twenty-one, um!") == "mister brown is color 21"


@pytest.mark.parametrize(
    ("reference", "heard", "want"),
    [
        ("a b c d", "a b c d", (0, 0, 0, 4)),
        ("a b c d", "a x c", (1, 1, 0, 4)),
        ("a b", "a b c c c", (0, 0, 3, 2)),
        ("a b c", "", (0, 3, 0, 3)),
    ],
    ids=["same", "one_each", "more_than_all", "nothing_heard"],
)
def test_errors(reference, heard, want):
    pytest.importorskip("jiwer", reason="pip install jiwer")
    found = text.errors(reference, heard)
    assert found == want
    assert found.rate == sum(want[:3]) / want[3]


def test_errors_want_a_reference():
    with pytest.raises(ValueError, match="reference with words"):
        text.errors(" ", "words")


@pytest.mark.parametrize(
    ("reference", "heard", "want"),
    [("a b c d", "a b c d", 0), ("a b c d", "a b", 2), ("a b c d", "a c d", 0), ("a b", "", 2), ("a b c", "a b x", 0)],
    ids=["whole", "cut", "hole", "silent", "misheard"],
)  # fmt: skip
def test_missing_at_end(reference, heard, want):
    pytest.importorskip("jiwer", reason="pip install jiwer")
    assert text.missing_at_end(reference, heard) == want
