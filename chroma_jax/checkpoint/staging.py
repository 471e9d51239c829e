"""Directories that appear whole or not at all.

Everything is written into a hidden sibling of the target, which takes the target's name when all is there. Whatever
interrupts the writing, the target is what it was before; what a killed process left behind is swept up by the next one
that writes to the same target.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from chroma_jax import paths
from chroma_jax.checkpoint.locking import LockedError, exclusive
from chroma_jax.checkpoint.torch_table import CheckpointError

# A complete checkpoint, ours or PyTorch's, has one of these. Nothing else is ever overwritten.
_CHECKPOINT_MARKS = ("chroma_jax.json", "config.json")
# Beyond the arrays themselves: metadata, configuration, tokenizer.
_SPARE_BYTES = 64 * 2**20
_LONGEST_NAME = 255  # bytes


@contextlib.contextmanager
def staged(out: str | os.PathLike, *, overwrite: bool, shared: bool = False) -> Iterator[str]:
    """A directory to write into, which becomes `out` if the block ends well and vanishes otherwise.

    Args:
      out: the target. Its parent directories are made.
      overwrite: whether a checkpoint that is there may be replaced. It stays until the new one is complete.
      shared: whether other processes, on other hosts, write into it too. Then one in an object store is written there, in its place.

    Raises CheckpointError before the block runs if `out` is occupied, cannot be written, or is being written by another
    process.
    """
    out = paths.absolute(out)
    if paths.is_remote(out):
        with _in_an_object_store(out, overwrite, shared) as stage:
            yield stage
        return
    stage, replaced, lock = (_sibling(out, kind) for kind in ("incomplete", "replaced", "lock"))
    check_target(out, overwrite)
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(os.path.dirname(out), exist_ok=True)
            stack.enter_context(exclusive(lock, f"another process is writing {out}"))
            os.makedirs(stage, exist_ok=True)
        except LockedError as e:
            raise CheckpointError(str(e)) from e
        except OSError as e:
            raise CheckpointError(f"cannot write to {out}: {e.strerror}") from e
        try:
            _recover(out, replaced)
            check_target(out, overwrite)
            _empty(stage)
            yield stage
            _swap(stage, out, replaced)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def _sibling(out: str, kind: str) -> str:
    """A hidden name beside `out`, also where a name that has a few letters more would be too long."""
    parent, name = os.path.split(out)
    hidden = f".{name}.{kind}"
    if len(os.fsencode(hidden)) > _LONGEST_NAME:
        hidden = f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.{kind}"
    return os.path.join(parent, hidden)


@contextlib.contextmanager
def _in_an_object_store(out: str, overwrite: bool, shared: bool) -> Iterator[str]:
    """Nothing can be renamed there: what is made here is sent when it is complete, and is no checkpoint until its manifest is there."""
    folder, name = os.path.split(out)
    lock = os.path.join(folder, f".{name}.lock")
    check_target(out, overwrite)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(lock, f"another process is writing {out}"))
        except LockedError as e:
            raise CheckpointError(str(e)) from e
        check_target(out, overwrite)
        try:
            if shared:
                _remove(out)
                yield out
                return
            with tempfile.TemporaryDirectory(prefix="chroma_jax.") as stage:
                yield stage
                _remove(out)
                for entry in sorted(
                    os.listdir(stage), key=lambda name: name == _CHECKPOINT_MARKS[0]
                ):
                    paths.upload(os.path.join(stage, entry), os.path.join(out, entry))
        except BaseException:
            # Without its marks it is nothing; what was there before is gone only if the new one was on its way.
            if shared:
                _remove(out)
            raise


def _remove(out: str) -> None:
    if paths.names(out):
        paths.at(out).rmtree()


def _check_content(out: str, content: list[str], overwrite: bool) -> None:
    if content and not overwrite:
        raise CheckpointError(f"{out} exists and is not empty; --overwrite replaces it")
    if content and not any(mark in content for mark in _CHECKPOINT_MARKS):
        raise CheckpointError(f"{out} is no checkpoint: it will not be overwritten")


def check_target(out: str, overwrite: bool) -> None:
    """Raises CheckpointError if `out` is occupied, or its name cannot be."""
    if paths.is_remote(out):
        _check_content(out, paths.names(out), overwrite)
        return
    try:
        os.lstat(out)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:  # File name too long
        raise CheckpointError(f"cannot write to {out}: {e.strerror}") from e
    if os.path.isdir(out):
        _check_content(out, os.listdir(out), overwrite)
    elif os.path.lexists(out):
        raise CheckpointError(f"{out} is a file; a directory is wanted")


def _recover(out: str, replaced: str) -> None:
    """A process killed between the two renames of `_swap` leaves the old checkpoint aside: puts it back."""
    if os.path.isdir(replaced):
        if os.path.lexists(out):
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, out)


def _empty(stage: str) -> None:
    for name in os.listdir(stage):
        path = os.path.join(stage, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def check_space(stage: str, nbytes: int) -> None:
    """Raises CheckpointError if there is no room for `nbytes` more in a staged directory."""
    if paths.is_remote(stage):
        return
    free, wanted = shutil.disk_usage(stage).free, nbytes + _SPARE_BYTES
    if free < wanted:
        raise CheckpointError(
            f"not enough space in {os.path.dirname(stage)}: {wanted / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )


def _swap(stage: str, out: str, replaced: str) -> None:
    if os.path.isdir(out):
        os.rename(out, replaced)
    os.replace(stage, out)
    shutil.rmtree(replaced, ignore_errors=True)


def check_apart(source: str, out: str | os.PathLike) -> None:
    """Raises CheckpointError if writing `out` could touch what is being read from `source`."""
    if paths.is_remote(source) or paths.is_remote(out):
        if paths.same(source, out):
            raise CheckpointError(f"{os.fspath(out)} is the source")
        return
    if not os.path.exists(paths.expand(source)):
        return  # a Hub id, which lies nowhere
    a, b = (os.path.realpath(paths.expand(p)) for p in (source, out))
    if os.path.commonpath([a, b]) in (a, b):
        raise CheckpointError(
            f"{os.fspath(out)} and the source {source} must not contain each other"
        )
