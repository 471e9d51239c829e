"""A run from beginning to end: model, trainer, data, restore, steps, checkpoints, and the trained model as a directory.

    <workdir>/checkpoints    to resume from        <workdir>/tensorboard    scalars and sample replies
    <workdir>/samples        the same replies      <workdir>/model          what `chroma_jax.generate --checkpoint` loads

A run that is started again in its workdir goes on where the newest checkpoint stands: same parameters, moments, step and data, bit for
bit what an uninterrupted run has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from chroma_jax import paths
from chroma_jax.checkpoint import locking
from chroma_jax.checkpoint.processes import by_first
from chroma_jax.data.pipeline import BatchIterator
from chroma_jax.training import codec_run, dialogue_run
from chroma_jax.training.checkpoints import (
    Checkpoints,
    abstract,
    base_fingerprint,
    changes,
    few,
    reason,
)
from chroma_jax.training.config import CODEC
from chroma_jax.training.run import Run
from chroma_jax.training.run_config import RunConfig
from chroma_jax.training.step import TrainState, build

CHECKPOINTS, MODEL = "checkpoints", "model"
EXPORTS = ("end", "now", "never")
# Configuration that decides which batches there are, and which frozen weights.
_OF_THE_DATA = ("data.", "seed")
_OF_THE_BASE = ("model.", "train.seed", "train.reasoner_dtype", "train.trains", "train.objective")


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
    workdir = paths.absolute(workdir)
    first = jax.process_index() == 0
    say = say if first else lambda line: None

    # What differs between a run on dialogues and one on sound alone.
    kind = codec_run if config.train.objective == CODEC else dialogue_run
    # Everything that can be wrong, before the weights are read.
    source, sizes = kind.read_sizes(config)
    if source and paths.same(source, os.path.join(workdir, MODEL)):
        raise ValueError(
            f"model.checkpoint is {source}, where this run writes its own model: choose another --workdir"
        )
    trainer = build(sizes, config.train)
    trainer.check_rows(config.data.batch_size)
    data, held_out = kind.open_data(config, sizes)
    reading = export == "now"
    if not reading:
        make_workdir(workdir)
    elif not paths.at(os.path.join(workdir, CHECKPOINTS)).is_dir():
        raise ValueError(f"{workdir} has no checkpoint to write a model from")
    with contextlib.ExitStack() as stack:
        hold = None if reading else stack.enter_context(owned(workdir, say))
        say(trainer.summary())
        for line in data.mixture.describe():
            say(line)
        where = os.path.join(workdir, CHECKPOINTS)
        saved = stack.enter_context(Checkpoints(where, config.keep, reading=reading))
        if reading and not saved.steps:
            raise ValueError(f"{workdir} has no checkpoint to write a model from")
        state, frozen = kind.begin(config, trainer, source, [data, held_out])
        base = base_fingerprint(frozen)
        step = 0
        if saved.steps:
            like = abstract(state)
            del state  # its memory is wanted for what is restored
            state, step = resume(saved, like, base, data, config, say)
        run = Run(config, trainer, data, held_out, saved, base, hold, say)
        if not reading:
            saved.check_room(state)  # now rather than after the steps up to the first one
            if config.sample_every:
                run.sampler = kind.make_sampler(config, trainer, source, data, held_out)
            state, step = run.steps(state, frozen, step, workdir if first else None)
        saved.wait()
        if run.signal is not None:
            say(
                f"stopped by {signal.Signals(run.signal).name} after step {step}, which is saved; "
                "the same command resumes there"
            )
        written = None
        if reading or (export == "end" and run.signal is None):
            written = os.path.join(workdir, MODEL)
            try:
                kind.save_model(written, trainer.model_of(state, frozen), trainer.cfg, source)
            except (OSError, ValueError) as e:
                raise OSError(
                    f"the model could not be written to {written}: {reason(e)}; its checkpoint is there: --export=now "
                    "writes it once it can be"
                ) from e
            say(f"the trained model is in {written}")
    return Outcome(step, run.signal, run.shown, run.evaluated, written)


def make_workdir(directory: str) -> None:
    """Makes it, if it is not there. Raises OSError naming it where nothing can be written into it."""
    if paths.is_remote(directory):
        probe = paths.at(os.path.join(directory, ".probe"))
        try:
            probe.write_bytes(b"x")
            probe.unlink()
        except Exception as e:  # of credentials, of the bucket, of the network
            raise OSError(f"--workdir: {directory} cannot be written to: {reason(e)}") from e
        return
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as e:
        raise OSError(f"--workdir: {directory} cannot be written to: {e.strerror}") from e


@contextlib.contextmanager
def owned(workdir: str, say: Callable[[str], None]) -> Iterator[locking.Hold | None]:
    """Keeps other runs out of a workdir. The first process holds it for all of a run. Raises ValueError if it is taken."""
    holds: list[locking.Hold] = []

    @contextlib.contextmanager
    def hold() -> Iterator[str]:
        busy = f"{workdir} is being trained in by another process"
        with locking.exclusive(os.path.join(workdir, ".lock"), busy, say) as one:
            holds.append(one)
            yield ""

    with by_first(hold):
        yield holds[0] if holds else None


def resume(
    saved: Checkpoints,
    like: TrainState,
    base: str,
    data: BatchIterator,
    config: RunConfig,
    say: Callable[[str], None],
) -> tuple[TrainState, int]:
    """(state, steps done) of the newest checkpoint that can be read, with the data at its place.

    Raises ValueError for checkpoints of another model, other data, or over another base.
    """
    state, position = saved.restore(like, config.to_dict())
    changed = changes(position.config, config.to_dict())
    if position.base not in (None, base):
        what = few([line for line in changed if line.startswith(_OF_THE_BASE)])
        raise ValueError(
            f"{saved.directory} was trained over other frozen weights than {config.model.checkpoint or 'these'} holds now "
            f"({what or 'they were replaced'}); bring them back or choose another --workdir"
        )
    try:
        data.set_state(position.data)
    except ValueError as e:
        what = few([line for line in changed if line.startswith(_OF_THE_DATA)])
        raise ValueError(
            f"{saved.directory}: these checkpoints are of a run with other data, seed, batch size or shapes "
            f"({what or 'the dataset itself has changed'}); choose another --workdir"
        ) from e
    say(f"resuming after step {position.step}")
    for line in changed:
        say(f"changed since then: {line}")
    return state, position.step
