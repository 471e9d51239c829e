"""What a text and a clip must be to stay, cheap questions first. Every refusal has one reason, by which it is counted.

text         markup, addresses, signs that nobody can speak, too many words
duration     too short or too long
pace         letters a second, alone and beside the voice's median; room for the text's tokens
pause        silence inside
words        what a recognizer heard is something else, or lacks the first or last word
speaker      does not sound like the voice
quality      opinion score too low, alone or beside the voice's median
silent       nothing to hear
unwritten    the writer had nothing that can be used
split        what is kept apart for validation equals a row of training
twin         the same question and answer as an earlier row
lone         no other clip of the answer's voice, which could be its prompt
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from chroma_jax.synthesis.config import FilterConfig
from chroma_jax.synthesis.judging import Judges
from chroma_jax.synthesis.sound import longest_pause

_UNSPEAKABLE = re.compile(r"https?:|www\.|[`*_#<>{}\[\]|\\~^=@$€£%&+/]|^\s*([-•]|\d+[.)])\s|\n\s*\n", re.M)  # fmt: skip
_FIGURES = re.compile(r"\d")
_TOKENS = re.compile(r"\w+|[^\w\s]")
FRAME_RATE = 12.5  # of the codec: a text token takes two frames


class Typical(NamedTuple):
    """A voice's usual clip, from what it said first; None where it was not asked."""

    pace: float | None = None
    mos: float | None = None
    embedding: np.ndarray | None = None


class Verdict(NamedTuple):
    """`reason` None: it stays. `scores`: what was measured on the way."""

    reason: str | None
    scores: dict[str, float | str]


def speakable(text: str, config: FilterConfig) -> bool:
    """Whether a text can be read out as it is written, and is short enough."""
    if _UNSPEAKABLE.search(text) or _FIGURES.search(text) or not re.search(r"\w", text):
        return False
    return len(text.split()) <= config.max_words


def pace(text: str, seconds: float) -> float:
    """Letters and spaces a second."""
    return len(re.sub(r"[^\w\s]", "", text)) / seconds


def judge(
    text: str,
    wave: np.ndarray,
    rate: int,
    config: FilterConfig,
    judges: Judges,
    typical: Typical,
    *,
    answer: bool,
) -> Verdict:
    """Looks at a clip.

    Args:
      text: what it says.
      wave: [N] float32.
      rate: of it, in Hz.
      config: what it must be.
      judges: who is asked.
      typical: the voice's usual clip.
      answer: whether it is an answer. Questions are not spoken by the model and need no room for tokens; judges hear them if
        `config.hear_questions`.
    """
    seconds = len(wave) / rate
    scores: dict[str, float | str] = {"seconds": round(seconds, 3)}

    def verdict(reason: str | None) -> Verdict:
        return Verdict(reason, scores)

    if not config.min_seconds <= seconds <= config.max_seconds:
        return verdict("duration")
    speed = pace(text, seconds)
    scores["pace"] = round(speed, 2)
    low, high, spread = config.min_pace, config.max_pace, config.pace_spread
    if (low is not None and speed < low) or (high is not None and speed > high):
        return verdict("pace")
    if spread is not None and typical.pace and abs(speed / typical.pace - 1) > spread:
        return verdict("pace")
    # The last token ends the text, and speech has its place only in twice as many frames.
    tokens = len(_TOKENS.findall(text)) + 1
    if answer and config.room is not None and seconds * FRAME_RATE < config.room * tokens:
        return verdict("pace")
    if config.max_pause is not None and longest_pause(wave, rate) > config.max_pause:
        return verdict("pause")
    if not (answer or config.hear_questions):
        return verdict(None)
    return verdict(_ask(text, wave, rate, config, judges, typical, scores))


def _ask(text, wave, rate, config, judges, typical, scores) -> str | None:
    """What the judges say: a reason, or None."""
    if judges.quality and (config.min_mos is not None or config.mos_drop is not None):
        mos = judges.quality(wave, rate)
        if mos is None:
            return "silent"
        scores["mos"] = round(float(mos), 3)
        if config.min_mos is not None and mos < config.min_mos:
            return "quality"
        if config.mos_drop is not None and typical.mos and mos < typical.mos - config.mos_drop:
            return "quality"
    if judges.speaker and config.min_similarity is not None and typical.embedding is not None:
        embedding = judges.speaker(wave, rate)
        if embedding is None:
            return "silent"
        similarity = cosine(embedding, typical.embedding)
        scores["similarity"] = round(similarity, 3)
        if similarity < config.min_similarity:
            return "speaker"
    if judges.words and judges.compare and config.max_wer is not None:
        heard = judges.words(wave, rate)
        found = judges.compare(text, heard)
        scores["heard"], scores["wer"] = heard, round(found.wer, 3)
        if found.wer > config.max_wer or (config.first_and_last and not found.first_and_last):
            return "words"
    return None


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
