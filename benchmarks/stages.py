"""The four stages of a reply, each as a program of its own on the shapes that a beat gives it.

A beat is one text token and two frames. Every step here is one beat's worth of its stage, at a fixed point of the reply: the
caches keep their lengths, so that it can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp

from chroma_jax import schedule
from chroma_jax.engine.beat import BeatState, Prompt
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.kv_cache import KVCache


class Stage(NamedTuple):
    """One stage."""

    name: str
    unit: str  # what is counted
    per_beat: int  # how many of them a beat has
    step: Callable  # (model, state) -> (out, state), one beat's worth
    state: Any
    weights: Any  # the parameters that a beat reads
    reads: dict[str, int]  # passes over each of them in a beat
    cache_bytes: int  # live keys and values that a beat reads


def reasoner_first(model: ChromaModel, prompt: Prompt, size: int) -> tuple[jax.Array, KVCache]:
    """The question heard, the first text token chosen."""
    features = model.reasoner.encode_audio(prompt.chunks, prompt.chunk_lengths)
    hidden, cache = model.reasoner.prefill(prompt.ids, prompt.lengths, features, size)
    last = jnp.take_along_axis(hidden, (prompt.lengths - 1)[:, None, None], axis=1)[:, 0]
    return jnp.argmax(model.reasoner.logits(last), axis=-1), cache


def backbone_first(model: ChromaModel, prompt: Prompt, size: int) -> tuple[jax.Array, KVCache]:
    """The voice taken in, the first code 0 chosen."""
    none = jnp.zeros_like(prompt.lengths)
    lengths = (prompt.voice_id_lengths, prompt.voice_frame_lengths)
    padded = schedule.voice_length(prompt.voice_ids.shape[1], prompt.voice_frames.shape[1])
    where = schedule.layout(*lengths, none, none, padded)
    x = schedule.embed(model, where, prompt.voice_ids, prompt.voice_frames)
    _, cache = model.backbone.llama.prefill(x, schedule.voice_length(*lengths), size)
    first = jnp.zeros((len(prompt.lengths), 3, x.shape[2]), x.dtype)
    y, cache = model.backbone.llama.step(first, cache)
    return jnp.argmax(model.backbone.logits(y[:, 2]), axis=-1), cache


def _reasoner_step(model, state):
    token, cache = state
    hidden, new = model.reasoner.step(token, cache, jnp.ones(token.shape, bool))
    token = jnp.argmax(model.reasoner.logits(hidden), axis=-1).astype(jnp.int32)
    return hidden, (token, new._replace(length=cache.length))


def _backbone_step(model, state):
    frame, hidden, token, cache = state
    llama = model.backbone.llama
    x = schedule.embed_beat(model, frame, jnp.ones(token.shape, bool), hidden, token)
    y, new = llama.step(x, cache)
    code = jnp.argmax(model.backbone.logits(y[:, 2]), axis=-1).astype(jnp.int32)
    y, new = llama.step(model.backbone.embed_frames(frame.at[:, 0].set(code))[:, None], new)
    code = jnp.argmax(model.backbone.logits(y[:, 0]), axis=-1).astype(jnp.int32)
    return y, (frame.at[:, 0].set(code), hidden, token, new._replace(length=cache.length))


def _decoder_step(model, state):
    hidden, code = state

    def embed(code, book):
        return model.backbone.embed_codes(code[:, None], book)[:, 0]

    def pick(book, logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    first, _ = model.decoder.frame(hidden, code, embed, pick)
    second, _ = model.decoder.frame(hidden, first[:, 1], embed, pick)
    return second, (hidden, second[:, 0])


def _codec_step(model, state):
    codes, codec = state
    samples, codec = model.codec.decode_step(codes, codec)
    return samples, (codes, codec)


def make(model: ChromaModel, state: BeatState) -> list[Stage]:
    """The stages as the beat after `state` runs them."""
    cfg, rows = model.cfg, state.token.shape[0]
    reasoner, backbone, decoder, codec = model.reasoner, model.backbone, model.decoder, model.codec
    tied = cfg.reasoner.tie_embeddings
    codes = jnp.zeros((rows, schedule.FRAMES_PER_TEXT, cfg.num_codebooks), jnp.int32)
    books, frames = cfg.num_codebooks, schedule.FRAMES_PER_TEXT
    return [
        Stage(
            "Reasoner", "text token", 1, _reasoner_step, (state.token, state.reasoner),
            {"llama": reasoner.llama, "head": reasoner.embedding if tied else reasoner.head},
            {"llama": 1, "head": 1}, live_bytes(state.reasoner),
        ),
        Stage(
            "Backbone", "frame", frames, _backbone_step,
            (state.frame, state.hidden, state.token, state.backbone),
            {"llama": backbone.llama, "head": backbone.head},
            {"llama": frames, "head": frames}, frames * live_bytes(state.backbone),
        ),
        Stage(
            "Decoder", "frame", frames, _decoder_step, (state.hidden, state.frame[:, 0]),
            {"llama": decoder.llama, "projection": decoder.projection, "heads": decoder.heads},
            {"llama": frames * (books - 1), "projection": frames * (books - 1), "heads": frames}, 0,
        ),
        Stage(
            "Codec", "frame", frames, _codec_step, (codes, state.codec),
            {"upsample": codec.upsample, "transformer": codec.decoder_transformer, "decoder": codec.decoder},
            {"upsample": 1, "transformer": 1, "decoder": 1},
            common.weight_bytes(state.codec.transformer.k, state.codec.transformer.v),
        ),
    ]  # fmt: skip


def live_bytes(cache: KVCache) -> int:
    """Bytes of the keys and values that hold something."""
    positions = int(jnp.sum(cache.length))
    return (cache.k.nbytes + cache.v.nbytes) // (cache.k.shape[1] * cache.size) * positions
