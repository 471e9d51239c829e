"""Split residual vector quantizer: latent vectors <-> codes.

The first codebooks ("semantic") and the others ("acoustic") are two residual quantizers over the same latent; their decoded
sums are added. A codeword is its embed_sum over its cluster_usage, the running averages of training: both are kept as
they were saved, in float32 whatever the parameter dtype, because rounding them would move codewords.

Axes: B batch, T frames, D latent width, Q codebooks, V codewords, C codeword width. Source: Mimi (arXiv 2410.00037, section
3.3.2); transformers' modeling_mimi.py, MimiSplitResidualVectorQuantizer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.config import CodecConfig
from chroma_jax.model.layers import normal

USAGE_FLOOR = 1e-5  # of training's running averages, the same in every Mimi
# A codeword is chosen by comparing near-equal numbers: no reduced-precision products, on any device.
EXACT = jax.lax.Precision.HIGHEST


class ResidualQuantizer(nnx.Module):
    """Codebooks in series: each quantizes what the ones before it left over."""

    def __init__(self, cfg: CodecConfig, num_codebooks: int, *, rngs: nnx.Rngs):
        if cfg.codebook_dim != cfg.quantizer_size:
            raise ValueError(
                f"codec codebook_dim {cfg.codebook_dim} must equal vector_quantization_hidden_dimension "
                f"{cfg.quantizer_size}"
            )
        D, Q, V, C = cfg.hidden_size, num_codebooks, cfg.codebook_size, cfg.codebook_dim
        projected = C != D
        self.input_proj = (
            normal(rngs, D, C, dtype=cfg.param_dtype, std=D**-0.5) if projected else None
        )
        self.output_proj = (
            normal(rngs, C, D, dtype=cfg.param_dtype, std=C**-0.5) if projected else None
        )
        self.embed_sum = normal(rngs, Q, V, C, dtype="float32", std=1.0)
        self.cluster_usage = nnx.Param(jnp.ones((Q, V), jnp.float32))
        # A flag of training, carried so that an exported checkpoint is complete.
        self.initialized = nnx.Param(jnp.ones((Q, 1), jnp.float32))

    def encode(self, x: jax.Array, num_codebooks: int) -> jax.Array:
        """Latents [B, T, D] -> codes [B, T, num_codebooks] int32: nearest codewords, the lowest id on a tie."""
        x = x.astype(jnp.float32)
        if self.input_proj is not None:
            x = jnp.matmul(x, self.input_proj[...].astype(jnp.float32), precision=EXACT)

        def quantize(residual, book):
            embed_sum, usage = book
            codebook = embed_sum / jnp.maximum(usage, USAGE_FLOOR)[:, None]
            # The distance itself, not only the terms that vary: it ties where PyTorch's cdist ties.
            cross = jnp.einsum("BTC,VC->BTV", residual, codebook, precision=EXACT)
            squares = jnp.sum(residual**2, -1, keepdims=True) + jnp.sum(codebook**2, -1)
            codes = jnp.argmin(jnp.sqrt(jnp.maximum(squares - 2 * cross, 0)), axis=-1).astype(
                jnp.int32
            )
            return residual - codebook[codes], codes

        books = (self.embed_sum[...][:num_codebooks], self.cluster_usage[...][:num_codebooks])
        _, codes = jax.lax.scan(quantize, x, books)
        return jnp.moveaxis(codes, 0, -1)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes [B, T, q <= Q] -> latents [B, T, D] float32: the sum of their codewords."""
        books = jnp.arange(codes.shape[-1])
        codes = jnp.clip(codes, 0, self.embed_sum.shape[1] - 1)
        # Rows are gathered first and divided after: the same codewords without touching the whole table.
        usage = jnp.maximum(self.cluster_usage[...][books, codes], USAGE_FLOOR)
        x = jnp.sum(self.embed_sum[...][books, codes] / usage[..., None], axis=-2)
        if self.output_proj is not None:
            x = jnp.matmul(x, self.output_proj[...].astype(jnp.float32))
        return x


class SplitQuantizer(nnx.Module):
    """The semantic and the acoustic residual quantizer side by side."""

    def __init__(self, cfg: CodecConfig, *, rngs: nnx.Rngs):
        self.num_semantic, self.num_quantizers = cfg.num_semantic_quantizers, cfg.num_quantizers
        self.semantic = ResidualQuantizer(cfg, self.num_semantic, rngs=rngs)
        self.acoustic = ResidualQuantizer(cfg, self.num_quantizers - self.num_semantic, rngs=rngs)

    def encode(self, x: jax.Array, num_codebooks: int | None = None) -> jax.Array:
        """Latents [B, T, D] -> codes [B, T, Q] int32 of the first `num_codebooks` codebooks (default: all).

        Raises:
          ValueError: num_codebooks lies outside [num_semantic, num_quantizers].
        """
        count = self.num_quantizers if num_codebooks is None else num_codebooks
        if not self.num_semantic <= count <= self.num_quantizers:
            raise ValueError(
                f"num_codebooks must lie between {self.num_semantic} and {self.num_quantizers}, got {count}"
            )
        codes = self.semantic.encode(x, self.num_semantic)
        if count == self.num_semantic:
            return codes
        return jnp.concatenate([codes, self.acoustic.encode(x, count - self.num_semantic)], axis=-1)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes [B, T, Q], Q from 1 to num_quantizers -> latents [B, T, D] float32.

        Raises:
          ValueError: Q is 0 or more than num_quantizers.
        """
        if not 1 <= codes.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"codes [..., Q] must have 1 to {self.num_quantizers} codebooks, got {codes.shape[-1]}"
            )
        x = self.semantic.decode(codes[..., : self.num_semantic])
        if codes.shape[-1] == self.num_semantic:
            return x
        return x + self.acoustic.decode(codes[..., self.num_semantic :])
