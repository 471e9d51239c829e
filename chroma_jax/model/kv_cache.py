"""Key/value cache of a stack of attention layers, with a length per row; `attention.cached` reads it.

The heads of a position lie side by side in one axis. So its last two axes, S and C, fill the tiles of a TPU's memory, a position
is written in one piece, and attention reads the cache as it lies: with heads apart XLA re-lays the whole cache, both ways, in every
step, which costs several times what reading it does.

Axes: L layers, B batch, T query length, S cache length, N heads, K kv heads, G heads per kv head, H head dim, C = K * H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.config import LlamaConfig


class KVCache(NamedTuple):
    """Left-aligned keys and values; slots at and beyond a row's length hold nothing and are overwritten later."""

    k: jax.Array  # [L, B, S, C]
    v: jax.Array  # [L, B, S, C]
    length: jax.Array  # [B] int32, positions written

    @property
    def size(self) -> int:
        """Positions that fit, S."""
        return self.k.shape[2]


def init_cache(cfg: LlamaConfig, batch: int, size: int) -> KVCache:
    """An empty cache for `size` positions of each of `batch` rows, in the compute dtype."""
    shape = (cfg.num_layers, batch, size, cfg.num_kv_heads * cfg.head_dim)
    zeros = jnp.zeros(shape, cfg.dtype)
    return KVCache(zeros, zeros, jnp.zeros((batch,), jnp.int32))


def resized(cache: KVCache, size: int) -> KVCache:
    """The same rows with room for `size` positions, which may be fewer than before but not than any row holds."""
    more = max(0, size - cache.size)

    def fit(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, :, :size], [(0, 0), (0, 0), (0, more), (0, 0)])

    return KVCache(fit(cache.k), fit(cache.v), cache.length)


def joined(caches: Sequence[KVCache], size: int) -> KVCache:
    """The rows of several caches, in order, in one with room for `size` positions."""
    fitting = [resized(cache, size) for cache in caches]
    k, v = (jnp.concatenate([cache[i] for cache in fitting], axis=1) for i in (0, 1))
    return KVCache(k, v, jnp.concatenate([cache.length for cache in fitting]))


def flat(x: jax.Array) -> jax.Array:
    """Heads side by side: [..., K, H] -> [..., C]."""
    return x.reshape(*x.shape[:-2], -1)


def write(stack: jax.Array, layer: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """Puts new [B, T, K, H] into stack [L, B, S, C] at `layer` and per-row slots [B, T].

    Slots beyond S are dropped (and not clamped onto the last one): callers bound the length.
    """
    rows = jnp.arange(slots.shape[0])[:, None]
    return stack.at[layer, rows, slots].set(flat(new).astype(stack.dtype), mode="drop")


def visible(slots: jax.Array, size: int) -> jax.Array:
    """Mask [B, T, S]: the query written at slots [B, T] sees all of its row's slots up to its own."""
    return jnp.arange(size) <= slots[:, :, None]
