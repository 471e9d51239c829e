"""Paths of users: on a file system, or in an object store as in gs://bucket/folder.

Everything that a command writes or reads in such a place goes through etils.epath here, Orbax (TensorStore) or ArrayRecord, which
know object stores themselves.
"""

from __future__ import annotations

import os
import re

from etils import epath

# What Orbax's TensorStore, ArrayRecord and epath all read and write.
SCHEMES = ("gs",)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is scheme://..., no path of a file system."""
    return _SCHEME.match(os.fspath(path)) is not None


def path_of(path: str | os.PathLike) -> epath.Path:
    """The path, for pathlib's methods, wherever it lies."""
    return epath.Path(os.fspath(path))


def full(path: str | os.PathLike) -> str:
    """The path from the root on, ~ expanded; one in an object store as it is, without a slash at its end."""
    path = os.fspath(path)
    if is_remote(path):
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path))


def join(path: str | os.PathLike, *parts: str) -> str:
    """os.path.join, in object stores too."""
    path = os.fspath(path)
    return "/".join([path.rstrip("/"), *parts]) if is_remote(path) else os.path.join(path, *parts)
