"""Products with kernels, and rows of tables, whichever way these are held.

    plain    jnp.einsum; for several summed axes as one, where kernel and input have them side by side
    parts    one row times a large matrix, on CPUs: XLA runs it on one core there, but the parts of a batched product on all
             (twice as fast on two cores)
    padded   one row times a matrix, on TPUs: XLA gives it to the vector unit, which is slower than the memory; eight rows go to
             the matrix unit

Axes: D width in, any letter of a spec else.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.model.dispatch import by_platform, dispatch
from chroma_jax.model.quantized import Quantized

# A parameter that products are taken with, or rows from, whichever way it is held.
Kernel = nnx.Param | jax.Array | Quantized

_PARTS = 4
_TPU_ROWS = 8


class _Axes(NamedTuple):
    """What a spec says about the kernel."""

    summed: tuple[int, ...]  # those of its axes that a product sums over
    aligned: bool  # they are its first ones, and the last ones of x, in the same order


@functools.cache
def _axes(spec: str) -> _Axes:
    inputs, out = spec.split("->")
    x, kernel = inputs.split(",")
    names = "".join(axis for axis in kernel if axis not in out)
    summed = tuple(kernel.index(axis) for axis in names)
    return _Axes(summed, kernel.startswith(names) and x.endswith(names))


def project(spec: str, x: jax.Array, kernel: Kernel, dtype: str | None = None) -> jax.Array:
    """einsum(spec, x, kernel) in x's dtype; accumulated and returned in `dtype` where that is given.

    `spec` names the kernel's output axes last, in the kernel's order; an axis of the kernel that is not among them is summed.
    """
    if not isinstance(kernel, Quantized):
        return _product(spec, x, kernel[...].astype(x.dtype), dtype)
    weights = kernel.values[...].astype(x.dtype)  # exact: eight bits fit every dtype
    y = _product(spec, x, weights, "float32")
    return (y * jnp.squeeze(kernel.scales[...], _axes(spec).summed)).astype(dtype or x.dtype)


def project_float32(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x [..., D] times kernel [D, V] accumulated and returned in float32: logits."""
    return project("...D,DV->...V", x, kernel, "float32")


def embed(table: Kernel, index: jax.Array | tuple[jax.Array, ...], dtype: str) -> jax.Array:
    """table [..., D] at indices of its leading axes, in `dtype`."""
    if isinstance(table, Quantized):
        values, scales = table.values[...][index], table.scales[...][index]
        return (values.astype(jnp.float32) * scales).astype(dtype)
    return table[...][index].astype(dtype)


def _product(spec: str, x: jax.Array, weights: jax.Array, dtype: str | None) -> jax.Array:
    axes = _axes(spec)
    width = math.prod(weights.shape[axis] for axis in axes.summed)
    if x.size != width or x.ndim == len(axes.summed):
        return _plain(spec, x, weights, dtype)
    plain = functools.partial(_plain, spec, dtype=dtype)
    padded = functools.partial(_padded, spec, dtype=dtype)
    large = x.dtype == jnp.float32 and weights.size >= dispatch.value.parts_from
    in_parts = functools.partial(_in_parts, spec, dtype=dtype)
    cpu = in_parts if large and axes.aligned and width % _PARTS == 0 else plain
    return by_platform(x, weights, cpu=cpu, tpu=padded, default=plain)


def _plain(spec: str, x: jax.Array, weights: jax.Array, dtype: str | None) -> jax.Array:
    summed, aligned = _axes(spec)
    if aligned and len(summed) > 1:
        # One summed axis for several: XLA on CPUs would copy the kernel to sum over more.
        x = x.reshape(*x.shape[: -len(summed)], -1)
        weights = weights.reshape(-1, *weights.shape[len(summed) :])
        inputs, out = spec.split("->")
        left, kernel = inputs.split(",")
        first = kernel[0]
        spec = f"{left[: -len(summed)]}{first},{first}{kernel[len(summed) :]}->{out}"
    return jnp.einsum(spec, x, weights, preferred_element_type=dtype)


def _in_parts(spec: str, x: jax.Array, weights: jax.Array, dtype: str | None) -> jax.Array:
    """A single row, the axes aligned."""
    out = jax.eval_shape(functools.partial(_plain, spec, dtype=dtype), x, weights)
    parts = weights.reshape(_PARTS, x.size // _PARTS, -1)
    y = jnp.einsum("PI,PIO->PO", x.reshape(_PARTS, -1), parts)
    return y.sum(axis=0).reshape(out.shape).astype(out.dtype)


def _padded(spec: str, x: jax.Array, weights: jax.Array, dtype: str | None) -> jax.Array:
    """A single row x [1, ...]."""
    room = [(0, _TPU_ROWS - 1)] + [(0, 0)] * (x.ndim - 1)
    return _plain(spec, jnp.pad(x, room), weights, dtype)[:1]
