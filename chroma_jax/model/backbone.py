"""The Backbone: a LLaMA over text embeddings, Reasoner states and audio frames; it predicts code 0 of each frame.

It owns the audio embedding table, which the Decoder reads too (tied by use). Source: paper section 3; reference
`modeling_chroma.py`.

Axes: B batch, T positions, Q codebooks, D width, V audio vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.config import BackboneConfig
from chroma_jax.model.layers import normal
from chroma_jax.model.linear import embed, project_float32
from chroma_jax.model.llama import Llama


class Backbone(nnx.Module):
    """LLaMA, audio embedding and the head of codebook 0."""

    def __init__(self, cfg: BackboneConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        llama = cfg.llama
        self.llama = Llama(llama, rngs=rngs)
        self.audio_embedding = normal(
            rngs, cfg.num_codebooks, cfg.vocab_size, llama.hidden_size, dtype=llama.param_dtype
        )
        self.head = normal(rngs, llama.hidden_size, cfg.vocab_size, dtype=llama.param_dtype)

    def embed_codes(self, codes: jax.Array, first: int | jax.Array = 0) -> jax.Array:
        """Codes [..., n] of codebooks first..first+n-1 -> one embedding per code [..., n, D]."""
        books = first + jnp.arange(codes.shape[-1])
        return embed(self.audio_embedding, (books, codes), self.cfg.llama.dtype)

    def embed_frames(self, frames: jax.Array) -> jax.Array:
        """Frames [..., Q] -> the sum of their codes' embeddings [..., D]: one Backbone position per frame."""
        return self.embed_codes(frames).sum(axis=-2)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final-normed hidden states [..., D] -> logits of code 0 [..., V], float32."""
        return project_float32(hidden, self.head)
