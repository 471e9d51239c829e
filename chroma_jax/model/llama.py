"""The LLaMA stack that is Reasoner text model, Backbone and Decoder.

Pre-norm blocks of grouped-query attention with rotary positions and a SiLU-gated MLP, then a final RMSNorm. Embeddings
and heads belong to the stages. Source: transformers `models/llama`, `models/qwen2_5_omni` (text model).

Axes: B batch, T query length, S cache length, D width, N heads, K kv heads, H head dim, F ff width, L layers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.config import LlamaConfig
from chroma_jax.model import attention, kv_cache
from chroma_jax.model.kv_cache import KVCache
from chroma_jax.model.layers import normal, over_layers, rematerialised, rms_norm, zeros
from chroma_jax.model.linear import project
from chroma_jax.model.rope import apply_rotary, rotary_angles
from chroma_jax.sharding import ROWS, constrain


class Attention(nnx.Module):
    """Grouped-query attention; q, k and v carry biases in the Reasoner only."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, n, k, h = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        new = functools.partial(normal, rngs, dtype=cfg.param_dtype)
        self.q, self.k, self.v, self.o = new(d, n, h), new(d, k, h), new(d, k, h), new(n, h, d)
        if cfg.qkv_bias:
            self.q_bias = zeros(n, h, dtype=cfg.param_dtype)
            self.k_bias = zeros(k, h, dtype=cfg.param_dtype)
            self.v_bias = zeros(k, h, dtype=cfg.param_dtype)

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, ...]:
        """x [B, T, D] -> rotated q [B, T, N, H], rotated k [B, T, K, H], v [B, T, K, H]."""
        dtype = x.dtype
        q = project("BTD,DNH->BTNH", x, self.q)
        k = project("BTD,DKH->BTKH", x, self.k)
        v = project("BTD,DKH->BTKH", x, self.v)
        if self.cfg.qkv_bias:
            q = q + self.q_bias[...].astype(dtype)
            k = k + self.k_bias[...].astype(dtype)
            v = v + self.v_bias[...].astype(dtype)
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v

    def join(self, heads: jax.Array, axes: str = "BTNH") -> jax.Array:
        """What the heads saw, with these axes -> [B, T, D]."""
        return project(f"{axes},NHD->BTD", heads, self.o)


class Block(nnx.Module):
    """One layer."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        d, f = cfg.hidden_size, cfg.intermediate_size
        norm = functools.partial(rms_norm, d, cfg.norm_eps, cfg.dtype, cfg.param_dtype, rngs)
        new = functools.partial(normal, rngs, dtype=cfg.param_dtype)
        self.attention_norm, self.attention = norm(), Attention(cfg, rngs=rngs)
        self.mlp_norm = norm()
        self.gate, self.up, self.down = new(d, f), new(d, f), new(f, d)

    def mlp(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> x + MLP(norm(x))."""
        h = self.mlp_norm(x)
        gate, up = (project("BTD,DF->BTF", h, w) for w in (self.gate, self.up))
        return x + project("BTF,FD->BTD", jax.nn.silu(gate) * up, self.down)


class Llama(nnx.Module):
    """Layers stacked on a leading axis and applied by one scan (or one by one, see `unstacked`), and the final norm."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.layers = jax.vmap(lambda r: Block(cfg, rngs=r))(rngs.fork(split=cfg.num_layers))
        self.norm = rms_norm(cfg.hidden_size, cfg.norm_eps, cfg.dtype, cfg.param_dtype, rngs)

    def __call__(
        self, x: jax.Array, positions: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """A whole sequence: embeddings [B, T, D] -> final-normed hidden states [B, T, D].

        Args:
          x: embeddings.
          positions: [B, T], or [3, B, T] for TM-RoPE; default 0..T-1. Rows are right-padded, if at all: a real
            position never sees the padding after it.
          mask: [B, T, T], true where attention is allowed; default causal.
        """
        return self._sequence(x, positions, mask, keep=False)[0]

    def prefill(
        self, x: jax.Array, lengths: jax.Array, size: int, positions: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """`__call__` on right-padded rows of `lengths` [B], keeping keys and values for `step`.

        Returns hidden states [B, T, D] and a cache of `size` >= T positions that holds `lengths` of each row.
        """
        y, (k, v) = self._sequence(x, positions, None, keep=True)
        room = [(0, 0), (0, 0), (0, size - x.shape[1]), (0, 0)]
        k, v = (jnp.pad(kv_cache.flat(x), room) for x in (k, v))
        return y, KVCache(k, v, lengths.astype(jnp.int32))

    def init_state(self, batch: int, size: int) -> KVCache:
        """An empty cache for `step`."""
        return kv_cache.init_cache(self.cfg, batch, size)

    def step(
        self,
        x: jax.Array,
        cache: KVCache,
        count: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """The next T positions of each row: embeddings [B, T, D] -> hidden states [B, T, D] and the cache.

        `count` [B] (default T) says how many of the T positions of each row are real. The rest is computed, seen by
        nothing, and overwritten by the next step. `positions` as in `__call__`; default: they continue the row.
        """
        cfg, width = self.cfg, x.shape[1]
        slots = cache.length[:, None] + jnp.arange(width)
        cos, sin = rotary_angles(cfg.rope, cfg.head_dim, slots if positions is None else positions)
        mask = kv_cache.visible(slots, cache.size)

        # Keys and values ride in the carry, so that each layer writes its few new slots in place.
        def layer(carry, scanned):
            x, k_stack, v_stack = carry
            block, index = scanned
            q, k, v = block.attention.project(block.attention_norm(x), cos, sin)
            k_stack = kv_cache.write(k_stack, index, slots, k)
            v_stack = kv_cache.write(v_stack, index, slots, v)
            out = attention.cached(q, k_stack[index], v_stack[index], mask)
            x = x + block.attention.join(out)
            return (block.mlp(x), k_stack, v_stack), None

        carry = (x.astype(cfg.dtype), cache.k, cache.v)
        (x, k, v), _ = over_layers(layer, carry, self.layers, jnp.arange(cfg.num_layers))
        grown = width if count is None else count
        return self.norm(x), KVCache(k, v, cache.length + grown)

    def _sequence(self, x, positions, mask, keep):
        """Final-normed hidden states, and the stacked keys and values if they are to be kept."""
        cfg, (batch, width) = self.cfg, x.shape[:2]
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
        attend = attention.of_sequence(width, cfg.head_dim, mask)
        # Once for all layers: what is added stands behind every position, and none sees it.
        x, positions = attend.pad(x, 1), attend.pad(positions, -1)
        cos, sin = rotary_angles(cfg.rope, cfg.head_dim, positions)

        def layer(x, scanned):
            (block,) = scanned
            q, k, v = block.attention.project(block.attention_norm(x), cos, sin)
            x = block.mlp(x + block.attention.join(attend(q, k, v), attend.axes))
            return constrain(x, ROWS), (k, v) if keep else None

        layer = rematerialised(layer, cfg.remat)
        x, kv = over_layers(layer, constrain(x.astype(cfg.dtype), ROWS), self.layers)
        kv = jax.tree.map(lambda a: a[:, :, :width], kv)
        return self.norm(x[:, :width]), kv
