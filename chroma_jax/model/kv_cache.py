"""Key/value cache of a stack of attention layers, with a length per row, and attention over what it holds.

The heads of a position lie side by side in one axis. So its last two axes, S and C, fill the tiles of a TPU's memory, a position
is written in one piece, and attention reads the cache as it lies: with heads apart XLA re-lays the whole cache, both ways, in every
step, which costs several times what reading it does.

Axes: L layers, B batch, T query length, S cache length, N heads, K kv heads, G heads per kv head, H head dim, C = K * H.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.config import LlamaConfig

# Positions up to which a TPU's matrix unit is idle enough to compute all kv heads at once.
_FEW_QUERIES = 16


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


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention (in float32) of q [B, T, N, H] over k, v [B, S, C] where mask [B, T, S] -> [B, T, N, H].

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

    # One stream alone waits for weights more than for its cache.
    if width > _FEW_QUERIES or kv_heads == 1 or batch == 1 or _split_heads():
        return by_head(q, k, v, mask)
    return jax.lax.platform_dependent(q, k, v, mask, tpu=together, default=by_head)


def _split_heads() -> bool:
    """Whether a mesh gives the heads to several devices."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1
