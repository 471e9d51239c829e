"""The steps of a run, and what follows each: a line, a checkpoint, held-out records, sample replies."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from chroma_jax import paths
from chroma_jax.checkpoint import locking
from chroma_jax.data.batch import Batch
from chroma_jax.data.pipeline import BatchIterator, Evaluation
from chroma_jax.training import samples
from chroma_jax.training.checkpoints import Checkpoints, Position
from chroma_jax.training.progress import Progress, mean
from chroma_jax.training.run_config import RunConfig
from chroma_jax.training.samples import Samples
from chroma_jax.training.signals import Signals
from chroma_jax.training.step import Trainer, TrainState
from chroma_jax.training.step_flops import StepFlops

TENSORBOARD, SAMPLES = "tensorboard", "samples"


class NonFiniteError(ValueError):
    """A loss or gradient became infinite or not a number. The newest checkpoint is from before it."""


class Due(NamedTuple):
    """What follows a step."""

    log: bool
    save: bool
    evaluate: bool
    sample: bool


def due(config: RunConfig, step: int, asked_to_stop: bool = False) -> Due:
    """What follows `step`: each in its interval, all after the last one. A run that is asked to stop only logs and saves."""
    ends = asked_to_stop or step == config.steps

    def every(interval: int) -> bool:
        return interval > 0 and (ends or step % interval == 0)

    goes_on = not asked_to_stop
    return Due(
        log=every(config.log_every),
        save=every(config.save_every),
        evaluate=goes_on and every(config.eval_every),
        sample=goes_on and every(config.sample_every),
    )


class Run:
    """The steps of a run, and what it has seen."""

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        data: BatchIterator,
        held_out: Evaluation | None,
        saved: Checkpoints,
        base: str,
        hold: locking.Hold | None,
        say: Callable[[str], None],
    ):
        self.config, self.trainer, self.data = config, trainer, data
        self.held_out, self.saved, self.say = held_out, saved, say
        self.sampler: Samples | None = None
        self._base, self._hold = base, hold
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
        progress = Progress(last, self.say, folder, trainer.objective.describe, step, devices)
        unchecked = None
        try:
            with Signals() as signals:
                while step < last and self.signal is None:
                    began = time.monotonic()
                    state = trainer.prepare(state, frozen, step, self.data.batch)
                    progress.pause(time.monotonic() - began)
                    began = time.monotonic()
                    batch = self._next(signals)
                    if batch is None:
                        break
                    waited = time.monotonic() - began
                    known = trainer.compilations
                    state, metrics = trainer.train_step(state, frozen, batch)
                    step += 1
                    progress.add(
                        metrics,
                        began,
                        waited,
                        flops=self._flops(batch),
                        tokens=trainer.objective.positions(batch),
                        compiled=trainer.compilations > known,
                    )
                    # While the devices take this step, the host looks at the one before it.
                    self._check(unchecked)
                    unchecked = step, metrics, batch.record_ids
                    self.signal = signals.asked()
                    following = due(config, step, self.signal is not None)
                    if any(following):
                        self._check(unchecked)
                        unchecked = None
                    if following.log:
                        self.shown = progress.report(step)
                    began = time.monotonic()
                    if following.save:
                        self._save(state, step)
                    if following.evaluate and self.held_out is not None:
                        self._evaluate(state, frozen, step, progress, signals)
                    if following.sample and self.signal is None:
                        self._sample(state, frozen, step, progress)
                    progress.pause(time.monotonic() - began)
                self._check(unchecked)
                if self.signal is not None:  # it may have come where no checkpoint was due
                    self._save(state, step)
        finally:
            progress.close()
            self.data.close()
        return state, step

    def _next(self, signals: Signals) -> Batch | None:
        """The next batch; None where reading failed because the run, its reading processes too, is being stopped."""
        try:
            return next(self.data)
        except RuntimeError:
            self.signal = signals.number
            if self.signal is None:
                raise
            return None

    def _save(self, state: TrainState, step: int) -> None:
        """A checkpoint of `step`, unless there is one."""
        if step == 0 or step in self.saved.steps:
            return
        if self._hold is not None:
            self._hold.check()
        position = Position(step, self.data.get_state(), self.config.to_dict(), self._base)
        self.saved.save(state, position)

    def _evaluate(
        self,
        state: TrainState,
        frozen: dict[str, Any],
        step: int,
        progress: Progress,
        signals: Signals,
    ) -> None:
        """All held-out records; a signal ends it without a result."""
        metrics: list[dict[str, jax.Array]] = []
        for batch in self.held_out:
            self.signal = signals.asked()
            if self.signal is not None:
                return
            if len(metrics) > 1:  # no more than two at a time, or a signal waits for all of them
                jax.block_until_ready(metrics[-2])
            metrics.append(self.trainer.eval_step(state, frozen, batch))
        self.evaluated = mean(metrics)
        progress.evaluation(step, self.evaluated)

    def _sample(
        self, state: TrainState, frozen: dict[str, Any], step: int, progress: Progress
    ) -> None:
        """Speaks, and writes it down. That a sample cannot be written is said, and ends nothing."""
        sampler = self.sampler
        if sampler is None:
            return
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
            if not paths.is_remote(folder):
                samples.write(folder, name, made, self.sampler.rate)
                return
            with tempfile.TemporaryDirectory() as local:
                samples.write(local, name, made, self.sampler.rate)
                for file in os.listdir(local):
                    paths.upload(os.path.join(local, file), os.path.join(folder, file))
        except (OSError, ValueError) as e:
            self.say(f"samples could not be written to {folder}: {e}")

    def _check(self, done: tuple[int, Any, np.ndarray] | None) -> None:
        """Raises NonFiniteError if a step's loss or gradient was not finite."""
        if done is None or bool(done[1]["finite"]):
            return
        step, metrics, ids = done
        if jax.process_count() > 1:  # the culprit may be another process's
            ids = multihost_utils.process_allgather(ids, tiled=True)
        names = [self.data.mixture.name(number) for number in ids.tolist()]
        raise NonFiniteError(
            f"step {step}: the loss is {float(metrics['loss'])} and the gradient's norm {float(metrics['grad_norm'])}; "
            f"the batch's records are {', '.join(names)}; the newest checkpoint is of step {max(self.saved.steps, default=0)}"
        )
