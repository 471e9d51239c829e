"""The Reasoner: the Qwen2.5-Omni Thinker (audio and text), which hears the question and writes the answer's text.

Source: transformers `models/qwen2_5_omni` (Thinker); paper section 3. Frozen in Chroma.

Axes: B batch, C chunks, T positions, D width, V text vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.config import ReasonerConfig
from chroma_jax.model.audio_encoder import AudioEncoder
from chroma_jax.model.kv_cache import KVCache
from chroma_jax.model.layers import normal
from chroma_jax.model.linear import embed, project, project_float32
from chroma_jax.model.llama import Llama


class Reasoner(nnx.Module):
    """Audio encoder, token embedding, LLaMA with TM-RoPE, text head (absent when tied to the embedding)."""

    def __init__(self, cfg: ReasonerConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        text = cfg.text
        self.audio_encoder = AudioEncoder(cfg.audio, rngs=rngs)
        self.embedding = normal(rngs, cfg.vocab_size, text.hidden_size, dtype=text.param_dtype)
        self.llama = Llama(text, rngs=rngs)
        if not cfg.tie_embeddings:
            self.head = normal(rngs, text.hidden_size, cfg.vocab_size, dtype=text.param_dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token ids [...] -> embeddings [..., D]."""
        return embed(self.embedding, ids, self.cfg.text.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final-normed hidden states [..., D] -> logits [..., V], float32."""
        if self.cfg.tie_embeddings:
            return project("...D,VD->...V", hidden, self.embedding, "float32")
        return project_float32(hidden, self.head)

    def encode_audio(self, chunks: jax.Array, chunk_lengths: jax.Array) -> jax.Array:
        """Mel chunks [B, C, chunk_frames, mel_bins], valid frames [B, C] -> features [B, C * chunk_features, D].

        A row's valid features stand first, in order, whatever the lengths of its clips' last chunks.
        """
        batch, count = chunks.shape[:2]
        flat, counts = self.audio_encoder(
            chunks.reshape(-1, *chunks.shape[2:]), chunk_lengths.reshape(-1)
        )
        per_chunk = flat.shape[1]
        features = flat.reshape(batch, count * per_chunk, -1)
        valid = jnp.arange(per_chunk) < counts.reshape(batch, count)[..., None]
        order = jnp.argsort(~valid.reshape(batch, -1), axis=1, stable=True)
        return jnp.take_along_axis(features, order[..., None], axis=1)

    def embed_prompt(self, ids: jax.Array, features: jax.Array | None) -> jax.Array:
        """Token ids [B, T] -> embeddings [B, T, D], the j-th audio placeholder of a row replaced by its j-th feature."""
        x = self.embed(ids)
        if features is None:
            return x
        is_audio = ids == self.cfg.audio_token_id
        which = jnp.clip(jnp.cumsum(is_audio, axis=1) - 1, 0, features.shape[1] - 1)
        heard = jnp.take_along_axis(features, which[..., None], axis=1)
        return jnp.where(is_audio[..., None], heard.astype(x.dtype), x)

    def __call__(
        self, ids: jax.Array, features: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Whole right-padded prompts [B, T] -> final-normed hidden states [B, T, D].

        `positions` may be [3, B, T]; with audio and text only, the three components are equal and default to 0..T-1.
        """
        return self.llama(self.embed_prompt(ids, features), positions)

    def prefill(
        self, ids: jax.Array, lengths: jax.Array, features: jax.Array | None, size: int
    ) -> tuple[jax.Array, KVCache]:
        """Right-padded prompts [B, T] of `lengths` [B] -> hidden states [B, T, D] and a cache of `size` positions."""
        return self.llama.prefill(self.embed_prompt(ids, features), lengths, size)

    def extend(
        self, ids: jax.Array, counts: jax.Array, features: jax.Array | None, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """More of the prompts: the next tokens [B, T], `counts` [B] of each row, whose placeholders stand for `features`.

        Returns hidden states [B, T, D] and the cache. Prompts cut anywhere give what `prefill` gives of them whole.
        """
        return self.llama.step(self.embed_prompt(ids, features), cache, counts)

    def step(self, ids: jax.Array, cache: KVCache, active: jax.Array) -> tuple[jax.Array, KVCache]:
        """One token [B] of the rows in `active` [B] -> the hidden state [B, D] at it, and the cache.

        A row that is not active keeps its length; its output is meaningless.
        """
        hidden, cache = self.llama.step(self.embed(ids)[:, None], cache, active.astype(jnp.int32))
        return hidden[:, 0], cache
