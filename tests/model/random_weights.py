"""Random weights under which attention is not uniform, no two norms are alike and no bias is zero."""

from typing import Any

import jax
import numpy as np
from flax import nnx


def randomise(module: nnx.Module, seed: int = 0) -> Any:
    """The module with new parameters, in their dtypes."""
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(seed)

    def new(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        is_scale = jax.tree_util.keystr(path, simple=True, separator="/").endswith("scale")
        return jax.numpy.asarray(1 + 0.3 * noise if is_scale else 0.25 * noise, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(new, nnx.to_pure_dict(state)))


def with_config(module: nnx.Module, make) -> Any:
    """The module's parameters, in the dtypes of the module that `make` builds, under its configuration."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    cast = lambda new, old: old.astype(new.dtype)  # noqa: E731
    old = nnx.to_pure_dict(nnx.split(module)[1])
    return nnx.merge(graphdef, jax.tree.map(cast, nnx.to_pure_dict(state), old))
