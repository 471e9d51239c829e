"""Each filter refuses what it is for, and says its one reason."""

import numpy as np
import pytest

from chroma_jax.synthesis import filters
from chroma_jax.synthesis.config import FilterConfig
from chroma_jax.synthesis.filters import Typical
from chroma_jax.synthesis.judging import Heard, Judges

RATE = 16000
TEXT = "The capital of Spain is Madrid."
CONFIG = FilterConfig(words="w", speaker="s", quality="q")
TYPICAL = Typical(pace=15.0, mos=3.2, embedding=np.array([1.0, 0.0]))


def tone(seconds: float) -> np.ndarray:
    return np.sin(2 * np.pi * 300 * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def panel(heard=TEXT, wer=0.0, ends=True, embedding=(1.0, 0.1), mos=3.1) -> Judges:
    return Judges(
        words=lambda wave, rate: heard,
        compare=lambda said, heard: Heard(wer, ends),
        speaker=lambda wave, rate: None if embedding is None else np.array(embedding),
        quality=lambda wave, rate: mos,
    )


def judged(seconds=2.0, judges=None, wave=None, text=TEXT, answer=True, config=CONFIG):
    wave = tone(seconds) if wave is None else wave
    return filters.judge(text, wave, RATE, config, judges or panel(), TYPICAL, answer=answer)


def test_what_is_good_stays():
    verdict = judged()
    assert verdict.reason is None
    assert verdict.scores == {"seconds": 2.0, "pace": 15.0, "mos": 3.1, "similarity": 0.995, "heard": TEXT, "wer": 0.0}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "given"),
    [
        ("duration", dict(seconds=0.2)),
        ("duration", dict(seconds=61)),
        ("pace", dict(seconds=5.0)),  # 6 letters a second
        ("pace", dict(seconds=1.2)),  # 25 of them
        ("pace", dict(seconds=3.0)),  # 10: too far from the voice's 15
        ("pace", dict(text="A, B, C, D, E, F, G, H, I, J, K, L.", seconds=1.5)),  # no room for the tokens
        ("pause", dict(wave=np.concatenate([tone(0.4), np.zeros(int(1.3 * RATE), np.float32), tone(0.3)]))),
        ("quality", dict(judges=panel(mos=2.7))),
        ("silent", dict(judges=panel(mos=None))),
        ("speaker", dict(judges=panel(embedding=(0.5, 0.8)))),
        ("silent", dict(judges=panel(embedding=None))),
        ("words", dict(judges=panel(wer=0.2))),
        ("words", dict(judges=panel(wer=0.05, ends=False))),
    ],
)  # fmt: skip
def test_refused(reason, given):
    assert judged(**given).reason == reason


def test_quality_beside_the_voice():
    strict = FilterConfig(words="w", speaker="s", quality="q", min_mos=None, mos_drop=0.05)
    assert judged(judges=panel(mos=3.1), config=strict).reason == "quality"


def test_judges_are_not_asked_of_questions():
    def fail(*_):
        raise AssertionError("asked")

    assert judged(judges=Judges(fail, fail, fail, fail), answer=False).reason is None


def test_a_question_needs_no_room():
    letters = "A, B, C, D, E, F, G, H, I, J, K, L."
    assert judged(text=letters, seconds=1.5, answer=False).reason is None


def test_none_switches_off():
    names = ("min_pace", "max_pace", "pace_spread", "max_wer", "min_similarity", "min_mos", "mos_drop", "max_pause", "room")  # fmt: skip
    off = FilterConfig(**dict.fromkeys(names))
    assert judged(seconds=0.4, judges=panel(wer=1, mos=1, embedding=(0, 1)), config=off).reason is None  # fmt: skip


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("It is four.", True),
        ("Why? Because it's late!", True),
        ("See https://x.org.", False),
        ("It is 4.", False),
        ("**Bold** words.", False),
        ("Costs are high & rising.", False),
        ("- one\n- two", False),
        ("...", False),
        ("word " * 81, False),
    ],
)
def test_speakable(text, good):
    assert filters.speakable(text, CONFIG) is good
