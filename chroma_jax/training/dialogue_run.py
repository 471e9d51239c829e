"""What a run of objective "speech" or "text" begins with, reads and leaves behind: dialogues and a whole Chroma."""

from __future__ import annotations

import os
from typing import Any

import jax

from chroma_jax import checkpoint, sharding
from chroma_jax.audio.prompt import Processor
from chroma_jax.checkpoint.torch_files import CONFIG_FILE, side_files
from chroma_jax.config import ChromaConfig
from chroma_jax.data import metadata as md
from chroma_jax.data.mixture import Mixture
from chroma_jax.data.pipeline import BatchIterator, Evaluation, make_evaluation, make_pipeline
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.training.config import TEXT
from chroma_jax.training.objectives.dialogue import check_hidden
from chroma_jax.training.run_config import RunConfig, parse_sources
from chroma_jax.training.samples import Samples
from chroma_jax.training.step import Trainer, TrainState


def read_sizes(config: RunConfig) -> tuple[str | None, ChromaConfig]:
    """(directory of the checkpoint that the run begins with, or None; the model's configuration)."""
    source = config.model.checkpoint and checkpoint.resolve_source(config.model.checkpoint)
    return source, checkpoint.read_config(source) if source else config.model.sizes()


def open_data(config: RunConfig, sizes: ChromaConfig) -> tuple[BatchIterator, Evaluation | None]:
    """Batches to train on, and those of held-out records. Raises ValueError if they were not prepared for such a model."""
    shared: dict[str, Any] = dict(
        batch_size=config.data.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        limits=config.data.limits(),
        num_shapes=config.data.num_shapes,
        reading=config.data.reading(),
    )
    sources = parse_sources(config.data.train, "data.train")
    data = make_pipeline(sizes, sources, **shared)
    if config.train.objective == TEXT:
        check_hidden(data.mixture.hidden)
    if not config.data.evaluation:
        return data, None
    sources = parse_sources(config.data.evaluation, "data.evaluation")
    return data, make_evaluation(sizes, sources, **shared)


def begin(
    config: RunConfig, trainer: Trainer, source: str | None, data: list[Any]
) -> tuple[TrainState, dict[str, Any]]:
    """(state, frozen) before the first step. Raises ValueError where data was prepared with other weights."""
    if source is None:
        return trainer.init()
    mesh = trainer.mesh
    where = None if mesh is None else sharding.param_shardings(mesh)
    loaded = checkpoint.load(source, shardings=where)
    for batches in data:
        if batches is not None:
            check_weights(batches.mixture, loaded.config, loaded.model, source)
    state, frozen = trainer.from_model(loaded.model)
    if config.model.start == "random":
        del loaded, state  # what trains is drawn anew, and needs their memory
        state = trainer.init()[0]
    return state, frozen


def check_weights(mixture: Mixture, sizes: ChromaConfig, model: ChromaModel, source: str) -> None:
    """Raises DatasetError if a dataset was made with another Codec, tokenizer or (with Reasoner states) Reasoner."""
    tokenizer = Processor.load(sizes, source).tokenizer
    prints = dict(
        codec=md.weights_fingerprint(model.codec), tokenizer=md.tokenizer_fingerprint(tokenizer)
    )
    # A sharded Reasoner is on other processes too; its values stay there.
    if mixture.hidden and jax.process_count() == 1:
        prints["reasoner"] = md.weights_fingerprint(model.reasoner)
    for dataset in mixture.datasets:
        md.check_made_for(dataset.metadata, sizes, **prints, name=dataset.directory)


def make_sampler(
    config: RunConfig,
    trainer: Trainer,
    source: str | None,
    data: BatchIterator,
    held_out: Evaluation | None,
) -> Samples:
    """What answers the first held-out records, or the first of training where there are none."""
    return Samples(
        trainer,
        (data if held_out is None else held_out).mixture,
        Processor.load(trainer.cfg, source).tokenizer,
        count=config.num_samples,
        max_seconds=config.sample_seconds,
        seed=config.seed,
    )


def save_model(directory: str, model: ChromaModel, sizes: ChromaConfig, source: str | None) -> None:
    """The whole model with the tokenizer files of the checkpoint that it began with; replaces what an earlier run left."""
    extra = []
    if source is not None:
        extra = [os.path.join(source, n) for n in side_files(source) if n != CONFIG_FILE]
    checkpoint.save(directory, sizes, model, extra, overwrite=True)
