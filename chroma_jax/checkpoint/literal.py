"""Directories of checkpoints whose names hold `[`, `]`, `*` or `?`: for Orbax, too, a path means what it says."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator

from etils import epath
from etils.epath.gpath import PosixGPath


def literal(path: str | os.PathLike) -> epath.Path:
    """The path as Orbax is to be given it.

    epath takes the whole of a path for a pattern when Orbax looks for what its processes wrote. Under a name with a pattern in it that
    would find nothing, so that a save loses its arrays, or find those of other checkpoints.
    """
    path = os.fspath(path)
    return epath.Path(path) if "://" in path else _LiteralPath(path)


class _LiteralPath(PosixGPath):
    def glob(self, pattern: str) -> Iterator[_LiteralPath]:
        for found in glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern)):
            yield type(self)(found)
