"""The Reasoner's ears: a Whisper-style encoder over independent two-second chunks of log-mel.

Each chunk passes two convolutions, gets sinusoidal positions that restart, attends within itself, is average-pooled by two
and projected. Full chunks give an even number of positions before pooling, so no pooled pair ever crosses a chunk border:
chunks are independent to the end, and speech can be encoded while it is still being spoken.
Source: transformers `models/qwen2_5_omni` (audio encoder).

Axes: C chunks (of any clips), M mel frames, T positions after the convolutions, D width, N heads, H head dim, F ff width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chroma_jax.config import AudioEncoderConfig
from chroma_jax.model import attention
from chroma_jax.model.layers import layer_norm, normal, zeros
from chroma_jax.model.linear import project
from chroma_jax.sharding import ROWS, constrain


def sinusoids(length: int, width: int) -> np.ndarray:
    """Whisper's position table [length, width]: sines, then cosines, of geometrically spaced wavelengths up to 10000."""
    step = math.log(10000.0) / (width // 2 - 1)
    rates = np.exp(-step * np.arange(width // 2, dtype=np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * rates[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class EncoderLayer(nnx.Module):
    """Pre-norm attention (keys without bias) and a GELU MLP."""

    def __init__(self, cfg: AudioEncoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, f, n = cfg.hidden_size, cfg.intermediate_size, cfg.num_heads
        h = d // n
        norm = functools.partial(layer_norm, d, cfg.norm_eps, cfg.dtype, cfg.param_dtype, rngs)
        new = functools.partial(normal, rngs, dtype=cfg.param_dtype)
        zero = functools.partial(zeros, dtype=cfg.param_dtype)
        self.attention_norm = norm()
        self.q, self.k, self.v, self.o = new(d, n, h), new(d, n, h), new(d, n, h), new(n, h, d)
        self.q_bias, self.v_bias, self.o_bias = zero(n, h), zero(n, h), zero(d)
        self.mlp_norm = norm()
        self.up, self.up_bias, self.down, self.down_bias = new(d, f), zero(f), new(f, d), zero(d)

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """x [C, T, D], valid [C, T] -> [C, T, D]; positions attend to the valid ones of their chunk."""
        bias = lambda p: p[...].astype(x.dtype)  # noqa: E731
        h = self.attention_norm(x)
        q = project("CTD,DNH->CTNH", h, self.q) + bias(self.q_bias)
        k = project("CTD,DNH->CTNH", h, self.k)
        v = project("CTD,DNH->CTNH", h, self.v) + bias(self.v_bias)
        out = attention.masked(q, k, v, valid[:, None, :])
        x = x + project("CTNH,NHD->CTD", out, self.o) + bias(self.o_bias)
        h = project("CTD,DF->CTF", self.mlp_norm(x), self.up) + bias(self.up_bias)
        h = jax.nn.gelu(h, approximate=False)
        return x + project("CTF,FD->CTD", h, self.down) + bias(self.down_bias)


class AudioEncoder(nnx.Module):
    """Log-mel chunks to features at 25 per second."""

    def __init__(self, cfg: AudioEncoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, out = cfg.hidden_size, cfg.output_size
        new = functools.partial(normal, rngs, dtype=cfg.param_dtype)
        zero = functools.partial(zeros, dtype=cfg.param_dtype)
        self.conv1, self.conv1_bias = new(3, cfg.num_mel_bins, d), zero(d)
        self.conv2, self.conv2_bias = new(3, d, d), zero(d)
        self.layers = jax.vmap(lambda r: EncoderLayer(cfg, rngs=r))(rngs.fork(split=cfg.num_layers))
        self.norm = layer_norm(d, cfg.norm_eps, cfg.dtype, cfg.param_dtype, rngs)
        self.projection, self.projection_bias = new(d, out), zero(out)
        # The reference declares these two vectors and never reads them; kept so that export is complete.
        self.unused_bos_eos = zero(2, out)

    def __call__(self, mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """mel [C, chunk_frames, mel_bins] with `lengths` [C] valid frames -> features [C, chunk_features, output], counts [C].

        A chunk gives ((length - 1) // 2 + 1) // 2 features (none for length 0); what lies beyond is meaningless.
        """
        cfg = self.cfg
        conv_lengths = (lengths - 1) // 2 + 1
        in_chunk = jnp.arange(cfg.chunk_frames) < lengths[:, None]
        x = jnp.where(in_chunk[..., None], mel, 0).astype(cfg.dtype)
        x = self._conv(x, self.conv1, self.conv1_bias, stride=1)
        x = jnp.where(
            in_chunk[..., None], x, 0
        )  # conv2 sees zeros beyond the end, as at a real edge
        x = self._conv(x, self.conv2, self.conv2_bias, stride=2)
        x = x + jnp.asarray(sinusoids(x.shape[1], cfg.hidden_size), x.dtype)
        valid = jnp.arange(x.shape[1]) < conv_lengths[:, None]

        def apply(x, layer):
            return constrain(layer(x, valid), ROWS), None

        x, _ = jax.lax.scan(apply, constrain(x, ROWS), self.layers)
        x = x.reshape(x.shape[0], -1, 2, x.shape[2])
        x = self.norm((x[:, :, 0] + x[:, :, 1]) / 2)
        x = project("CTD,DE->CTE", x, self.projection) + self.projection_bias[...].astype(x.dtype)
        return x, conv_lengths // 2

    def _conv(self, x, kernel, bias, stride):
        x = jax.lax.conv_general_dilated(
            x,
            kernel[...].astype(x.dtype),
            (stride,),
            [(1, 1)],
            dimension_numbers=("NHC", "HIO", "NHC"),
        )
        return jax.nn.gelu(x + bias[...].astype(x.dtype), approximate=False)
