"""The judges that filters ask: from `chroma_jax.evaluation`, or any that keep to these signatures."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from chroma_jax.synthesis.config import FilterConfig


class Heard(NamedTuple):
    """How what was heard compares with what was to be said."""

    wer: float
    first_and_last: bool  # both words are there


class Judges(NamedTuple):
    """Judges, each None where nobody asks it: samples [N] and their rate in Hz go in."""

    words: Callable[[np.ndarray, int], str] | None = None
    compare: Callable[[str, str], Heard] | None = None  # what was to be said, what was heard
    speaker: Callable[[np.ndarray, int], np.ndarray | None] | None = None
    quality: Callable[[np.ndarray, int], float | None] | None = None


def open_judges(config: FilterConfig, language: str) -> Judges:
    """Opens the judges that a configuration names. Raises ValueError for one that is unknown or not installed."""
    if not (config.words or config.speaker or config.quality):
        return Judges()
    from chroma_jax.evaluation import judges

    return Judges(
        words=judges.recognizer(config.words, language) if config.words else None,
        compare=compare if config.words else None,
        speaker=judges.speaker(config.speaker) if config.speaker else None,
        quality=judges.mos(config.quality) if config.quality else None,
    )


# How recognizers write sums, where the voice said words.
_SIGNS = (
    (r"(?<=\d)\s*[x×*]\s*(?=\d)", " times "),
    (r"(?<=\d)\s*\+\s*(?=\d)", " plus "),
    (r"(?<=\d)\s*[-–−]\s*(?=\d)", " minus "),
    (r"(?<=\d)\s*=\s*(?=\d)", " is "),
)


def compare(said: str, heard: str) -> Heard:
    """By Whisper's English normaliser; words that were only written together, apart or as signs are no error."""
    from chroma_jax.evaluation import text

    for sign, word in _SIGNS:
        heard = re.sub(sign, word, heard)
    wanted, got = text.whisper_english(said), text.whisper_english(heard)
    if not re.search(r"\w", wanted):
        raise ValueError(f"{said!r} has no words to be heard")
    if wanted.replace(" ", "") == got.replace(" ", ""):
        return Heard(0.0, True)
    words, found = wanted.split(), got.split()
    ends = bool(found) and found[0] == words[0] and found[-1] == words[-1]
    return Heard(text.errors(wanted, got).rate, ends)
