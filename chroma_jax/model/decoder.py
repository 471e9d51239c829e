"""The Decoder: a small LLaMA that runs inside one frame and adds codes 1..Q-1 to the Backbone's code 0.

Its sequence is [h, emb_0(c_0), emb_1(c_1), ...], projected to its own width; the output at position j >= 1 through head
j - 1 gives code j. Source: paper section 3; reference `modeling_chroma.py`.

Rotary positions of that sequence: the public training forward counts 0, 1, 2, ..., but public generation (transformers
5.0.0rc0 hands the first step of two embeddings one cache position) puts h and code 0 both at 0, then counts 1, 2, ...
`DecoderConfig.shared_first_position` says which; here one model uses one of them for training and generation alike.

Axes: B batch, Q codebooks, D Backbone width, W Decoder width, V audio vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.config import DecoderConfig
from chroma_jax.model.layers import normal
from chroma_jax.model.linear import project, project_float32
from chroma_jax.model.llama import Llama

# (codebook, logits [B, V]) -> code [B]; the codebook index may be traced.
Choose = Callable[[jax.Array, jax.Array], jax.Array]


class Decoder(nnx.Module):
    """Projection, LLaMA, and one head per codebook 1..Q-1."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        llama = cfg.llama
        self.projection = normal(
            rngs, cfg.embedding_size, llama.hidden_size, dtype=llama.param_dtype
        )
        self.llama = Llama(llama, rngs=rngs)
        self.heads = normal(
            rngs, cfg.num_codebooks - 1, llama.hidden_size, cfg.vocab_size, dtype=llama.param_dtype
        )

    def __call__(self, hidden: jax.Array, codes: jax.Array) -> jax.Array:
        """Teacher forcing: hidden [B, D] and embeddings of codes 0..Q-2 [B, Q-1, D] -> logits of codes 1..Q-1 [B, Q-1, V]."""
        x = jnp.concatenate([hidden[:, None].astype(codes.dtype), codes], axis=1)
        y = self.llama(self._project(x), self._positions(x.shape[0], 0, x.shape[1]))[:, 1:]
        # One product per codebook, batched over the leading axis: XLA's CPU has no bfloat16 product batched elsewhere.
        return jax.vmap(project_float32, in_axes=(1, 0), out_axes=1)(y, self.heads[...])

    def frame(
        self,
        hidden: jax.Array,
        code0: jax.Array,
        embed: Callable[[jax.Array, jax.Array], jax.Array],
        choose: Choose,
    ) -> tuple[jax.Array, jax.Array]:
        """One frame: hidden [B, D] and code 0 [B] -> the frame [B, Q] and the logits of its codes 1..Q-1 [B, Q-1, V].

        Args:
          hidden: the Backbone's final-normed output that predicts this frame.
          code0: the code chosen from it.
          embed: (codes [B], codebook) -> embeddings [B, D], the Backbone's table.
          choose: picks a code from the logits of a codebook.
        """
        batch, books = hidden.shape[0], self.cfg.num_codebooks

        def step(x, cache, first, book):
            """The next places [B, T, D] of the sequence, from place `first` on: the cache, and logits of codebook `book`."""
            positions = self._positions(batch, first, x.shape[1])
            y, cache = self.llama.step(self._project(x), cache, None, positions)
            return cache, project_float32(y[:, -1], self.heads[...][book - 1])

        # [h, emb_0] -> code 1, then one place a code, in one body that compiles once.
        state = hidden[:, None]
        x = jnp.concatenate([state, embed(code0, 0)[:, None].astype(state.dtype)], axis=1)
        cache, first_logits = step(x, self.llama.init_state(batch, books), 0, 1)
        code1 = choose(1, first_logits)

        def next_code(carry, book):
            cache, code = carry
            x = embed(code, book - 1)[:, None].astype(state.dtype)
            cache, logits = step(x, cache, book, book)
            code = choose(book, logits)
            return (cache, code), (code, logits)

        _, (codes, logits) = jax.lax.scan(next_code, (cache, code1), jnp.arange(2, books))
        frame = jnp.concatenate([code0[:, None], code1[:, None], codes.T], axis=1)
        return frame, jnp.concatenate([first_logits[None], logits]).swapaxes(0, 1)

    def _positions(self, batch: int, first: int | jax.Array, count: int) -> jax.Array:
        """Rotary positions [B, count] of the sequence's places first..first+count-1."""
        places = first + jnp.arange(count)
        if self.cfg.shared_first_position:
            places = jnp.maximum(places - 1, 0)
        return jnp.broadcast_to(places, (batch, count))

    def _project(self, x: jax.Array) -> jax.Array:
        dtype = self.cfg.llama.dtype
        return project("...D,DW->...W", x.astype(dtype), self.projection)
