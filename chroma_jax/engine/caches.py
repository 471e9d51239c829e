"""Sizes of the KV caches: a few static ones, no larger than the live length, which double as replies grow.

A beat reads both caches whole, so a short reply in a cache for a long one pays for positions that hold nothing. A new size is a
new compilation, so there are few of them: `first`, twice that, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from chroma_jax import schedule
from chroma_jax.audio.batch import bucket
from chroma_jax.config import ChromaConfig
from chroma_jax.engine import state as states
from chroma_jax.engine.state import BeatState, Prompt

FIRST_SIZE = 256
BEATS_AHEAD = 16  # beats that a new cache has room for at least, where its limit allows
SHRINK_AFTER = 64  # beats for which a cache must be twice as large as needed: ten seconds
_LOOK_EVERY = 16  # beats

_grow = jax.jit(states.grow, static_argnames=("reasoner_size", "backbone_size"))


class CacheSizes(NamedTuple):
    """Positions of the two caches."""

    reasoner: int
    backbone: int


def ladder(limit: int, first: int = FIRST_SIZE) -> tuple[int, ...]:
    """The sizes of a cache from `first`, each twice the one before, up to `limit`, which is the last."""
    sizes, size = [], first
    while size < limit:
        sizes.append(size)
        size *= 2
    return (*sizes, limit)


def most(config: ChromaConfig) -> CacheSizes:
    """What the model has positions for."""
    return CacheSizes(config.reasoner.text.max_positions, config.backbone.llama.max_positions)


def final_sizes(config: ChromaConfig, question: int, voice: int, max_frames: int) -> CacheSizes:
    """Sizes that hold question and voice (positions of the longest of each) and `max_frames` frames, or all that the model has."""
    # A reply shorter than the first size holds runs the programs of longer ones.
    beats = max(-(-max_frames // schedule.FRAMES_PER_TEXT), BEATS_AHEAD)
    limits = most(config)
    backbone = min(voice + schedule.POSITIONS_PER_BEAT * beats + 1, limits.backbone)
    return CacheSizes(
        bucket(min(question + beats, limits.reasoner), ladder(limits.reasoner)),
        bucket(backbone, ladder(limits.backbone)),
    )


def ledger_of(
    config: ChromaConfig, prompt: Prompt, max_frames: int, *, grow: bool = True
) -> CacheLedger:
    """CacheLedger for a batch of prompts on the host and `max_frames` frames of each row."""
    question = prompt.ids.shape[1]  # as padded: the first cache holds the padding, too
    voice = np.asarray(schedule.voice_length(prompt.voice_id_lengths, prompt.voice_frame_lengths))
    limits = final_sizes(config, question, int(voice.max()), max_frames)
    ledger = CacheLedger(limits, len(voice), grow=grow)
    ledger.enter(slice(None), question, voice)
    return ledger


def voice_room(config: ChromaConfig, voice: int) -> int:
    """The first size of the Backbone's cache after a voice of so many positions."""
    limit = config.backbone.llama.max_positions
    wanted = min(voice + schedule.POSITIONS_PER_BEAT * BEATS_AHEAD, limit)
    return bucket(wanted, ladder(limit))


class CacheLedger:
    """Keeps a running state's caches large enough for the next beats, and not much larger, from lengths counted on the host.

    The counts are upper bounds: nothing waits for the device. A row ends as `Finish.CONTEXT` where a cache is full, so no row
    may meet the end of a cache that can still grow.

    Args:
      limits: the sizes beyond which caches do not grow.
      rows: rows of the state; none is in use before `enter`.
      grow: False for caches of the final sizes from the start.
    """

    def __init__(self, limits: CacheSizes, rows: int, *, grow: bool = True):
        self.limits = limits
        self.grow = grow
        self._used = np.zeros(rows, bool)
        # Positions at the start of each row's reply, and those of the Backbone by now.
        self._question, self._voice = np.zeros(rows, int), np.zeros(rows, int)
        self._length = np.zeros(rows, int)
        self._too_large = self._since = (
            0  # beats: for which the caches were, and since that was looked at
        )

    def enter(self, rows: slice | int, question: np.ndarray | int, voice: np.ndarray | int) -> None:
        """The rows begin, with prompts of these positions."""
        self._used[rows], self._question[rows] = True, question
        self._voice[rows] = self._length[rows] = voice

    def leave(self, rows: np.ndarray | int) -> None:
        """The rows need no more room."""
        self._used[rows] = False

    def sizes(self, beats: int = BEATS_AHEAD, present: CacheSizes | None = None) -> CacheSizes:
        """What holds `beats` more beats of every row; nowhere less than `present`."""
        if not self.grow:
            return self.limits
        wanted = self._most(self._length) + schedule.POSITIONS_PER_BEAT * beats
        limits, least = self.limits, present or CacheSizes(0, 0)
        size = bucket(min(wanted, limits.backbone), ladder(limits.backbone))
        size = max(size, least.backbone)
        # As many thoughts as beats with text fit the Backbone's cache: one pair of sizes for each size of that.
        thoughts = (size - self._voice) // schedule.POSITIONS_PER_BEAT
        wanted = min(self._most(self._question + thoughts), limits.reasoner)
        return CacheSizes(max(bucket(wanted, ladder(limits.reasoner)), least.reasoner), size)

    def make(self, state: BeatState, beats: int = 1) -> BeatState:
        """The state with room for `beats` more beats, which are counted as done.

        Caches that have long been twice as large as their rows need become smaller.
        """
        present = sizes_of(state)
        sizes = self.sizes(beats, present)
        self._since += beats
        if self._since >= _LOOK_EVERY and len(self._used) > 1 and self.grow:
            smaller = self.sizes()
            ample = any(2 * small <= now for small, now in zip(smaller, present, strict=True))
            self._too_large = self._too_large + self._since if ample else 0
            self._since = 0
            if self._too_large >= SHRINK_AFTER and sizes == present:
                self._too_large = 0
                sizes = CacheSizes(*map(min, smaller, present))
        self._length += schedule.POSITIONS_PER_BEAT * beats
        return state if sizes == present else resize(state, sizes)

    def unused(self, rows: slice | int | np.ndarray, beats: int = 1) -> None:
        """So many of the rows' beats were none: the rows were paused."""
        self._length[rows] -= schedule.POSITIONS_PER_BEAT * beats

    def without_text(self, rows: slice | int, beats: np.ndarray | int = 1) -> None:
        """So many of the rows' beats turned out to be without text: frames only."""
        self._length[rows] -= (schedule.POSITIONS_PER_BEAT - schedule.FRAMES_PER_TEXT) * beats

    def path(self) -> Iterator[CacheSizes]:
        """The sizes that the state goes through until it meets its limits: for warm-up."""
        sizes = self.sizes()
        yield sizes
        while sizes.backbone < self.limits.backbone:
            left = sizes.backbone - self._most(self._length)
            sizes = self.sizes(left // schedule.POSITIONS_PER_BEAT + 1, sizes)
            yield sizes

    def _most(self, lengths: np.ndarray) -> int:
        return int(lengths[self._used].max(initial=0))


def sizes_of(state: BeatState) -> CacheSizes:
    """The sizes of a state's caches."""
    return CacheSizes(state.reasoner.size, state.backbone.size)


def resize(state: BeatState, sizes: CacheSizes) -> BeatState:
    """The state with caches of these sizes."""
    return _grow(state, reasoner_size=sizes.reasoner, backbone_size=sizes.backbone)
