"""A model as a flat tuple of arrays: what a program that is called every 160 ms should be given.

JAX walks its arguments on every call, and a tree of nnx modules is walked in Python: a third of a millisecond for a Chroma with
stacked layers, two with its layers apart. A tuple costs microseconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax

M = TypeVar("M")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Shape:
    """A tree without its leaves. Compared as it is on every call, so by identity first."""

    tree: Any

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Shape) and self.tree == other.tree)

    def __hash__(self) -> int:
        return hash(self.tree.num_leaves)


class Held(NamedTuple):
    """A module, taken apart. Pass it to jitted functions that begin with `opened`."""

    shape: _Shape
    leaves: tuple[jax.Array, ...]

    @property
    def cfg(self) -> Any:
        """The module's configuration."""
        return opened(self).cfg


def held(model: Any) -> Held:
    """The module as a flat tuple; it shares the arrays."""
    leaves, tree = jax.tree.flatten(model)
    return Held(_Shape(tree), tuple(leaves))


def opened(model: M | Held) -> M:
    """The module of a `Held`; anything else as it is."""
    return jax.tree.unflatten(model.shape.tree, model.leaves) if isinstance(model, Held) else model
