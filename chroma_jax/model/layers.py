"""What every stage is made of: parameters, normalisation, projections.

Axes: B batch, T query length, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.model.quantized import Quantized

# A parameter that products are taken with, or rows from, whichever way it is held.
Kernel = nnx.Param | jax.Array | Quantized

INIT_STD = 0.02

# One row times a matrix. XLA on CPUs runs it on one core, but the parts of a batched product on all: twice as fast on two.
_CPU_PARTS, _CPU_LARGE = 4, 1 << 16
# XLA on TPUs gives it to the vector unit, which is slower than the memory; more rows go to the matrix unit.
_TPU_ROWS = 8


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
    def plain(x, weights):
        return jnp.einsum(spec, x, weights, preferred_element_type=dtype)

    joined = spec == "BTNH,NHD->BTD"
    summed = 2 if joined else 1
    if x.ndim > summed and x.size == math.prod(x.shape[-summed:]):
        return _one_row(plain, x, weights, dtype)
    if joined:
        # One summed axis for two: XLA on CPUs would copy the kernel to sum over both.
        spec, x = "BTI,ID->BTD", x.reshape(*x.shape[:2], -1)
        weights = weights.reshape(-1, weights.shape[-1])
    return plain(x, weights)


def _one_row(plain: Callable, x: jax.Array, weights: jax.Array, dtype: str | None) -> jax.Array:
    """plain(x, weights) for a single row x [1, ...], as each kind of device does it best."""

    def padded(x, weights):
        room = [(0, _TPU_ROWS - 1)] + [(0, 0)] * (x.ndim - 1)
        return plain(jnp.pad(x, room), weights)[:1]

    def in_parts(x, weights):
        out = jax.eval_shape(plain, x, weights)
        parts = weights.reshape(_CPU_PARTS, x.size // _CPU_PARTS, -1)
        y = jnp.einsum("PI,PIO->PO", x.reshape(_CPU_PARTS, -1), parts)
        return y.sum(axis=0).reshape(out.shape).astype(out.dtype)

    large = x.dtype == jnp.float32 and weights.size >= _CPU_LARGE and x.size % _CPU_PARTS == 0
    cpu = in_parts if large else plain
    return jax.lax.platform_dependent(x, weights, cpu=cpu, tpu=padded, default=plain)


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
