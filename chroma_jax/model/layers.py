"""What every stage is made of: parameters, normalisation, projections.

Axes: B batch, T query length, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.model.quantized import Quantized

# A parameter that products are taken with, or rows from, whichever way it is held.
Kernel = nnx.Param | jax.Array | Quantized

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


def project(spec: str, x: jax.Array, kernel: Kernel, dtype: str | None = None) -> jax.Array:
    """einsum(spec, x, kernel) in x's dtype; accumulated and returned in `dtype` where that is given.

    `spec` names the kernel's output axes last, in the kernel's order.
    """
    if isinstance(kernel, Quantized):
        weights = kernel.values[...].astype(x.dtype)  # exact: eight bits fit every dtype
        y = _einsum(spec, x, weights, "float32")
        inputs, outputs = spec.split(",")[1].split("->")
        summed = tuple(i for i, axis in enumerate(inputs) if axis not in outputs)
        return (y * jnp.squeeze(kernel.scales[...], summed)).astype(dtype or x.dtype)
    return _einsum(spec, x, kernel[...].astype(x.dtype), dtype)


def _einsum(spec: str, x: jax.Array, weights: jax.Array, dtype: str | None) -> jax.Array:
    if spec == "BTNH,NHD->BTD":
        # One summed axis for two: XLA on CPUs would copy the kernel to sum over both.
        spec, x = "BTI,ID->BTD", x.reshape(*x.shape[:2], -1)
        weights = weights.reshape(-1, weights.shape[-1])
    return jnp.einsum(spec, x, weights, preferred_element_type=dtype)


def project_float32(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x [..., D] times kernel [D, V] accumulated and returned in float32: logits."""
    return project("...D,DV->...V", x, kernel, "float32")


def rows(table: Kernel, index: jax.Array | tuple[jax.Array, ...], dtype: str) -> jax.Array:
    """table [..., D] at indices of its leading axes, in `dtype`: embeddings."""
    if isinstance(table, Quantized):
        values, scales = table.values[...][index], table.scales[...][index]
        return (values.astype(jnp.float32) * scales).astype(dtype)
    return table[...][index].astype(dtype)


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
