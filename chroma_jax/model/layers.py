"""What every stage is made of: parameters, normalisation, projections.

Axes: B batch, T query length, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

INIT_STD = 0.02


def normal(rngs: nnx.Rngs, *shape: int, dtype: str, std: float = INIT_STD) -> nnx.Param:
    """A parameter drawn from N(0, std²)."""
    return nnx.Param(jax.nn.initializers.normal(std)(rngs.params(), shape, dtype))


def zeros(*shape: int, dtype: str) -> nnx.Param:
    """A parameter of zeros (biases)."""
    return nnx.Param(jnp.zeros(shape, dtype))


def rms_norm(width: int, eps: float, dtype: str, param_dtype: str, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root-mean-square normalisation over D, computed in float32, returned in `dtype`."""
    return nnx.RMSNorm(width, epsilon=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def layer_norm(
    width: int, eps: float, dtype: str, param_dtype: str, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """LayerNorm over D in float32; the two-pass variance, because E[x²] - E[x]² loses digits."""
    return nnx.LayerNorm(
        width, epsilon=eps, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, rngs=rngs
    )


def project_float32(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] times kernel [D, V] accumulated and returned in float32: logits."""
    return jnp.einsum(
        "...D,DV->...V", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32
    )


def rematerialised(layer: Callable, policy: str) -> Callable:
    """The body of a layer scan, keeping for its gradient what `LlamaConfig.remat` says and computing the rest again."""
    if policy == "none":
        return layer
    policies = jax.checkpoint_policies
    keep = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "all_dots": policies.dots_saveable,
    }
    # In a scan nothing can be merged across iterations: the barrier against it would only cost.
    return jax.checkpoint(layer, policy=keep[policy], prevent_cse=False)
