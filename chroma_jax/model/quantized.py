"""Kernels and tables held in eight bits, for generation: integers or small floats times a float32 scale per output channel.

    weight[..., o] ≈ values[..., o] * scale[o],   scale[o] = largest |weight[..., o]| / largest value of the format

Only the weights are quantised. A product converts the values on their way into it and applies the scales to what comes out, so
that no dequantised copy of a weight need be kept; a table scales the rows that are looked up. Norms, biases, the audio
encoder's convolutions and the whole Codec stay as they are.

Axes: L layers, D width, N heads, H head dim, F ff width, V vocabulary, Q codebooks.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Format(NamedTuple):
    """How a value is held, and the largest one: symmetric about zero."""

    dtype: jnp.dtype
    largest: float


FORMATS = {
    "int8": Format(jnp.dtype(jnp.int8), 127.0),
    "fp8": Format(jnp.dtype(jnp.float8_e4m3fn), 448.0),
}

# Which parameters, and the axes that their products sum over (in a table: that a row has), counted from the end, so that
# stacked layers need no rule of their own.
_INPUTS = (
    (r"layers/(attention/)?[qkv]", (-3,)),  # [D, N, H]
    (r"layers/(attention/)?o", (-3, -2)),  # [N, H, D]
    (r"layers/(gate|up|down)", (-2,)),  # [D, F], [F, D]
    (r"(audio_encoder|decoder)/projection", (-2,)),  # [D, D']
    (r"(reasoner|backbone)/head|decoder/heads", (-2,)),  # [D, V], [Q, D, V]
    (r"reasoner/embedding|backbone/audio_embedding", (-1,)),  # [V, D], [Q, V, D]
)


class Quantized(nnx.Module):
    """What stands in a module in the place of a quantised nnx.Param."""

    def __init__(self, values: jax.Array, scales: jax.Array):
        self.values = nnx.Param(values)  # the kernel's shape
        self.scales = nnx.Param(scales)  # float32; that shape with 1 for the axes summed over

    def __getitem__(self, index) -> Quantized:
        """A part along the leading axes; [...] is the whole, as of a Param."""
        return Quantized(self.values[index], self.scales[index])


def input_axes(path: str) -> tuple[int, ...] | None:
    """The axes that the products with a parameter sum over, counted from the end; None for what is not quantised."""
    if path.startswith("codec/"):
        return None
    found = (axes for rule, axes in _INPUTS if re.search(rf"(^|/)({rule})$", path))
    return next(found, None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize_array(
    array: jax.Array, kind: str, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """A kernel or table -> values (int8 or float8_e4m3fn) and scales (float32, 1 in the size of `axes`).

    A channel of zeros keeps scale 1. Values that are not finite make scales that are not.
    """
    dtype, largest = FORMATS[kind]
    array = array.astype(jnp.float32)
    magnitude = jnp.max(jnp.abs(array), axis=axes, keepdims=True)
    scales = jnp.where(magnitude == 0, 1, magnitude / largest)
    values = array / scales
    values = jnp.round(values) if jnp.issubdtype(dtype, jnp.integer) else values
    return jnp.clip(values, -largest, largest).astype(dtype), scales


def quantize_param(
    path: str, array: jax.Array | np.ndarray, kind: str
) -> tuple[jax.Array, jax.Array]:
    """`quantize_array` of the parameter at `path`. Raises ValueError naming it if it is not finite."""
    values, scales = quantize_array(array, kind, input_axes(path))
    if not bool(jnp.isfinite(scales).all()):
        raise ValueError(f"{path} has values that are not finite: it cannot be quantised")
    return values, scales


def quantize_in_place(model: nnx.Module, kind: str, check: bool = False) -> None:
    """Puts a `Quantized` in the place of every kernel and table of the whole model, one after the other."""
    params = [(p, x) for p, x in nnx.iter_graph(model) if isinstance(x, nnx.Param)]
    for path, param in params:
        name = "/".join(map(str, path))
        axes = input_axes(name)
        if axes is None:
            continue
        of = (name, param[...], kind)
        values, scales = quantize_param(*of) if check else quantize_array(*of[1:], axes)
        parent = functools.reduce(getattr, path[:-1], model)
        setattr(parent, path[-1], Quantized(values, scales))


def quantize(model, kind: str):
    """The same `ChromaModel` with kernels and tables in eight bits, for generation.

    Pure: the given model stays as it is, and the two share what is not quantised. It is one parameter at a time that is
    there in float32; to have no unquantised model at all, load it so (`Chroma.from_pretrained(..., quantize=...)`).

    Args:
      model: the whole model, not quantised.
      kind: "int8" or "fp8" (float8_e4m3fn).

    Raises:
      ValueError: another kind; the model is quantised already; a parameter that is not finite.
    """
    if model.cfg.quantized is not None:
        raise ValueError(f"the model is quantised already, to {model.cfg.quantized}")
    cfg = model.cfg.with_quantized(kind)
    copy = nnx.merge(*nnx.split(model))
    quantize_in_place(copy, kind, check=True)
    copy.cfg = cfg
    return copy


def dequantize(kernel: Quantized) -> jax.Array:
    """The weights that a quantised kernel stands for, float32."""
    return kernel.values[...].astype(jnp.float32) * kernel.scales[...]
