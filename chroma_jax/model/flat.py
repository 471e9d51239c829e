"""A model as a flat tuple of arrays: what a program that is called every 160 ms should be given.

JAX walks its arguments on every call, and a tree of nnx modules is walked in Python: a third of a
millisecond for a Chroma with stacked layers, two with its layers apart. A tuple costs microseconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax

M = TypeVar("M")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _TreeDef:
    """A tree without its leaves. Compared as it is on every call, so by identity first."""

    tree: Any

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _TreeDef) and self.tree == other.tree)

    def __hash__(self) -> int:
        return hash(self.tree.num_leaves)


class FlatModule(NamedTuple):
    """A module, taken apart. Pass it to jitted functions that begin with `module_of`."""

    treedef: _TreeDef
    leaves: tuple[jax.Array, ...]

    @classmethod
    def of(cls, module: Any) -> FlatModule:
        """The module as a flat tuple; it shares the arrays."""
        leaves, tree = jax.tree.flatten(module)
        return cls(_TreeDef(tree), tuple(leaves))

    def module(self) -> Any:
        """The module again."""
        return jax.tree.unflatten(self.treedef.tree, self.leaves)

    @property
    def cfg(self) -> Any:
        """The module's configuration."""
        return self.module().cfg


def module_of(model: M | FlatModule) -> M:
    """The module of a `FlatModule`; anything else as it is."""
    return model.module() if isinstance(model, FlatModule) else model
