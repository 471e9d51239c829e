"""The four stages of a reply, each as a program of its own on the shapes that a beat gives it.

A beat is one text token and two frames. Every step here is one beat's worth of its stage, at a fixed point of the reply: the
caches keep their lengths, so that it can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax import schedule
from chroma_jax.engine.beat import BeatState, Prompt
from chroma_jax.engine.caches import CacheSizes
from chroma_jax.evaluation.clock import milliseconds, timed
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
            state.codec.transformer.k.nbytes + state.codec.transformer.v.nbytes,
        ),
    ]  # fmt: skip


def live_bytes(cache: KVCache) -> int:
    """Bytes of the keys and values that hold something."""
    positions = int(jnp.sum(cache.length))
    return (cache.k.nbytes + cache.v.nbytes) // (cache.k.shape[1] * cache.size) * positions


def table(
    model: ChromaModel,
    prompt: Prompt,
    state: BeatState,
    sizes: CacheSizes,
    *,
    beats: int,
    repeats: int,
) -> tuple[list[dict[str, Any]], float]:
    """The rows of the paper's table 4 for a reply of that many beats, and the seconds of its stages together.

    Each stage is timed as a program of its own at the middle of the reply, every call to the end of its device work. First: of the
    Reasoner the question taken in, of the Backbone the voice and the first pair.

    Args:
      model: the four stages.
      prompt: one question and voice.
      state: the state before the first beat, in caches of their final sizes.
      sizes: those.
      beats: of the reply.
      repeats: of each measurement, whose median is taken.
    """
    middle = state._replace(
        reasoner=state.reasoner._replace(length=state.reasoner.length + beats // 2),
        backbone=state.backbone._replace(length=state.backbone.length + 2 * beats),
    )
    first_of = {"Reasoner": (reasoner_first, sizes.reasoner), "Backbone": (backbone_first, sizes.backbone)}  # fmt: skip
    firsts = {
        name: timed(jax.jit(run, static_argnums=2), model, prompt, size, repeats=repeats).median
        for name, (run, size) in first_of.items()
    }
    rows, together = [], 0.0
    seconds = beats * schedule.FRAMES_PER_TEXT / model.cfg.codec.frame_rate
    for stage in make(model, middle):
        each = timed(jax.jit(stage.step), model, stage.state, repeats=repeats).median
        each /= stage.per_beat
        count = beats * stage.per_beat
        first = firsts.get(stage.name, each)
        total = first + (count - 1) * each
        together += total
        rows.append(
            {
                "stage": stage.name,
                "unit": stage.unit,
                "first, ms": milliseconds(first),
                "average, ms": milliseconds(each),
                "count": count,
                "total, s": total,
                "real-time factor": total / seconds,
            }
        )
    return rows, together
