"""What a whole run is told: the model, the data, the stage of training, and how often to look, test and save."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from chroma_jax import paths
from chroma_jax.config import (
    ChromaConfig,
    CodecConfig,
    chroma_4b,
    chroma_100m,
    debug,
    mini,
    mini_codec,
    tiny,
)
from chroma_jax.data.crops import CropLimits
from chroma_jax.data.mixture import Source
from chroma_jax.data.pipeline import Reading
from chroma_jax.data.plan import Limits
from chroma_jax.training import config
from chroma_jax.training.config import CODEC, TrainConfig

SIZES = {
    "tiny": tiny,
    "debug": debug,
    "mini": mini,
    "chroma_100m": chroma_100m,
    "chroma_4b": chroma_4b,
}
CODEC_SIZES = {
    "tiny": lambda: tiny().codec,
    "mini": mini_codec,
    "mimi": lambda: chroma_4b().codec,
}
STARTS = ("checkpoint", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the run begins.

    checkpoint: a directory or Hub id; its config.json has the last word on sizes. None: random weights. start: what trains
    begins as it is in the "checkpoint", or "random" over the checkpoint's frozen parts. size: "tiny", "debug" or "chroma_4b", the sizes of
    random weights without a checkpoint, and of the model that --compile_only compiles; of a Codec alone, "tiny", "mini" or "mimi".
    """

    checkpoint: str | None = None
    start: str = "checkpoint"
    size: str

    def __post_init__(self):
        _one_of("model.start", self.start, STARTS)

    def sizes(self) -> ChromaConfig:
        """The named sizes. Raises ValueError for sizes of a Codec alone."""
        _one_of("model.size", self.size, SIZES)
        return SIZES[self.size]()

    def codec_sizes(self) -> CodecConfig:
        """The named sizes of a Codec. Raises ValueError for sizes of a whole Chroma."""
        _one_of("model.size", self.size, CODEC_SIZES)
        return CODEC_SIZES[self.size]()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read.

    train, evaluation: directories made by `chroma_jax.prepare`, separated by commas, each with "=weight" behind it where
    weights are not equal: "data/a=0.7,data/b=0.3". evaluation "": no held-out records.
    batch_size: rows of a step, over all processes. num_shapes: static shapes at most, each compiled once.
    max_prompt (question and answer tokens), max_chunks (two seconds of question each), max_text, max_frames: longest records;
    on_long: "error" or "drop" for those beyond. crop_seconds, gain_db, speed: of objective "codec", whose train and evaluation name
    sound, see `chroma_jax.data.crops`. threads, prefetch, workers: see `chroma_jax.data.pipeline.Reading`.
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
    crop_seconds: float | None = None
    gain_db: float = 0.0
    speed: float = 0.0
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

    def crops(self, sizes: CodecConfig) -> CropLimits:
        """How sound is cut. Raises ValueError for crops that are no whole number of the codec's frames."""
        if self.crop_seconds is None:
            raise ValueError("data.crop_seconds is missing: how long are the pieces of sound?")
        limits = CropLimits(seconds=self.crop_seconds, gain_db=self.gain_db, speed=self.speed)
        if round(limits.seconds * sizes.sampling_rate) % sizes.frame_samples:
            raise ValueError(
                f"data.crop_seconds {self.crop_seconds} must be a multiple of a frame's "
                f"{sizes.frame_samples / sizes.sampling_rate:g} s"
            )
        return limits

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
        (self.model.codec_sizes if self.train.objective == CODEC else self.model.sizes)()
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
