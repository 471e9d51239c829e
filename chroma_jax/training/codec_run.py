"""What a run of objective "codec" begins with, reads and leaves behind: sound, and a Codec in Mimi's own layout."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax import checkpoint, paths
from chroma_jax.audio.prompt import Processor
from chroma_jax.checkpoint import params
from chroma_jax.checkpoint.codec_files import load_codec, read_codec_config, save_codec
from chroma_jax.config import CodecConfig
from chroma_jax.data.crops import Ears, Sounds, crop_evaluation, crop_pipeline, whole
from chroma_jax.data.pipeline import BatchIterator, Evaluation
from chroma_jax.training.objectives.codec import CodecModel
from chroma_jax.training.run_config import RunConfig, parse_sources
from chroma_jax.training.step import Trainer, TrainState


def read_sizes(config: RunConfig) -> tuple[str | None, CodecConfig]:
    """(directory of the Codec that the run begins with, or None; its configuration)."""
    source = config.model.checkpoint and paths.expand(config.model.checkpoint)
    return source, read_codec_config(source) if source else config.model.codec_sizes()


def open_data(config: RunConfig, sizes: CodecConfig) -> tuple[BatchIterator, Evaluation | None]:
    """Crops to train on, and those of held-out sound. Raises ValueError for sound that cannot be read."""
    data = config.data
    shared: dict[str, Any] = dict(
        batch_size=data.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        reading=data.reading(),
    )
    limits = data.crops(sizes)
    frames = round(limits.seconds * sizes.frame_rate) * data.batch_size
    latents = config.train.codec.k_means_batches * frames
    if latents < sizes.codebook_size:
        raise ValueError(
            f"train.codec.k_means_batches {config.train.codec.k_means_batches} gives {latents} latents: "
            f"{sizes.codebook_size} codewords want at least as many"
        )
    ears = _ears(config)
    sounds = Sounds(parse_sources(data.train, "data.train"), sizes.sampling_rate, ears)
    batches = crop_pipeline(sounds, limits, seed=config.seed, **shared)
    if not data.evaluation:
        return batches, None
    sounds = Sounds(parse_sources(data.evaluation, "data.evaluation"), sizes.sampling_rate, ears)
    return batches, crop_evaluation(sounds, limits, **shared)


def _ears(config: RunConfig) -> Ears | None:
    """What the audio encoder that the codec learns from wants to hear."""
    distillation = config.train.codec.distillation
    if distillation is None:
        return None
    source = checkpoint.resolve_source(distillation.checkpoint)
    sizes = checkpoint.read_config(source)
    return Ears(Processor.load(sizes, source).mel, sizes.reasoner.audio.chunk_frames)


def begin(
    config: RunConfig, trainer: Trainer, source: str | None, data: list[Any]
) -> tuple[TrainState, dict[str, Any]]:
    """(state, frozen) before the first step."""
    state, frozen = trainer.init()
    distillation = config.train.codec.distillation
    known = {}
    if source is not None and config.model.start != "random":
        codec = load_codec(source)[1]
        known |= {f"codec/{path}": array for path, array in params.flatten(codec).items()}
    if distillation is not None:
        reasoner = checkpoint.load(distillation.checkpoint, stages=("reasoner",)).model.reasoner
        found = params.flatten(reasoner.audio_encoder)
        known |= {f"audio_encoder/{path}": array for path, array in found.items()}
    if not known:
        return state, frozen
    model = trainer.model_of(state, frozen)
    arrays = params.flatten(model)
    return trainer.from_model(params.build(model, arrays | known))


class Reconstruction(NamedTuple):
    """A sound that went through the codec and back."""

    record: str
    audio: np.ndarray  # [N] float32
    text: str = ""
    same_frames: None = None

    def describe(self, rate: int) -> str:
        """One line; `rate` in samples per second."""
        return f"{json.dumps(self.record)}  {len(self.audio) / rate:.2f} s"


class Samples:
    """The first sounds through the codec and back, as often as asked. Everything is one program, compiled the first time."""

    def __init__(self, trainer: Trainer, sounds: Sounds, *, count: int, max_seconds: float):
        self._trainer, self._sounds = trainer, sounds
        self.rate = trainer.cfg.sampling_rate
        frame = trainer.cfg.frame_samples
        count = min(count, len(sounds))
        waves = [whole(sounds, i)[: round(max_seconds * self.rate)] for i in range(count)]
        self._waves = waves
        size = -(-max(len(wave) for wave in waves) // frame) * frame
        self._padded = np.stack([np.pad(wave, (0, size - len(wave))) for wave in waves])
        everywhere = None if trainer.mesh is None else NamedSharding(trainer.mesh, P())
        self._through = jax.jit(
            lambda codec, wave: codec.decode(codec.encode(wave)), out_shardings=everywhere
        )

    @property
    def compilations(self) -> int:
        """How often the program was compiled: once."""
        return self._through._cache_size()

    def __call__(self, state: TrainState, frozen: dict[str, Any]) -> list[Reconstruction]:
        """The sounds as the codec gives them back now."""
        mesh = self._trainer.mesh
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            codec = self._trainer.model_of(state, frozen).codec
            made = np.asarray(jax.device_get(self._through(codec, self._padded)))
        return self._named([m[: len(wave)] for m, wave in zip(made, self._waves, strict=True)])

    def recorded(self, state: TrainState, frozen: dict[str, Any]) -> list[Reconstruction]:
        """The sounds as they are."""
        return self._named(self._waves)

    def _named(self, waves: Sequence[np.ndarray]) -> list[Reconstruction]:
        return [
            Reconstruction(self._sounds.name(i), np.clip(wave, -1, 1))
            for i, wave in enumerate(waves)
        ]


def make_sampler(
    config: RunConfig,
    trainer: Trainer,
    source: str | None,
    data: BatchIterator,
    held_out: Evaluation | None,
) -> Samples:
    """Of the first held-out sounds, or the first of training where there are none."""
    return Samples(
        trainer,
        (data if held_out is None else held_out).mixture,
        count=config.num_samples,
        max_seconds=config.sample_seconds,
    )


def save_model(directory: str, model: CodecModel, sizes: CodecConfig, source: str | None) -> None:
    """The Codec; replaces what an earlier run left."""
    if jax.process_index():
        return
    if not paths.is_remote(directory):
        save_codec(directory, sizes, model.codec, overwrite=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "model")
        save_codec(local, sizes, model.codec)
        for file in sorted(os.listdir(local)):
            paths.upload(os.path.join(local, file), os.path.join(directory, file))
