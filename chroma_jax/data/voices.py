"""Voice prompts of bounded length, and which one a record speaks in.

A voice prompt is a recording and exactly what it says. A recording that is too long is cut at a whole word; where in time a word ends is
estimated from its share of the transcript's characters, so a cut voice may say a little more or less than its text.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from chroma_jax.audio.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class VoiceLimits:
    """The longest voice prompt."""

    max_frames: int = 125  # 10 s
    max_tokens: int = 96

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"voice {field.name} must be at least 1, got {getattr(self, field.name)}"
                )


def cut_voice(
    text: str, frames: int, tokenizer: Tokenizer, limits: VoiceLimits
) -> tuple[np.ndarray, int]:
    """Token ids [R] int32 of a transcript, and how many of the recording's frames say them: all, if they fit `limits`."""
    ids = tokenizer.encode(text)
    if frames <= limits.max_frames and len(ids) <= limits.max_tokens:
        return np.array(ids, np.int32), frames
    # Where writing has no spaces, characters stand for words.
    ends = [m.end() for m in re.finditer(r"\S+", text)]
    if len(ends) < 2:
        ends = list(range(1, len(text) + 1))
    start, stop = 0, len(ends)  # the longest prefix that fits lies in [start, stop)
    best = None
    while start < stop:
        middle = (start + stop) // 2
        prefix = text[: ends[middle]]
        ids, kept = tokenizer.encode(prefix), max(1, round(frames * len(prefix) / len(text)))
        if kept <= limits.max_frames and len(ids) <= limits.max_tokens:
            best, start = (ids, kept), middle + 1
        else:
            stop = middle
    if best is None:  # one very long word
        share = min(limits.max_frames / frames, 1.0)
        ids = tokenizer.encode(text[: max(1, int(len(text) * share))])[: limits.max_tokens]
        best = ids, max(1, min(limits.max_frames, frames))
    return np.array(best[0], np.int32), min(best[1], frames)


class VoiceDraw:
    """Chooses the voice prompt of each record among its speaker's other utterances.

    Args:
      speaker: [n] int, the speaker's number of each record; negative for unknown, who has no other records.
      utterance: [n] int, equal where two records have the same answer; those never serve each other.
      usable: [n] bool, records whose answer can serve as voice prompt.
    """

    def __init__(self, speaker: np.ndarray, utterance: np.ndarray, usable: np.ndarray):
        self._utterance = utterance
        self._speaker = speaker
        candidates = np.flatnonzero((speaker >= 0) & usable)
        # Records in order of speaker; each speaker's are a range of it.
        self._order = candidates[np.argsort(speaker[candidates], kind="stable")]
        count = int(speaker.max(initial=-1)) + 1
        self._starts = np.searchsorted(speaker[self._order], np.arange(count + 1))

    def __call__(self, index: int, seed: int, epoch: int) -> int | None:
        """The record whose answer is the voice of record `index` in an epoch; None where the speaker has no other utterance.

        It depends on the arguments alone.
        """
        speaker = int(self._speaker[index])
        if speaker < 0:
            return None
        others = self._order[self._starts[speaker] : self._starts[speaker + 1]]
        others = others[self._utterance[others] != self._utterance[index]]
        if not len(others):
            return None
        # SeedSequence gives the same bits in every version of numpy.
        bits = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
        return int(others[int(bits[0]) % len(others)])
