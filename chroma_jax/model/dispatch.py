"""Which of several ways a product, an attention or a convolution is computed in: by kind of device, and by size.

All ways of one thing give the same numbers, to rounding; which is fast was measured (`linear`, `attention`, `splash`,
`codec/convolution` say so where the ways are). The choices stand here as one value, so that a test can have every way run on a CPU
and at any size:

    with dispatch(Dispatch(platform="tpu", splash_from=1)):
        ...

It is a context of JAX's own: programs compiled under one choice are not taken for another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """The choices. Ways that are for one kind of device have no effect on others.

    platform: "cpu", "tpu" or "default" to compute everywhere as is best there; None as is best where the program runs.
    parts_from: weights of a matrix from which one row times it is computed in parts (CPU).
    splash_from, splash_head_dim: positions from which causal attention goes through the splash kernel, and what the width of a
      head must be a multiple of (TPU).
    together_queries, together_rows: positions up to which, and rows of a batch from which, attention over a cache computes all
      heads at once (TPU).
    taps_up_to: channels in times channels out up to which a convolution is a sum of products (CPU).
    """

    platform: str | None = None
    parts_from: int = 1 << 16
    splash_from: int = 256
    splash_head_dim: int = 64
    together_queries: int = 16
    together_rows: int = 2
    taps_up_to: int = 32


dispatch = jax.make_user_context(Dispatch())


def by_platform(*args: jax.Array, default: Callable, **ways: Callable) -> jax.Array:
    """ways[kind of device](*args), or default(*args) where none is named: decided when the program is lowered."""
    forced = dispatch.value.platform
    if forced is not None:
        return ways.get(forced, default)(*args)
    return jax.lax.platform_dependent(*args, default=default, **ways)
