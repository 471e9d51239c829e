"""A run from beginning to end: model, trainer, data, restore, steps, checkpoints, and the trained model as a directory.

    <workdir>/checkpoints    to resume from        <workdir>/tensorboard    scalars and sample replies
    <workdir>/samples        the same replies      <workdir>/model          what `chroma_jax.generate --checkpoint` loads

A run that is started again in its workdir goes on where the newest checkpoint stands: same parameters, moments, step and data, bit for
bit what an uninterrupted run has.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from chroma_jax import checkpoint, paths, sharding
from chroma_jax.audio.prompt import Processor
from chroma_jax.checkpoint.torch_files import CONFIG_FILE, side_files
from chroma_jax.config import ChromaConfig
from chroma_jax.data import metadata as md
from chroma_jax.data.mixture import Mixture
from chroma_jax.data.pipeline import BatchIterator, Evaluation, make_evaluation, make_pipeline
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.training import samples
from chroma_jax.training.checkpoints import Checkpoints, Position, abstract, changes, reason
from chroma_jax.training.progress import Progress, mean, positions
from chroma_jax.training.run_config import RunConfig, parse_sources
from chroma_jax.training.samples import Samples
from chroma_jax.training.step import Trainer, TrainState, build
from chroma_jax.training.step_flops import StepFlops

CHECKPOINTS, TENSORBOARD, MODEL, SAMPLES = "checkpoints", "tensorboard", "model", "samples"
EXPORTS = ("end", "now", "never")


class NonFiniteError(ValueError):
    """A loss or gradient became infinite or not a number. The newest checkpoint is from before it."""


class Outcome(NamedTuple):
    """How a run ended."""

    step: int
    signal: int | None  # that asked it to stop, or None
    train: dict[str, float] | None  # metrics of the last interval
    evaluation: dict[str, float] | None  # of held-out records, the last time
    model: str | None  # the directory of the trained model, where it was written


def train(
    config: RunConfig,
    workdir: str | os.PathLike,
    *,
    export: str = "end",
    say: Callable[[str], None] = print,
) -> Outcome:
    """Trains, or goes on training, until `config.steps`. Every process of a run calls it.

    SIGTERM and SIGINT end it after the step that is running, with a checkpoint; a second one ends it at once.

    Args:
      config: the run.
      workdir: where everything it makes is, or will be.
      export: the trained model is written at the "end", "never", or "now": without a step, from the newest checkpoint.
      say: told each line, by the first process alone.

    Raises:
      NonFiniteError: names step and records.
      ValueError, OSError: what the caller can mend; checkpoints stay.
    """
    if export not in EXPORTS:
        raise ValueError(f"export must be one of {', '.join(EXPORTS)}, got {export!r}")
    workdir = os.path.abspath(paths.expand(workdir))
    first = jax.process_index() == 0
    say = say if first else lambda line: None

    # Everything that can be wrong, before the weights are read.
    source = config.model.checkpoint and checkpoint.resolve_source(config.model.checkpoint)
    if source and paths.same(source, os.path.join(workdir, MODEL)):
        raise ValueError(
            f"model.checkpoint is {source}, where this run writes its own model: choose another --workdir"
        )
    sizes = checkpoint.read_config(source) if source else config.model.sizes()
    trainer = build(sizes, config.train)
    trainer.check_rows(config.data.batch_size)
    data, held_out = open_data(config, sizes)
    trainer.check_hidden(data.mixture.hidden)
    say(trainer.summary())
    for line in data.mixture.describe():
        say(line)
    make_workdir(workdir)

    with Checkpoints(os.path.join(workdir, CHECKPOINTS), config.keep) as saved:
        if export == "now" and not saved.steps:
            raise ValueError(f"{workdir} has no checkpoint to write a model from")
        state, frozen = begin(config, trainer, source, [data, held_out])
        step = 0
        if saved.steps:
            like = abstract(state)
            del state  # its memory is wanted for what is restored
            state, step = resume(saved, like, data, config, say)
        run = _Run(config, trainer, data, held_out, saved, say)
        if export != "now":
            saved.check_room(state)  # now rather than after the steps up to the first one
            if config.sample_every:
                run.sampler = make_sampler(config, trainer, source, data, held_out)
            state, step = run.steps(state, frozen, step, workdir if first else None)
        saved.wait()
        if run.signal is not None:
            say(
                f"stopped by {signal.Signals(run.signal).name} after step {step}, which is saved; "
                "the same command resumes there"
            )
        written = None
        if export == "now" or (export == "end" and run.signal is None):
            written = os.path.join(workdir, MODEL)
            try:
                save_model(written, trainer.model_of(state, frozen), trainer.cfg, source)
            except (OSError, ValueError) as e:
                raise OSError(
                    f"the model could not be written to {written}: {reason(e)}; its checkpoint is there: --export=now "
                    "writes it once it can be"
                ) from e
            say(f"the trained model is in {written}")
    return Outcome(step, run.signal, run.shown, run.evaluated, written)


def make_workdir(directory: str) -> None:
    """Makes it, if it is not there. Raises OSError naming it where nothing can be written into it."""
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as e:
        raise OSError(f"--workdir: {directory} cannot be written to: {e.strerror}") from e


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


def resume(
    saved: Checkpoints,
    like: TrainState,
    data: BatchIterator,
    config: RunConfig,
    say: Callable[[str], None],
) -> tuple[TrainState, int]:
    """(state, steps done) of the newest checkpoint that can be read, with the data at its place.

    Raises ValueError for checkpoints of another model or other data.
    """
    state, position = saved.restore(like)
    changed = changes(position.config, config.to_dict())
    try:
        data.set_state(position.data)
    except ValueError as e:
        what = "; ".join(changed) or "the dataset itself has changed"
        raise ValueError(
            f"{saved.directory}: these checkpoints are of a run with other data, seed, batch size or shapes ({what}); "
            "choose another --workdir"
        ) from e
    say(f"resuming after step {position.step}")
    for line in changed:
        say(f"changed since then: {line}")
    return state, position.step


def save_model(directory: str, model: ChromaModel, sizes: ChromaConfig, source: str | None) -> None:
    """The whole model with the tokenizer files of the checkpoint that it began with; replaces what an earlier run left."""
    extra = []
    if source is not None:
        extra = [os.path.join(source, n) for n in side_files(source) if n != CONFIG_FILE]
    checkpoint.save(directory, sizes, model, extra, overwrite=True)


class _Run:
    """The steps of a run, and what it has seen."""

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        data: BatchIterator,
        held_out: Evaluation | None,
        saved: Checkpoints,
        say: Callable[[str], None],
    ):
        self.config, self.trainer, self.data = config, trainer, data
        self.held_out, self.saved, self.say = held_out, saved, say
        self.sampler: Samples | None = None
        self._flops = StepFlops(trainer)
        self._workdir: str | None = None
        self.signal: int | None = None
        self.shown: dict[str, float] | None = None
        self.evaluated: dict[str, float] | None = None

    def steps(
        self, state: TrainState, frozen: dict[str, Any], step: int, workdir: str | None
    ) -> tuple[TrainState, int]:
        """From `step` to the end, or to a signal: (state, steps done). Writes under `workdir`, or nothing."""
        config, trainer, last = self.config, self.trainer, self.config.steps
        if step >= last:
            self.say(f"{step} steps are done, {last} were asked for")
            return state, step
        self._workdir = workdir
        folder = None if workdir is None else os.path.join(workdir, TENSORBOARD)
        devices = () if trainer.mesh is None else trainer.mesh.devices.flat
        progress = Progress(last, self.say, folder, step, devices)
        unchecked = None
        try:
            with _Signals() as signals:
                while step < last and self.signal is None:
                    began = time.monotonic()
                    batch = next(self.data)
                    waited = time.monotonic() - began
                    known = trainer.compilations
                    state, metrics = trainer.train_step(state, frozen, batch)
                    step += 1
                    progress.add(
                        metrics,
                        began,
                        waited,
                        flops=self._flops(batch),
                        tokens=positions(batch, config.train.objective),
                        compiled=trainer.compilations > known,
                    )
                    # While the devices take this step, the host looks at the one before it.
                    self._check(unchecked)
                    unchecked = step, metrics, batch.record_ids
                    self.signal = signals.asked(step)
                    ends = step == last or self.signal is not None
                    log, evaluate, save = (
                        ends or step % every == 0
                        for every in (config.log_every, config.eval_every, config.save_every)
                    )
                    sample = self.sampler is not None and self.signal is None
                    sample &= ends or step % max(config.sample_every, 1) == 0
                    if log or evaluate or save or sample:
                        self._check(unchecked)
                        unchecked = None
                    if log:
                        self.shown = progress.report(step)
                    began = time.monotonic()
                    if save:
                        position = Position(step, self.data.get_state(), config.to_dict())
                        self.saved.save(state, position)
                    if evaluate and self.held_out is not None and self.signal is None:
                        self.evaluated = self._evaluate(state, frozen)
                        progress.evaluation(step, self.evaluated)
                    if sample:
                        self._sample(state, frozen, step, progress)
                    progress.pause(time.monotonic() - began)
        finally:
            progress.close()
        return state, step

    def _evaluate(self, state: TrainState, frozen: dict[str, Any]) -> dict[str, float]:
        return mean([self.trainer.eval_step(state, frozen, batch) for batch in self.held_out])

    def _sample(
        self, state: TrainState, frozen: dict[str, Any], step: int, progress: Progress
    ) -> None:
        """Speaks, and writes it down. That a sample cannot be written is said, and ends nothing."""
        sampler = self.sampler
        if not sampler.compilations:
            answers = sampler.recorded(state, frozen)
            progress.recorded(step, answers, sampler.rate)
            self._write_samples("record", samples.ANSWERS, answers)
        replies = sampler(state, frozen)
        progress.samples(step, replies, sampler.rate)
        self._write_samples(f"step_{step:06d}", samples.REPLIES, replies)

    def _write_samples(self, folder: str, name: str, made: list[samples.Sample]) -> None:
        if self._workdir is None:
            return
        folder = os.path.join(self._workdir, SAMPLES, folder)
        try:
            samples.write(folder, name, made, self.sampler.rate)
        except (OSError, ValueError) as e:
            self.say(f"samples could not be written to {folder}: {e}")

    def _check(self, done: tuple[int, Any, np.ndarray] | None) -> None:
        """Raises NonFiniteError if a step's loss or gradient was not finite."""
        if done is None or bool(done[1]["finite"]):
            return
        step, metrics, ids = done
        if jax.process_count() > 1:  # the culprit may be another process's
            ids = multihost_utils.process_allgather(ids, tiled=True)
        names = []
        for number in ids.tolist():
            dataset, local = self.data.mixture.find(number)
            names.append(f"{dataset.directory}#{local} ({dataset[local].id})")
        raise NonFiniteError(
            f"step {step}: the loss is {float(metrics['loss'])} and the gradient's norm {float(metrics['grad_norm'])}; "
            f"the batch's records are {', '.join(names)}; the newest checkpoint is of step {max(self.saved.steps, default=0)}"
        )


class _Signals:
    """SIGTERM and SIGINT are remembered instead of obeyed, once each; a second one does what it always did.

    With several processes jax.distributed watches for SIGTERM, and all processes agree on the step after which they stop.
    """

    def __init__(self):
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: Any) -> None:
        self._number = number
        signal.signal(number, self._before[number])

    def asked(self, step: int) -> int | None:
        """The signal that asks to stop after `step`, on every process alike."""
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._number
