"""The one clock of all latencies: on the caller's side, from the last sample of the question to samples in the caller's memory."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

LONGEST_STALL = 0.1  # seconds that a reply may stall and still be called continuous


class Times(list):
    """Seconds of repeated runs."""

    @property
    def median(self) -> float:
        """Of them."""
        return statistics.median(self)

    @property
    def p95(self) -> float:
        """95 % of them are at most this long."""
        return float(np.percentile(self, 95))


def milliseconds(seconds: float) -> float:
    """As tables show them."""
    return round(1e3 * seconds, 3)


def timed(function: Callable, *args: Any, repeats: int, warm: int = 1) -> Times:
    """Seconds of each call, to the end of its device work; `warm` calls before are not counted."""
    times = Times()
    for i in range(warm + repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        if i >= warm:
            times.append(time.perf_counter() - start)
    return times


@dataclasses.dataclass
class Arrivals:
    """When the pieces of one reply came, in seconds from `start` on `time.perf_counter`."""

    start: float
    rate: int  # of the samples
    first_text: float | None = None  # the first text token
    first_frame: float | None = (
        None  # the first whole code frame: what the paper calls time to first token
    )
    first_sound: float | None = None  # the first samples
    sounds: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # (when, samples)
    end: float | None = None  # the last piece

    def add(self, chunk: Any) -> None:
        """A chunk that has just come."""
        now = time.perf_counter() - self.start
        if self.first_text is None and len(chunk.tokens):
            self.first_text = now
        if self.first_frame is None and len(chunk.frames):
            self.first_frame = now
        if len(chunk.audio):
            self.first_sound = now if self.first_sound is None else self.first_sound
            self.sounds.append((now, len(chunk.audio)))
        self.end = now

    @property
    def seconds(self) -> float:
        """Of sound."""
        return sum(n for _, n in self.sounds) / self.rate

    @property
    def rtf(self) -> float | None:
        """Time to the last samples for each second of sound."""
        return self.sounds[-1][0] / self.seconds if self.sounds else None

    @property
    def gaps(self) -> list[float]:
        """Seconds before each piece of sound but the first."""
        when = [t for t, _ in self.sounds]
        return [b - a for a, b in itertools.pairwise(when)]

    @property
    def stalls(self) -> list[float]:
        """Seconds that playing waits for each piece of sound, where it begins with the first."""
        return stalls(self.sounds, self.rate)


def stalls(sounds: Sequence[tuple[float, int]], rate: int) -> list[float]:
    """How long playing stands still before each piece (when it came, samples), when it begins as the first one comes."""
    waits, ready = [], None
    for when, samples in sounds:
        wait = 0.0 if ready is None else max(0.0, when - ready)
        ready = (when if ready is None else ready + wait) + samples / rate
        waits.append(wait)
    return waits


def follow(
    chunks: Iterable[Any], start: float, rate: int, *, until_sound: bool = False
) -> Arrivals:
    """Takes chunks as they come, to the end or to the first one with samples."""
    arrivals = Arrivals(start, rate)
    for chunk in chunks:
        arrivals.add(chunk)
        if until_sound and len(chunk.audio):
            break
    return arrivals
