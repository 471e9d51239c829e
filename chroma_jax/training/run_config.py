"""What a whole run is told: the model, the data, the stage of training, and how often to look, test and save."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from chroma_jax import paths
from chroma_jax.config import ChromaConfig, chroma_4b, chroma_100m, debug, mini, tiny
from chroma_jax.data.mixture import Source
from chroma_jax.data.pipeline import Reading
from chroma_jax.data.plan import Limits
from chroma_jax.training import config
from chroma_jax.training.config import TrainConfig

SIZES = {
    "tiny": tiny,
    "debug": debug,
    "mini": mini,
    "chroma_100m": chroma_100m,
    "chroma_4b": chroma_4b,
}
STARTS = ("checkpoint", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the run begins.

    checkpoint: a directory or Hub id; its config.json has the last word on sizes. None: random weights. start: what trains
    begins as it is in the "checkpoint", or "random" over the checkpoint's frozen parts. size: "tiny", "debug" or "chroma_4b", the sizes of
    random weights without a checkpoint, and of the model that --compile_only compiles.
    """

    checkpoint: str | None = None
    start: str = "checkpoint"
    size: str

    def __post_init__(self):
        _one_of("model.size", self.size, SIZES)
        _one_of("model.start", self.start, STARTS)

    def sizes(self) -> ChromaConfig:
        """The named sizes."""
        return SIZES[self.size]()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read.

    train, evaluation: directories made by `chroma_jax.prepare`, separated by commas, each with "=weight" behind it where
    weights are not equal: "data/a=0.7,data/b=0.3". evaluation "": no held-out records.
    batch_size: rows of a step, over all processes. num_shapes: static shapes at most, each compiled once.
    max_prompt (question and answer tokens), max_chunks (two seconds of question each), max_text, max_frames: longest records;
    on_long: "error" or "drop" for those beyond. threads, prefetch, workers: see `chroma_jax.data.pipeline.Reading`.
    """

    train: str
    evaluation: str = ""
    batch_size: int
    num_shapes: int
    max_prompt: int | None = None
    max_chunks: int | None = None
    max_text: int | None = None
    max_frames: int | None = None
    on_long: str = "error"
    threads: int = 8
    prefetch: int = 8
    workers: int = 0

    def __post_init__(self):
        _at_least("data", self, batch_size=1, num_shapes=1, threads=1, prefetch=0, workers=0)
        for name in ("max_prompt", "max_chunks", "max_text", "max_frames"):
            if getattr(self, name) is not None:
                _at_least("data", self, **{name: 1})
        self.limits()

    def limits(self) -> Limits:
        """The longest records."""
        names = ("max_prompt", "max_chunks", "max_text", "max_frames", "on_long")
        return Limits(**{name: getattr(self, name) for name in names})

    def reading(self) -> Reading:
        """How fast to read."""
        return Reading(threads=self.threads, prefetch=self.prefetch, workers=self.workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: configs/*.py hold the values.

    steps: after which it ends. save_every, eval_every, log_every: in steps; the last step always does all three.
    keep: checkpoints that stay, the newest ones. seed: of the data's order.
    sample_every: steps between sample replies, which the last step gives too; 0 for none. num_samples: records that are answered,
    the first held-out ones, or the first of training where none are held out. sample_seconds: longest reply.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    steps: int
    save_every: int
    eval_every: int
    log_every: int
    keep: int = 3
    seed: int = 0
    sample_every: int = 0
    num_samples: int = 2
    sample_seconds: float = 10.0

    def __post_init__(self):
        _at_least("", self, steps=1, save_every=1, eval_every=1, log_every=1, keep=1, seed=0)
        _at_least("", self, sample_every=0, num_samples=1)
        if not 0 < self.sample_seconds < float("inf"):
            raise ValueError(f"sample_seconds must be positive, got {self.sample_seconds}")
        optimizer = self.train.optimizer
        if optimizer.schedule == "cosine" and self.steps > optimizer.total_steps:
            raise ValueError(
                f"steps {self.steps} go beyond train.optimizer.total_steps {optimizer.total_steps}, where the cosine ends"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """From nested mappings, such as the ConfigDict of a configs/*.py. Raises ValueError naming the key."""
        return config.read(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings of what JSON can hold."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def parse_sources(text: str, name: str) -> list[Source]:
    """ "data/a=0.7,data/b=0.3" -> sources. Raises ValueError naming the configuration's key."""
    sources = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        directory, separator, weight = part.rpartition("=")
        try:
            share = float(weight) if separator else 1.0
        except ValueError as e:
            raise ValueError(f"{name}: the weight of {part!r} must be a number") from e
        if not 0 < share < float("inf"):
            raise ValueError(f"{name}: the weight of {part!r} must be positive")
        sources.append(
            Source(directory=paths.expand(directory if separator else part), weight=share)
        )
    if not sources:
        raise ValueError(f"{name} names no dataset: make one with python -m chroma_jax.prepare")
    return sources


def _one_of(name: str, value: str, options: Iterable[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def _at_least(prefix: str, values: Any, **lowest: int) -> None:
    for name, low in lowest.items():
        if getattr(values, name) < low:
            full = f"{prefix}.{name}" if prefix else name
            raise ValueError(f"{full} must be at least {low}, got {getattr(values, name)}")
