"""Which records make which batch, for the whole of training, as a function of the batch's number.

Nothing is carried from batch to batch: an iterator's state is the number of batches it has given. Every process computes the same plan and
takes its own rows of each batch.

An epoch is a shuffle of as many draws as the sources have records. One source is drawn from without replacement, so that an
epoch has each of its records once; several sources are drawn from in proportion to their weights, each in shuffled passes of its own
that go on from epoch to epoch. Draws are sorted into a few static shapes, each of which holds all smaller ones. Draws that do
not fill a batch of their shape are put into batches of the next larger shape; those that remain in the largest, fewer than a batch, are left
out of this epoch (other records in each epoch).

Axes: n records, B rows of a batch, E draws of an epoch.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from chroma_jax.audio.batch import bucket, bucket_sizes


class Shape(NamedTuple):
    """Static sizes of a batch."""

    prompt: int  # question and answer tokens N
    chunks: int  # C
    text: int  # L
    frames: int  # T
    voice_ids: int  # P
    voice_frames: int  # F

    def holds(self, other: Shape) -> bool:
        """Whether everything that fits `other` fits this one."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


# Smallest sizes: below these a shape of its own saves nothing.
_FIRST = Shape(prompt=64, chunks=1, text=16, frames=32, voice_ids=32, voice_frames=32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Longest records to train on; None is no limit. `on_long` says whether longer ones are an "error" or "drop"ped."""

    max_prompt: int | None = None  # question and answer tokens
    max_chunks: int | None = None
    max_text: int | None = None
    max_frames: int | None = None
    on_long: str = "error"

    def __post_init__(self):
        if self.on_long not in ("error", "drop"):
            raise ValueError(f"on_long must be error or drop, got {self.on_long!r}")

    def too_long(self, lengths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """By limit, which of the records [n] bool exceed it."""
        return {
            name: lengths[name] > limit
            for name in ("prompt", "chunks", "text", "frames")
            if (limit := getattr(self, f"max_{name}")) is not None
        }


def round_up(shape: Shape) -> Shape:
    """The next sizes of `audio.batch.bucket_sizes`."""
    return Shape(
        *(
            bucket(n, bucket_sizes(first, max(first, 1 << max(0, n - 1).bit_length())))
            for n, first in zip(shape, _FIRST, strict=True)
        )
    )


# What a position costs, relative to each other: arithmetic of the published sizes, with the Reasoner frozen.
_COSTS = np.array([4.0, 64.0, 6.0, 7.0])  # prompt, chunk, text, frame
_CANDIDATES = 32


def choose_shapes(lengths: np.ndarray, voice: tuple[int, int], count: int) -> tuple[Shape, ...]:
    """At most `count` nested shapes that hold all records, with little padding.

    Args:
      lengths: [n, 4], prompt, chunks, text and frames of each record.
      voice: longest transcript and longest voice.
      count: how many.
    """
    relative = lengths / np.maximum(lengths.max(axis=0), 1)
    # Nested shapes follow one order of the records; which is best depends on what varies.
    keys = [lengths @ _COSTS, relative.max(axis=1), *lengths.T]
    found = [_best_chain(lengths[np.argsort(key, kind="stable")], voice, count) for key in keys]
    _, shapes = min(found, key=lambda pair: pair[0])
    used = np.bincount(smallest_shapes(lengths, shapes), minlength=len(shapes))
    return tuple(shape for shape, n in zip(shapes, used, strict=True) if n)


def _best_chain(
    lengths: np.ndarray, voice: tuple[int, int], count: int
) -> tuple[float, list[Shape]]:
    """The cheapest `count` shapes among those that hold the first 1/32, 2/32, ... of the records [n, 4], and their cost."""
    n = len(lengths)
    cuts = np.unique(-(-n * np.arange(1, _CANDIDATES + 1) // _CANDIDATES))
    largest = np.maximum.accumulate(lengths)[cuts - 1]
    shapes = [round_up(Shape(*row.tolist(), *voice)) for row in largest]
    cost = np.array([shape[:4] for shape in shapes]) @ _COSTS
    # best[j]: cost of the first cuts[j] records, and the shapes chosen, shape j the last of them.
    best = [(cost[j] * cuts[j], [shapes[j]]) for j in range(len(cuts))]
    for _ in range(count - 1):
        best = [
            min(
                [best[j]]
                + [(best[i][0] + cost[j] * (cuts[j] - cuts[i]), [*best[i][1], shapes[j]]) for i in range(j)],
                key=lambda pair: pair[0],
            )
            for j in range(len(cuts))
        ]  # fmt: skip
    total, chosen = best[-1]
    return total, list(dict.fromkeys(chosen))


def smallest_shapes(lengths: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """Number [n] of the smallest shape that holds each record of `lengths` [n, 4]. Raises ValueError if one fits none."""
    for small, large in itertools.pairwise(shapes):
        if not large.holds(small):
            raise ValueError(f"shapes must grow: {large} does not hold {small}")
    level = np.full(len(lengths), len(shapes), np.int64)
    for i in reversed(range(len(shapes))):
        level[(lengths <= np.array(shapes[i][:4])).all(axis=1)] = i
    if (level == len(shapes)).any():
        worst = lengths[np.argmax(level == len(shapes))].tolist()
        raise ValueError(
            f"a record of {Shape(*worst, 0, 0)} does not fit the largest shape {shapes[-1]}"
        )
    return level


class Planned(NamedTuple):
    """One batch."""

    epoch: int
    shape: int  # number of the shape
    records: np.ndarray  # [B] int64


class Plan:
    """Batch number -> records.

    Args:
      sources: of each source, the numbers of its records.
      weights: of each source, its share of the draws.
      level: [all] int, the number of the shape of each record.
      num_shapes: how many shapes there are.
      batch_size: rows B.
      seed: of all shuffles.

    Raises:
      ValueError: a source without records, a weight that is not positive, or too few records for a batch.
    """

    def __init__(
        self,
        sources: Sequence[np.ndarray],
        weights: Sequence[float],
        level: np.ndarray,
        num_shapes: int,
        *,
        batch_size: int,
        seed: int,
    ):
        self.draws = sum(map(len, sources))  # E
        self.batches = self.draws // batch_size  # of an epoch
        for i, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            if not len(source):
                raise ValueError(f"source {i} has no records")
            if not 0 < weight < np.inf:
                raise ValueError(f"the weight of source {i} must be positive, got {weight}")
        if not self.batches:
            raise ValueError(
                f"{self.draws} records are fewer than a batch of {batch_size}: no batch can be made"
            )
        self._sources = [np.asarray(source, np.int64) for source in sources]
        self._shares = np.array(weights, np.float64) / sum(weights)
        self._level, self._num_shapes = level, num_shapes
        self._batch_size, self._seed = batch_size, seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, number: int) -> Planned:
        epoch, at = divmod(number, self.batches)
        with _LOCK:  # one of the reading threads computes, the others wait for it
            if epoch not in self._epochs:
                # Readers that run ahead stand in two epochs at most.
                kept = {e: plan for e, plan in self._epochs.items() if abs(e - epoch) <= 1}
                self._epochs = kept | {epoch: self._epoch(epoch)}
            records, shapes = self._epochs[epoch]
        return Planned(epoch, int(shapes[at]), records[at])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Records [batches, B] and shape [batches] of an epoch's batches."""
        drawn = np.concatenate(
            [
                self._draws(i, start, stop)
                for i, (start, stop) in enumerate(
                    zip(self._drawn_before(epoch), self._drawn_before(epoch + 1), strict=True)
                )
            ]
        )
        drawn = drawn[shuffle(len(drawn), self._seed, _ORDER, epoch)]
        batches, shapes = into_batches(
            drawn, self._level[drawn], self._num_shapes, self._batch_size
        )
        batches, shapes = batches[: self.batches], shapes[: self.batches]
        order = shuffle(len(batches), self._seed, _BATCHES, epoch)
        return batches[order], shapes[order]

    def _drawn_before(self, epoch: int) -> list[int]:
        """Draws from each source before an epoch: exact in the long run, whole numbers in each epoch."""
        total = epoch * self.draws
        counts = [int(np.floor(total * share + 0.5)) for share in self._shares]
        largest = int(np.argmax(self._shares))
        counts[largest] += total - sum(counts)
        return counts

    def _draws(self, source: int, start: int, stop: int) -> np.ndarray:
        """Draws start..stop-1 of a source's endless stream of shuffled passes."""
        rows = self._sources[source]
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            number, at = divmod(start, len(rows))
            one_pass = rows[shuffle(len(rows), self._seed, _PASS, source, number)]
            parts.append(one_pass[at : at + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)


_LOCK = threading.Lock()
_ORDER, _BATCHES, _PASS = 1, 2, 3  # streams of the seed


def into_batches(
    records: np.ndarray, level: np.ndarray, num_shapes: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Full batches [m, B] and their shapes [m]: m = len(records) // B, what is left over moves to larger shapes."""
    batches, shapes = [np.zeros((0, batch_size), np.int64)], [np.zeros(0, np.int64)]
    left = records[:0]
    for shape in range(num_shapes):
        left = np.concatenate([left, records[level == shape]])
        full = len(left) // batch_size
        batches.append(left[: full * batch_size].reshape(full, batch_size))
        shapes.append(np.full(full, shape))
        left = left[full * batch_size :]
    return np.concatenate(batches), np.concatenate(shapes)


def in_order(
    level: np.ndarray, records: np.ndarray, num_shapes: int, batch_size: int
) -> list[Planned]:
    """One pass without shuffling: every record once, the last batch filled up with -1."""
    missing = -len(records) % batch_size
    padded = np.concatenate([records, np.full(missing, -1)]).astype(np.int64)
    levels = np.concatenate([level[records], np.full(missing, num_shapes - 1)])
    batches, shapes = into_batches(padded, levels, num_shapes, batch_size)
    return [Planned(0, int(shape), rows) for rows, shape in zip(batches, shapes, strict=True)]


def shuffle(n: int, *key: int) -> np.ndarray:
    """A permutation of n, the same for the same key in every version of numpy."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")
