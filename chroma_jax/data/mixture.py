"""Datasets opened together: one numbering of records, common static shapes, weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chroma_jax.config import ChromaConfig
from chroma_jax.data.dataset import Dataset
from chroma_jax.data.plan import Limits, Shape, choose_shapes, smallest_shapes

_LENGTHS = ("prompt", "chunks", "text", "frames")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset of a mixture. Its share of the batches' rows is its weight over the sum of weights."""

    directory: str | os.PathLike
    weight: float = 1.0


class Mixture:
    """Datasets opened together: records are numbered through, shapes are common.

    Args:
      config: the model.
      sources: directories, or `Source`s with weights.
      limits: the longest records to use.
      num_shapes: how many static shapes at most, chosen by the records' lengths.
      shapes: these instead.
      codec, tokenizer, reasoner: fingerprints to insist on (see `metadata.check_made_for`).

    Raises:
      ValueError: no sources; a dataset that is missing, empty, or prepared for another model; some with Reasoner states and some
        without; no records left by the limits, or one beyond them with on_long "error"; shapes that do not hold all records.
    """

    def __init__(
        self,
        config: ChromaConfig,
        sources: Sequence[str | os.PathLike | Source],
        *,
        limits: Limits | None = None,
        num_shapes: int = 4,
        shapes: Sequence[Shape] | None = None,
        codec: str | None = None,
        tokenizer: str | None = None,
        reasoner: str | None = None,
    ):
        if isinstance(sources, str | os.PathLike | Source):
            sources = [sources]
        if not sources:
            raise ValueError("no datasets: a pipeline needs at least one")
        if num_shapes < 1:
            raise ValueError(f"num_shapes must be at least 1, got {num_shapes}")
        sources = [s if isinstance(s, Source) else Source(directory=s) for s in sources]
        self.config, self.weights = config, [float(source.weight) for source in sources]
        prints = dict(codec=codec, tokenizer=tokenizer, reasoner=reasoner)
        self.datasets = [Dataset(source.directory, config, **prints) for source in sources]
        with_hidden = {d.metadata.hidden is not None for d in self.datasets}
        if len(with_hidden) > 1:
            names = [d.directory for d in self.datasets if d.metadata.hidden is None]
            raise ValueError(
                f"some datasets have precomputed Reasoner states and {', '.join(names)} have not: prepare all alike"
            )
        self.hidden = with_hidden.pop()
        sizes = [len(dataset) for dataset in self.datasets]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        lengths = self._lengths()
        self.dropped: dict[str, int] = {}  # by limit
        kept = self._within(limits or Limits(), lengths)
        table = np.stack([lengths[name] for name in _LENGTHS], axis=1)
        voice = tuple(max(d.longest_voice[i] for d in self.datasets) for i in range(2))
        self.records = np.flatnonzero(kept)
        self.shapes = tuple(shapes or choose_shapes(table[kept], voice, num_shapes))
        if not all(n <= size for n, size in zip(voice, self.shapes[0][4:], strict=True)):
            raise ValueError(
                f"voices have up to {voice[0]} tokens and {voice[1]} frames, the smallest shape holds {self.shapes[0][4:]}"
            )
        self.level = np.zeros(len(kept), np.int64)
        self.level[kept] = smallest_shapes(table[kept], self.shapes)

    def describe(self) -> list[str]:
        """Lines for the log: sources, shapes, what was dropped."""
        lines = [
            f"{d.directory}: {len(d)} records, weight {w:g}"
            for d, w in zip(self.datasets, self.weights, strict=True)
        ]
        lines += [
            f"dropped: {count} records beyond max_{name}" for name, count in self.dropped.items()
        ]
        counts = np.bincount(self.level[self.records], minlength=len(self.shapes))
        lines += [f"{c} records in {s}" for c, s in zip(counts, self.shapes, strict=True)]
        return lines

    @property
    def key(self) -> list[Any]:
        """What a plan of batches depends on."""
        return [
            [d.metadata.key for d in self.datasets],
            self.weights,
            self.shapes,
            len(self.records),
        ]

    def find(self, record: int) -> tuple[Dataset, int]:
        """The dataset of a record, and its number there."""
        source = int(np.searchsorted(self.offsets, record, side="right")) - 1
        return self.datasets[source], record - int(self.offsets[source])

    def name(self, record: int) -> str:
        """What a record is called in an error."""
        dataset, local = self.find(record)
        return f"{dataset.directory}#{local} ({dataset[local].id})"

    def _lengths(self) -> dict[str, np.ndarray]:
        columns = {
            name: np.concatenate([d.index[name] for d in self.datasets]).astype(np.int64)
            for name in ("question", "chunks", "text", "frames")
        }
        question = columns.pop("question")
        if self.hidden:  # the question is not heard again
            return columns | {"prompt": np.ones_like(question), "chunks": np.ones_like(question)}
        return columns | {"prompt": question + columns["text"]}

    def _within(self, limits: Limits, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        kept = np.ones(len(lengths["text"]), bool)
        for name, beyond in limits.too_long(lengths).items():
            if not beyond.any():
                continue
            if limits.on_long == "error":
                dataset, number = self.find(int(np.argmax(beyond)))
                raise ValueError(
                    f"{int(beyond.sum())} records are beyond max_{name} {getattr(limits, f'max_{name}')}, the first is record "
                    f'{number} of {dataset.directory}; on_long "drop" leaves them out'
                )
            self.dropped[name] = int((beyond & kept).sum())
            kept &= ~beyond
        for dataset, start, stop in zip(
            self.datasets, self.offsets, self.offsets[1:], strict=False
        ):
            if not kept[start:stop].any():
                raise ValueError(f"{dataset.directory} has no records within the limits")
        return kept
