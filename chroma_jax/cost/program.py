"""Compiling a program for a TPU that is not there, and what the compiler wrote about it."""

from __future__ import annotations

import contextlib
import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes of one device."""

    arguments: int  # what is given back in their place included
    temporary: int
    code: int


def with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """A program for a TPU, compiled to machine code, and its text.

    `as_text()` of the result would have jaxlib read the program back, which knows fewer instructions than libtpu: it fails on
    programs that use the SparseCores of v5p and v6e.
    """
    with tempfile.TemporaryDirectory() as dump:
        return compile_into(lowered, dump), dumped(dump, "after_codegen")


def compile_into(lowered: jax.stages.Lowered, dump: str) -> jax.stages.Compiled:
    """With what the compiler says about it under `dump`."""
    with _not_cached():
        return lowered.compile({"xla_dump_to": dump, "xla_dump_hlo_as_text": True})


def dumped(dump: str, stage: str) -> str:
    """The largest file of a stage, that of the step; "" where there is none."""
    found = pathlib.Path(dump).glob(f"*{stage}.txt")
    return max((path.read_text() for path in found), key=len, default="")


def bytes_held(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@contextlib.contextmanager
def _not_cached() -> Iterator[None]:
    """Without a chip a program can be put into the persistent compilation cache, but not read from it."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def amount(value: float, unit: str) -> str:
    """12345678 -> "12.3 MB"."""
    power = min(max(int(math.log10(value) // 3), 0), 5) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {'kMGTP'[power - 1] if power else ''}{unit}"
