"""Files that are whole or not there. Imports nothing of JAX: programs without a model use it too."""

from __future__ import annotations

import os
import secrets

from chroma_jax import paths


def write_atomically(path: str, data: bytes) -> None:
    """A file that has all of `data` or does not exist, also after a power cut."""
    if paths.is_remote(path):  # objects are whole or not there
        paths.at(path).write_bytes(data)
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    sync_directory(folder)


def sync_directory(folder: str) -> None:
    """Makes renames in a directory last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
