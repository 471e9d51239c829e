"""What the first of several processes does for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

_BYTES = 4096


@contextlib.contextmanager
def by_first(enter: Callable[[], contextlib.AbstractContextManager[str]]) -> Iterator[str]:
    """The first process enters a context; the block has its string on every process.

    An error on the way in is raised everywhere: ValueError or OSError on the first process, ValueError with its words on the others,
    which would wait for it in vain otherwise.
    """
    if jax.process_count() == 1:
        with enter() as value:
            yield value
        return
    with contextlib.ExitStack() as stack:
        value, problem = "", None
        if jax.process_index() == 0:
            try:
                value = stack.enter_context(enter())
            except (ValueError, OSError) as e:
                problem = e
        told = _from_first(f" {value}" if problem is None else f"!{problem}")
        if problem is not None:
            raise problem
        if told.startswith("!"):
            raise ValueError(f"process 0: {told[1:]}")
        yield told[1:]


def _from_first(text: str) -> str:
    """The first process's string, on every process."""
    encoded = text.encode("utf-8", "surrogateescape")[:_BYTES]
    buffer = np.zeros(_BYTES, np.uint8)
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    sent = bytes(multihost_utils.broadcast_one_to_all(buffer)).rstrip(b"\0")
    return sent.decode("utf-8", "surrogateescape")
