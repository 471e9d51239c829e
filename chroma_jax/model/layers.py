"""What every stage is made of: parameters, normalisation, the layer scan.

Axes: D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def over_layers(
    body: Callable[[Any, tuple], tuple[Any, Any]], carry: Any, layers: nnx.Module, *xs: jax.Array
) -> tuple[Any, Any]:
    """lax.scan of body(carry, (layer, *xs)) over stacked layers, or the same one by one over an nnx.List of them."""
    if not isinstance(layers, nnx.List):
        return jax.lax.scan(body, carry, (layers, *xs))
    # Traced once and then copied: the program is the same, and is made in half the time.
    body = jax.jit(body, inline=True)
    outs = []
    for index, layer in enumerate(layers):
        carry, out = body(carry, (layer, *(x[index] for x in xs)))
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)
