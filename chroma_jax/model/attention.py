"""Attention: of whole sequences, over a cache, and within a sliding window.

    masked     all logits at once, under a mask
    splash     causal, by the kernel of `splash`: where all logits of a row [N, T, T], and what becomes of them, would go to main
               memory and back. Training at full length on TPUs does little else
    by head    over a cache, each kv head by itself
    together   over a cache, all kv heads as one, on TPUs: no head is taken out of the cache, as it would be for the matrix unit

Softmax is in float32 in all of them.

Axes: B batch, T positions, S keys, N heads, K kv heads, H head dim, C = K * H.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.model import splash
from chroma_jax.model.dispatch import by_platform, dispatch
from chroma_jax.model.kv_cache import flat
from chroma_jax.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True)
class Masked:
    """Attention of a whole sequence under a mask [B or 1, T, T]."""

    mask: jax.Array
    axes = "BTNH"  # of what comes out

    def pad(self, x: jax.Array, axis: int) -> jax.Array:
        """The sequence as it is."""
        return x

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q [B, T, N, H] over k, v [B, T, K, H] -> [B, T, N, H]."""
        return masked(q, k, v, self.mask)


@dataclasses.dataclass(frozen=True)
class Splash:
    """Causal attention of a whole sequence by the TPU kernel, or by JAX's interpreter of it."""

    interpret: bool
    axes = "BNTH"

    def pad(self, x: jax.Array, axis: int) -> jax.Array:
        """x with zeros after its T positions, which are its `axis`, up to a length that the kernel computes anyway."""
        return splash.pad(x, axis)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q [B, T, N, H] over k, v [B, T, K, H] -> [B, N, T, H]."""
        return splash.causal(q, k, v, self.interpret)


def of_sequence(width: int, head_dim: int, mask: jax.Array | None = None) -> Masked | Splash:
    """How sequences of `width` positions attend: under `mask` [B or 1, T, T], or causally where none is given."""
    if mask is not None:
        return Masked(mask)
    limits = dispatch.value
    if width >= limits.splash_from and head_dim % limits.splash_head_dim == 0 and _on_tpu():
        # A program may be compiled for TPUs where there is none; only what a test asks for here is interpreted.
        return Splash(limits.platform is not None and jax.default_backend() != "tpu")
    return Masked(jnp.tril(jnp.ones((1, width, width), bool)))


def _on_tpu() -> bool:
    """Whether what is being traced will run on TPUs, on one or under one of our meshes, with products as precise as is usual there."""
    if dispatch.value.platform is not None:
        return dispatch.value.platform == "tpu"
    if jax.config.jax_default_matmul_precision not in (None, "default", "fastest", "bfloat16"):
        return False  # the kernel refuses it for bfloat16
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "tpu" and jax.device_count() == 1
    device = mesh.abstract_device
    return (
        set(mesh.axis_names) == set(MESH_AXES) and device is not None and device.platform == "tpu"
    )


def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, T, N, H] over k, v [B, T, K, H] -> [B, T, N, H]; N / K heads share one of k and v.

    `mask` [B or 1, 1 or T, T] is true where attention is allowed.
    """
    mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def cached(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, T, N, H] over a cache's k, v [B, S, C] where mask [B, T, S] -> [B, T, N, H].

    A row of the mask without any true value gives the mean of v.
    """
    batch, width, heads, dim = q.shape
    kv_heads = k.shape[2] // dim

    def weights(logits, mask):
        logits = jnp.where(mask, logits * dim**-0.5, jnp.finfo(jnp.float32).min)
        return jax.nn.softmax(logits, axis=-1).astype(v.dtype)

    def by_head(q, k, v, mask):
        k, v = (x.reshape(batch, -1, kv_heads, dim) for x in (k, v))
        q = q.reshape(batch, width, kv_heads, -1, dim)
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
        out = jnp.einsum("BKGTS,BSKH->BTKGH", weights(logits, mask[:, None, None]), v)
        return out.reshape(batch, width, heads, dim)

    def together(q, k, v, mask):
        # Queries with zeros in the places of all heads but their own: K times the operations, which are few, and no head of the
        # cache is taken out of it.
        own = jnp.eye(kv_heads, dtype=q.dtype)[:, None, :, None]
        q = (q.reshape(batch, width, kv_heads, -1, 1, dim) * own).reshape(batch, width, heads, -1)
        logits = jnp.einsum("BTNC,BSC->BTNS", q, k, preferred_element_type=jnp.float32)
        out = jnp.einsum("BTNS,BSC->BTNC", weights(logits, mask[:, :, None]), v)
        out = out.reshape(batch, width, kv_heads, -1, kv_heads, dim)
        return (out * own).sum(axis=4).reshape(batch, width, heads, dim)

    limits = dispatch.value
    # More positions keep the matrix unit busy with their own heads; one stream alone waits for weights more than for its cache.
    few = width <= limits.together_queries and batch >= limits.together_rows
    if not few or kv_heads == 1 or _split_heads():
        return by_head(q, k, v, mask)
    return by_platform(q, k, v, mask, tpu=together, default=by_head)


def _split_heads() -> bool:
    """Whether a mesh gives the heads to several devices."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1


class Past(NamedTuple):
    """Keys and values from before a chunk; a negative position marks an empty slot."""

    k: jax.Array  # [B, S, C]
    v: jax.Array  # [B, S, C]
    positions: jax.Array  # [B, S] int32


def sliding(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, past: Past | None, window: int
) -> jax.Array:
    """q [B, T, N, H] at `positions` [B, T] over its own chunk's k, v [B, T, K, H] and what is past -> [B, T, N, H].

    A position sees itself and the window - 1 positions before it.
    """
    k, v, k_positions = flat(k), flat(v), positions
    if past is not None:
        k = jnp.concatenate([past.k, k], axis=1)
        v = jnp.concatenate([past.v, v], axis=1)
        k_positions = jnp.concatenate([past.positions, positions], axis=1)
    ago = positions[:, :, None] - k_positions[:, None, :]
    seen = (ago >= 0) & (ago < window) & (k_positions >= 0)[:, None]  # [B, T, S]
    return cached(q, k, v, seen)
