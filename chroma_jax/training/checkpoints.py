"""The checkpoints of a run: what a step changes, where the data stands, and which run it was.

    <workdir>/checkpoints/<step>    Orbax: TrainState; beside it, as its metadata, the data's position and the run's configuration
    <workdir>/damaged/<step>-<n>    what could not be read, put aside

Frozen parameters are not saved: they come from the checkpoint that the run began with. A checkpoint is written under another
name and renamed when it is whole, so a process that dies leaves the ones before untouched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from chroma_jax import paths
from chroma_jax.checkpoint.literal import literal
from chroma_jax.checkpoint.params import path_name
from chroma_jax.data.metadata import fingerprint
from chroma_jax.training.step import TrainState

_SPARE_BYTES = 64 * 2**20
_READINGS = 20  # attempts to read what another process keeps replacing


# Configuration that decides which parameters and moments there are.
_OF_THE_STATE = ("model.", "train.objective", "train.trains", "train.lora")


class Position(NamedTuple):
    """What of a run is not in its TrainState."""

    step: int  # steps done
    data: dict[str, Any]  # state of the data's iterator
    config: dict[str, Any]  # RunConfig.to_dict()
    base: str | None = (
        None  # `base_fingerprint` of what is frozen; None in checkpoints of before it was kept
    )


def structure(state: Any) -> str:
    """A fingerprint of names, shapes and dtypes: states of different models, stages or LoRA ranks differ in it."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return fingerprint([[path_name(p), list(x.shape), str(x.dtype)] for p, x in leaves])


