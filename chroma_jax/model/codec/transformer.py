"""The codec's causal transformer: rotary positions, a sliding attention window, LayerScale on both residual branches.

A position sees itself and the window - 1 positions before it. Whole sequences are cut into blocks of one window, of
which each attends to itself and to the block before; streams keep the last window of keys and values in a ring buffer. So
memory grows linearly with a sequence, and not at all with a stream.

Axes: B batch, T positions, S keys, W window, D width, N heads, K kv heads, H head dim, C = K * H,
F ff width, L layers. Source: Mimi (arXiv 2410.00037, section 3.3.1); transformers' modeling_mimi.py, MimiTransformerModel.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.config import CodecConfig
from chroma_jax.model import attention
from chroma_jax.model.attention import Past
from chroma_jax.model.kv_cache import flat
from chroma_jax.model.layers import layer_norm, normal
from chroma_jax.model.rope import apply_rotary, rotary_angles


class TransformerState(NamedTuple):
    """Ring buffers over the last W positions: position p lies in slot p mod W."""

    k: jax.Array  # [L, B, W, C], rotated
    v: jax.Array  # [L, B, W, C]
    position: jax.Array  # [B] int32, positions seen so far


class TransformerLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each scaled per channel before it joins the residual."""

    def __init__(self, cfg: CodecConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        D, N, K, H, F = (
            cfg.hidden_size,
            cfg.num_heads,
            cfg.num_kv_heads,
            cfg.head_dim,
            cfg.intermediate_size,
        )
        dtype = cfg.param_dtype
        self.attn_norm = layer_norm(D, cfg.norm_eps, cfg.dtype, dtype, rngs)
        self.q = normal(rngs, D, N, H, dtype=dtype)
        self.k = normal(rngs, D, K, H, dtype=dtype)
        self.v = normal(rngs, D, K, H, dtype=dtype)
        self.o = normal(rngs, N, H, D, dtype=dtype)
        self.attn_scale = nnx.Param(jnp.full((D,), cfg.layer_scale_initial, dtype))
        self.mlp_norm = layer_norm(D, cfg.norm_eps, cfg.dtype, dtype, rngs)
        self.up = normal(rngs, D, F, dtype=dtype)
        self.down = normal(rngs, F, D, dtype=dtype)
        self.mlp_scale = nnx.Param(jnp.full((D,), cfg.layer_scale_initial, dtype))

    def project(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, D] -> rotated queries [B, T, N, H], rotated keys [B, T, K, H], values [B, T, K, H]."""
        h = self.attn_norm(x)
        q = jnp.einsum("BTD,DNH->BTNH", h, self.q[...].astype(h.dtype))
        k = jnp.einsum("BTD,DKH->BTKH", h, self.k[...].astype(h.dtype))
        v = jnp.einsum("BTD,DKH->BTKH", h, self.v[...].astype(h.dtype))
        return apply_rotary(q, *angles), apply_rotary(k, *angles), v

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Residual x [B, T, D] and attention output [B, T, N, H] -> the layer's output [B, T, D]."""
        dtype = self.cfg.dtype
        h = jnp.einsum("BTNH,NHD->BTD", attended, self.o[...].astype(dtype))
        x = x + self.attn_scale[...].astype(dtype) * h
        h = jax.nn.gelu(self.mlp_norm(x) @ self.up[...].astype(dtype), approximate=False)
        return x + self.mlp_scale[...].astype(dtype) * (h @ self.down[...].astype(dtype))


class SlidingTransformer(nnx.Module):
    """A stack of TransformerLayers, without a final norm."""

    def __init__(self, cfg: CodecConfig, *, rngs: nnx.Rngs):
        if cfg.rope.llama3 is not None or cfg.rope.sections is not None:
            raise ValueError(f"the codec has plain rotary positions, got {cfg.rope}")
        self.cfg = cfg
        self.layers = jax.vmap(lambda r: TransformerLayer(cfg, rngs=r))(
            rngs.fork(split=cfg.num_layers)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Whole sequences [B, T, D] -> [B, T, D]."""
        B, T, D = x.shape
        window = min(self.cfg.sliding_window, T)
        blocks = -(-T // window)
        x = jnp.pad(x.astype(self.cfg.dtype), ((0, 0), (0, blocks * window - T), (0, 0)))
        x = x.reshape(B * blocks, window, D)
        positions = jnp.tile(jnp.arange(blocks * window).reshape(blocks, window), (B, 1))
        angles = rotary_angles(self.cfg.rope, self.cfg.head_dim, positions)

        def block_before(a: jax.Array) -> jax.Array:
            a = a.reshape(B, blocks, *a.shape[1:])
            return jnp.roll(a, 1, axis=1).reshape(B * blocks, *a.shape[2:])

        def layer(x: jax.Array, module: TransformerLayer) -> tuple[jax.Array, None]:
            q, k, v = module.project(x, angles)
            # The first block has none before it: its past positions are negative.
            past = (
                Past(*(block_before(flat(x)) for x in (k, v)), positions - window)
                if blocks > 1
                else None
            )
            return module.finish(
                x, attention.sliding(q, k, v, positions, past, self.cfg.sliding_window)
            ), None

        x, _ = jax.lax.scan(layer, x, self.layers)
        return x.reshape(B, blocks * window, D)[:, :T]

    def init_state(self, batch: int) -> TransformerState:
        """The state before the first chunk of `batch` streams."""
        cfg = self.cfg
        width = cfg.num_kv_heads * cfg.head_dim
        shape = (cfg.num_layers, batch, cfg.sliding_window, width)
        return TransformerState(
            jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype), jnp.zeros((batch,), jnp.int32)
        )

    def step(self, x: jax.Array, state: TransformerState) -> tuple[jax.Array, TransformerState]:
        """The next chunk [B, T, D] -> [B, T, D], for any T."""
        window, T = self.cfg.sliding_window, x.shape[1]
        positions = state.position[:, None] + jnp.arange(T)
        angles = rotary_angles(self.cfg.rope, self.cfg.head_dim, positions)
        # The newest position of each slot's residue; slots that were never written come out negative.
        newest = state.position[:, None] - 1
        past_positions = newest - (newest - jnp.arange(window)) % window

        def layer(x, scanned):
            module, k_ring, v_ring = scanned
            q, k, v = module.project(x, angles)
            past = Past(k_ring, v_ring, past_positions)
            x = module.finish(x, attention.sliding(q, k, v, positions, past, window))
            return x, (flat(k), flat(v))

        x, (k, v) = jax.lax.scan(layer, x.astype(self.cfg.dtype), (self.layers, state.k, state.v))
        # All layers are written at once, after the scan has only read. Of a chunk longer than the window, only the end
        # can be needed again.
        rows, slots = jnp.arange(x.shape[0])[:, None], positions[:, -window:] % window
        k = state.k.at[:, rows, slots].set(k[:, :, -window:])
        v = state.v.at[:, rows, slots].set(v[:, :, -window:])
        return x, TransformerState(k, v, state.position + T)
