"""Rotary position embedding: plain, Llama-3-stretched, and TM-RoPE with three position components.

Axes: B batch, T query length, N heads, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequencies [H/2] in radians per position (float32).

    Llama 3's stretch divides the frequency of wavelengths above original_max / low_freq_factor by `factor`, keeps those
    below original_max / high_freq_factor, and blends in between (Llama 3.1 report; `rope_type: llama3`).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power in double, rounded once: PyTorch's float32 power is that exact, numpy's is not.
    powers = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / powers
    if rope.llama3 is None:
        return frequencies
    stretch = rope.llama3
    wavelength = 2 * math.pi / frequencies
    # 0 at the long-wave end of the band, 1 at the short-wave end.
    blend = (stretch.original_max_positions / wavelength - stretch.low_freq_factor) / (
        stretch.high_freq_factor - stretch.low_freq_factor
    )
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / stretch.factor + blend * frequencies).astype(np.float32)


def rotary_angles(
    rope: RopeConfig, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, H/2] (float32) of integer positions [B, T], or [3, B, T] for TM-RoPE.

    With three components, `rope.sections` says how many of the H/2 frequencies follow time, height and width. Equal
    components give exactly the one-component result.
    """
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim))
    if positions.ndim == 3:
        if rope.sections is None:
            raise ValueError("three-component positions need rope.sections (mrope_section)")
        component = np.repeat(np.arange(3), rope.sections)  # [H/2]
        positions = jnp.moveaxis(positions, 0, -1)[..., component]  # [B, T, H/2]
        angles = positions.astype(jnp.float32) * frequencies
    else:
        angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, N, H] by angles [B, T, H/2]; dimension h is paired with h + H/2. In float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