def base_fingerprint(frozen: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for every bit of the frozen parameters, however they are sharded.

    Sums of integers, which wrap around, are the same in any order: each process adds up what it has.
    """

    numbers = jax.tree.map(_number, frozen)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(numbers))
    return fingerprint([[path_name(path), x.tolist()] for path, x in leaves])


@jax.jit
def _number(x: jax.Array) -> jax.Array:
    kind = f"uint{8 * x.dtype.itemsize}"
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Two sums of which the second is far from linear: what changes neither is no accident.
    mixed = (bits ^ (place * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
    return jnp.stack([(bits * (2 * place + 1)).sum(), (mixed ^ (mixed >> 15)).sum()])


class Checkpoints:
    """The newest `keep` checkpoints of a directory; saves go on while training does. A context manager.

    All processes of a run make it and call its methods together; `directory` is on a file system that they share.

    Args:
      directory: of the checkpoints.
      keep: how many stay.
      reading: only reads, and leaves everything as it is: the directory may be that of a run that goes on meanwhile.
    """

    def __init__(self, directory: str | os.PathLike, keep: int, *, reading: bool = False):
        self.directory = paths.absolute(directory)
        self._reading = reading
        self._checkpointer = ocp.training.Checkpointer(
            literal(self.directory),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=not reading,
        )
        self._saving: ocp.AsyncResponse[bool] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):  # whoever had to know has called `wait`
            self.wait()
        self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Of which there is a checkpoint, ascending."""
        return [found.step for found in self._checkpointer.checkpoints]

    def save(self, state: TrainState, position: Position) -> None:
        """Copies the state to the host and writes it in the background; waits for a save that is not done yet.

        Raises OSError where there is no room; a save that fails later raises at the next `save` or `wait`.
        """
        self.wait()
        self.check_room(state, f"the checkpoint of step {position.step}")
        metadata = {
            "structure": structure(state),
            "data": position.data,
            "config": position.config,
            "base": position.base,
        }
        self._saving = self._checkpointer.save_async(
            position.step, state, force=True, custom_metadata=metadata
        )

    def check_room(self, state: TrainState, what: str = "a checkpoint") -> None:
        """Raises OSError, which calls the state `what`, where this process's part of it has no room on the disk."""
        nbytes = sum(
            shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards
        )
        if paths.is_remote(self.directory):
            return
        free = shutil.disk_usage(self.directory).free
        if free < nbytes + _SPARE_BYTES:
            raise OSError(
                f"not enough space in {self.directory} for {what}: "
                f"{(nbytes + _SPARE_BYTES) / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
            )

    def wait(self) -> None:
        """Until what is being written is written. Raises OSError if it could not be."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()  # an answer that nobody takes keeps its thread and its descriptors
        except Exception as e:  # whatever Orbax met in its thread
            raise OSError(
                f"a checkpoint could not be written to {self.directory}: {reason(e)}"
            ) from e

    def restore(
        self, like: TrainState, config: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, Position] | None:
        """The newest checkpoint that can be read, in the shapes and shardings of `like`; None if there are none.

        Newer ones that cannot be read are put aside, with a warning; while `reading` they are left alone.

        Args:
          like: `abstract` of a state.
          config: of the run that asks, for the message when its state is another.

        Raises:
          ValueError: the checkpoints are of another model, stage or LoRA rank; or there are some and none can be read.
        """
        for _ in range(_READINGS):
            try:
                return self._restore(like, config or {})
            except _GoneError:  # newer ones have come in its place
                self._checkpointer.reload()
        raise OSError(f"{self.directory}: its checkpoints are replaced faster than they are read")

    def _restore(
        self, like: TrainState, config: Mapping[str, Any]
    ) -> tuple[TrainState, Position] | None:
        found = self.steps
        for step in reversed(found):
            problem, state, position = None, None, None
            try:
                metadata = self._checkpointer.metadata(step).custom_metadata
                theirs = metadata["structure"]
                position = Position(
                    step, dict(metadata["data"]), dict(metadata["config"]), metadata.get("base")
                )
                if theirs == structure(like):
                    state = self._checkpointer.load(step, like)
            except Exception as e:  # damage has many faces: tensorstore, JSON, missing files
                problem = reason(e)
            if _everywhere(problem is None):
                if state is None:
                    raise ValueError(self._of_another_run(position, config))
                return state, position
            problem = problem or "another process could not read it"
            if not self._reading:
                aside = self._put_aside(step)
                logging.warning(
                    "the checkpoint of step %d is damaged, going back to the one before it; moved to %s (%s)",
                    step, aside, problem,
                )  # fmt: skip
                continue
            if not _everywhere(paths.at(os.path.join(self.directory, str(step))).exists()):
                raise _GoneError
            logging.warning(
                "the checkpoint of step %d is damaged, reading the one before it (%s)",
                step,
                problem,
            )
        if found:
            raise ValueError(
                f"none of the {len(found)} checkpoints in {self.directory} can be read; to begin anew choose another --workdir"
            )
        return None

    def _of_another_run(self, position: Position, config: Mapping[str, Any]) -> str:
        lines = changes(position.config, config) if config else []
        lines = [line for line in lines if line.startswith(_OF_THE_STATE)]
        why = f" ({few(lines)})" if lines else ""
        return (
            f"{self.directory} holds the checkpoints of another model, stage or LoRA rank{why}; "
            "choose another --workdir"
        )

    def _put_aside(self, step: int) -> str:
        folder = os.path.join(os.path.dirname(self.directory), "damaged")
        number = 0
        while paths.at(aside := os.path.join(folder, f"{step}-{number}")).exists():
            number += 1
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("chroma_jax.damaged named")
        if jax.process_index() == 0:
            paths.move(os.path.join(self.directory, str(step)), aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("chroma_jax.damaged moved")
        self._checkpointer.reload()
        return aside


def reason(error: Exception) -> str:
    """What went wrong, in a line; of a full disk without the many files that it was full for."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    full = os.strerror(errno.ENOSPC)
    return full if full in first else first


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings: what `Checkpoints.restore` wants."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: before -> now" of two nested mappings."""
    lines = []
    for key in sorted(set(before) | set(now)):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += changes(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def few(lines: Sequence[str], most: int = 2, width: int = 60) -> str:
    """The first lines, short, and how many more there are: for messages."""
    shown = [line if len(line) <= width else f"{line[: width - 3]}..." for line in lines[:most]]
    more = [f"{len(lines) - most} more"] if len(lines) > most else []
    return "; ".join([*shown, *more])


class _GoneError(Exception):
    """A checkpoint was removed while it was read, by the run that it belongs to."""


def _everywhere(here: bool) -> bool:
    """Whether it is true on every process."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))
