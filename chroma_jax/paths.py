"""Paths as users write them, on file systems and in object stores (gs://bucket/folder), and files that appear whole or not at all.

Only the standard library is imported with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def expand(path: str | os.PathLike) -> str:
    """The path with a leading `~` or `~user` opened, as the shell does where it can; `scheme://...` stays as it is."""
    return os.path.expanduser(os.fspath(path))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is `scheme://...`, no path of a file system."""
    return _SCHEME.match(os.fspath(path)) is not None


def check_remote(path: str | os.PathLike) -> None:
    """Raises ValueError for a place that is neither on a file system nor in an object store that can be used here."""
    scheme, separator, _ = os.fspath(path).partition("://")
    if not is_remote(path):
        return
    if scheme != "gs":
        raise ValueError(f"{scheme}{separator}... is not supported: a path, or gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError("gs:// needs gcsfs: pip install 'chroma_jax[gcs]'")


def absolute(path: str | os.PathLike) -> str:
    """The path from the root on, `~` opened; one in an object store as it is, without a slash at its end.

    Raises ValueError for an object store that cannot be used here.
    """
    check_remote(path)
    return os.fspath(path).rstrip("/") if is_remote(path) else os.path.abspath(expand(path))


def names(directory: str | os.PathLike) -> list[str]:
    """Names in a directory; none where it is not there, as a folder without objects."""
    try:
        return sorted(path.name for path in at(directory).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def size(path: str | os.PathLike) -> int:
    """Bytes of a file."""
    # epath also asks for the owner's name, which not every machine has.
    return at(path).stat().length if is_remote(path) else os.path.getsize(path)


def upload(source: str, target: str) -> None:
    """A local file, or a directory with all that is in it, to a place anywhere."""
    if os.path.isdir(source):
        for name in sorted(os.listdir(source)):
            upload(os.path.join(source, name), os.path.join(target, name))
        return
    with open(source, "rb") as f, at(target).open("wb") as there:
        shutil.copyfileobj(f, there, 16 * 2**20)


def at(path: str | os.PathLike) -> Any:
    """The path as an `etils.epath.Path`: pathlib's methods, wherever it lies."""
    from etils import epath

    return epath.Path(os.fspath(path))


def move(source: str, target: str) -> None:
    """A directory to another place of the same file system or object store, whose parent is made."""
    if not is_remote(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rename(source, target)
        return
    for name in names(source):
        file = os.path.join(source, name)
        if at(file).is_dir():
            move(file, os.path.join(target, name))
        else:
            at(os.path.join(target, name)).write_bytes(at(file).read_bytes())
            at(file).unlink()


def same(a: str | os.PathLike, b: str | os.PathLike) -> bool:
    """Whether two paths name one file or directory, through links too, whether or not it is there."""
    a, b = expand(a), expand(b)
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return os.path.realpath(a) == os.path.realpath(b)


def within(path: str | os.PathLike, directory: str | os.PathLike) -> bool:
    """Whether a path is the directory or in it, through links too."""
    path, directory = os.path.realpath(expand(path)), os.path.realpath(expand(directory))
    return os.path.commonpath([path, directory]) == directory


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """The name of a new file beside `path`, which takes its place if the block ends well and vanishes otherwise.

    Every call has its own, so that threads and processes that write one file never meet: the last one's is there in the end. The
    name is short whatever the target's is, because what a directory allows a name counts for this one, too. Raises OSError.
    """
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex[:16]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
