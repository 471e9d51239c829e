"""Paths as users write them, on file systems and in object stores (gs://bucket/folder), and files that appear whole or not at all.

Only the standard library is imported with it.
"""

from __future__ import annotations

import contextlib
import os
import re
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


def absolute(path: str | os.PathLike) -> str:
    """The path from the root on, `~` opened; one in an object store as it is, without a slash at its end."""
    return os.fspath(path).rstrip("/") if is_remote(path) else os.path.abspath(expand(path))


def join(path: str | os.PathLike, *parts: str) -> str:
    """`os.path.join`, in object stores too."""
    path = os.fspath(path)
    return "/".join([path.rstrip("/"), *parts]) if is_remote(path) else os.path.join(path, *parts)


def at(path: str | os.PathLike) -> Any:
    """The path as an `etils.epath.Path`: pathlib's methods, wherever it lies."""
    from etils import epath

    return epath.Path(os.fspath(path))


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
