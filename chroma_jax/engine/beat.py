"""The step-level API: prefill, one beat, a scan over beats. Pure functions of (model, state): the unit of live streaming.

    state = prefill(model, prompt, controls, keys, max_frames, ...)    # the question heard, the first text token chosen
                                                                       # (in pieces: extend, prefill_voice, start)
    state, out = beat(model, state)                                    # one text token, two frames, 160 ms of sound
    state, outs = decode(model, state, num_beats)                      # lax.scan of beat, in one jitted call

One beat: the Backbone takes [previous frame, H, E] (or the previous frame alone once a row's text is over) and predicts a
frame, takes that frame and predicts the next; the Decoder fills in codes 1..Q-1 of each; the Codec makes 2 x 1920 samples; the
Reasoner takes the text token and chooses the next. There is no branch per row: three positions are always run, and each row
says how many of them count. Nothing a row computes depends on its neighbours.

Axes: B batch, T positions, D width, Q codebooks, V vocabulary, C chunks, P transcript tokens, F voice frames.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax import schedule
from chroma_jax.engine.sampling import StageControls, choose
from chroma_jax.engine.state import Beat, BeatState, Finish, Forced, Prompt, Trace, keep_rows
from chroma_jax.model import kv_cache
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.kv_cache import KVCache

__all__ = [
    "Beat",
    "BeatState",
    "Finish",
    "Prompt",
    "Trace",
    "beat",
    "decode",
    "extend",
    "prefill",
    "prefill_voice",
    "start",
]


def prefill(
    model: ChromaModel,
    prompt: Prompt,
    controls: StageControls,
    key: jax.Array,
    max_frames: jax.Array,
    *,
    reasoner_size: int,
    backbone_size: int,
    voice: KVCache | None = None,
    forced_size: int = 0,
) -> BeatState:
    """Hears the question, takes in the voice, chooses the first text token.

    Args:
      model: the four stages.
      prompt: questions and voices.
      controls: sampling controls, one per row (`sampling.controls`).
      key: [B] typed PRNG keys, one per row.
      max_frames: [B] int32, frames after which a row ends.
      reasoner_size: positions of the Reasoner's cache: at least the longest question's, plus one per beat until `state.grow`.
      backbone_size: positions of the Backbone's cache: at least the voice's, plus four per beat until `state.grow`.
      voice: what `prefill_voice` made of the voices; then those of `prompt` are not read.
      forced_size: places for forced tokens, see `state.Forced`; 0 for none.

    Returns:
      The state before beat 0. A row ends as `Finish.CONTEXT` where its caches, at their present sizes, are full.
    """
    features = None
    if prompt.chunks is not None:
        features = model.reasoner.encode_audio(prompt.chunks, prompt.chunk_lengths)
    # A question may fit a cache that its padding does not fit.
    size = max(reasoner_size, prompt.ids.shape[1])
    hidden, cache = model.reasoner.prefill(prompt.ids, prompt.lengths, features, size)
    reasoner_cache = kv_cache.resized(cache, reasoner_size)
    sizes = dict(backbone_size=backbone_size, voice=voice, forced_size=forced_size)
    last = _at(hidden, prompt.lengths - 1)
    return start(model, prompt, reasoner_cache, last, controls, key, max_frames, **sizes)


def extend(
    model: ChromaModel,
    cache: KVCache,
    ids: jax.Array,
    counts: jax.Array,
    chunks: jax.Array | None = None,
    chunk_lengths: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """The next part of a question: `prefill` of the Reasoner piece by piece, while it is being spoken.

    Args:
      model: the four stages.
      cache: what the Reasoner has heard so far (`Reasoner.llama.init_state` at first), with room for the counts.
      ids: [B, T] int32, the prompt's next tokens, right-padded.
      counts: [B] int32, how many of them there are.
      chunks: [B, C, chunk_frames, mel_bins], the sounds whose placeholders are in `ids`, as whole encoder chunks but for
        the last of a clip; None without sound.
      chunk_lengths: [B, C] int32, valid mel frames; 0 for an absent chunk.

    Returns:
      The Reasoner's state [B, D] at the last token that counts, and the cache.
    """
    features = None
    if chunks is not None:
        features = model.reasoner.encode_audio(chunks, chunk_lengths)
    hidden, cache = model.reasoner.extend(ids, counts, features, cache)
    return _at(hidden, jnp.maximum(counts - 1, 0)), cache


def prefill_voice(
    model: ChromaModel,
    voice_ids: jax.Array,
    voice_id_lengths: jax.Array,
    voice_frames: jax.Array,
    voice_frame_lengths: jax.Array,
    *,
    size: int,
) -> KVCache:
    """What the Backbone makes of the voices (fields of a `Prompt`), in a cache of `size` positions.

    It depends on nothing else, so it can be computed once per voice. It holds the voice prompt without the zero vector, which
    stands where beat 0 has no previous frame.
    """
    lengths = (voice_id_lengths, voice_frame_lengths)
    padded = schedule.voice_length(voice_ids.shape[1], voice_frames.shape[1])
    none = jnp.zeros((voice_ids.shape[0],), jnp.int32)
    where = schedule.layout(*lengths, none, none, padded)
    x = schedule.embed(model, where, voice_ids, voice_frames)
    _, cache = model.backbone.llama.prefill(x, schedule.voice_length(*lengths), padded)
    return kv_cache.resized(cache, size)


def start(
    model: ChromaModel,
    prompt: Prompt | None,
    reasoner_cache: KVCache,
    hidden: jax.Array,
    controls: StageControls,
    key: jax.Array,
    max_frames: jax.Array,
    backbone_size: int,
    voice: KVCache | None = None,
    forced_size: int = 0,
) -> BeatState:
    """The part of `prefill` after the Reasoner has heard the question: its cache, and its state H_0 [B, D].

    `prompt` is read for its voices only, and not at all when `voice` is given. With a `forced_size` W the state has places for W
    forced tokens of each row, none of them filled.
    """
    cfg = model.cfg
    batch, books = hidden.shape[0], cfg.num_codebooks
    if voice is None:
        voices = (
            prompt.voice_ids,
            prompt.voice_id_lengths,
            prompt.voice_frames,
            prompt.voice_frame_lengths,
        )
        voice = prefill_voice(model, *voices, size=backbone_size)
    none = jnp.zeros((batch,), jnp.int32)
    nothing_seen = jnp.zeros((batch, cfg.reasoner.vocab_size), bool)
    token = choose(model.reasoner.logits(hidden), controls.text, _keys(key, 0, _TEXT), nothing_seen)
    return BeatState(
        reasoner=reasoner_cache,
        backbone=kv_cache.resized(voice, backbone_size),
        codec=model.codec.init_decode_state(batch),
        hidden=hidden,
        token=token,
        has_text=jnp.ones((batch,), bool),
        frame=jnp.zeros((batch, books), jnp.int32),
        num_frames=none,
        num_tokens=none,
        max_frames=max_frames.astype(jnp.int32),
        finish=jnp.where(max_frames > 0, Finish.RUNNING, Finish.LENGTH).astype(jnp.int32),
        key=key,
        controls=controls,
        seen_text=nothing_seen,
        seen_codes=jnp.zeros((batch, books, cfg.backbone.vocab_size), bool),
        forced=Forced(jnp.zeros((batch, forced_size), jnp.int32), none) if forced_size else None,
    )


def beat(
    model: ChromaModel,
    state: BeatState,
    paused: jax.Array | None = None,
    *,
    audio: bool = True,
    trace: bool = False,
) -> tuple[BeatState, Beat]:
    """One text token and two audio frames of every running row.

    Args:
      model: the four stages.
      state: from `prefill` or the beat before.
      paused: [B] bool, rows that this beat leaves exactly as they are (their listener is behind); None for no rows.
      audio: whether the Codec runs; without it `samples` is None.
      trace: whether to return intermediate values.

    Returns:
      The next state, and what this beat gave.
    """
    if paused is not None:
        paused &= state.finish == Finish.RUNNING
        resting = state._replace(finish=jnp.where(paused, Finish.PAUSED, state.finish))
        after, out = beat(model, resting, audio=audio, trace=trace)
        return keep_rows(paused, state, after), out._replace(
            finish=jnp.where(paused, Finish.RUNNING, out.finish)
        )
    s = _given(_end_full_rows(model, state))
    running = s.finish == Finish.RUNNING
    token_valid = running & s.has_text
    seen_text = _mark(s.seen_text, s.token, token_valid)

    # Backbone and Decoder: [previous frame, H, E] -> first frame; first frame -> second frame.
    x = schedule.embed_beat(model, s.frame, s.num_frames > 0, s.hidden, s.token)
    count, read = schedule.beat_extent(s.has_text)
    y, cache = model.backbone.llama.step(x, s.backbone, jnp.where(running, count, 0))
    first = _speak(model, s, _at(y, read), s.num_frames, s.seen_codes)
    s, first_valid = _accept(model, s, first.frame)

    x = model.backbone.embed_frames(first.frame)[:, None]
    fed = (s.finish == Finish.RUNNING).astype(jnp.int32)
    y, cache = model.backbone.llama.step(x, cache, fed)
    second = _speak(model, s, y[:, 0], s.num_frames, s.seen_codes)
    s, second_valid = _accept(model, s, second.frame)

    frames = jnp.stack([first.frame, second.frame], axis=1)
    frame_valid = jnp.stack([first_valid, second_valid], axis=1)
    samples, codec = None, s.codec
    if audio:
        # Only whole valid frames are heard; the stop frame (all zeros) is decoded into sound that nobody is given.
        samples, codec = model.codec.decode_step(
            jnp.where(frame_valid[..., None], frames, 0), s.codec
        )

    # Reasoner: the token just spoken -> the next one. It needs nothing of this beat's speech.
    ended = s.token == model.cfg.im_end_token_id
    has_text = s.has_text & ~ended
    active = has_text & (s.finish == Finish.RUNNING)
    reasoner_cache, hidden, token = s.reasoner, s.hidden, s.token
    if s.forced is None or s.forced.hidden is None:
        reasoner_cache, hidden, token = _think(model, s, active, seen_text)

    state = s._replace(
        reasoner=reasoner_cache,
        backbone=cache,
        codec=codec,
        hidden=hidden,
        token=token,
        has_text=has_text,
        frame=second.frame,
        num_tokens=s.num_tokens + token_valid,
        seen_text=seen_text,
    )
    traced = None
    if trace:
        traced = Trace(
            reasoner_hidden=s.hidden,
            backbone_hidden=jnp.stack([first.hidden, second.hidden], axis=1),
            code0_logits=jnp.stack([first.code0_logits, second.code0_logits], axis=1),
            code_logits=jnp.stack([first.code_logits, second.code_logits], axis=1),
        )
    return state, Beat(s.token, token_valid, frames, frame_valid, samples, state.finish, traced)


def decode(
    model: ChromaModel, state: BeatState, num_beats: int, *, audio: bool = True, trace: bool = False
) -> tuple[BeatState, Beat]:
    """`beat` scanned `num_beats` times. The Beat's fields have a leading axis of `num_beats`."""
    step = functools.partial(beat, audio=audio, trace=trace)
    return jax.lax.scan(lambda s, _: step(model, s), state, length=num_beats)


_TEXT, _SPEECH = 0, 1  # streams of a request's randomness


class _Spoken(NamedTuple):
    frame: jax.Array  # [B, Q]
    hidden: jax.Array  # [B, D]
    code0_logits: jax.Array  # [B, V]
    code_logits: jax.Array  # [B, Q-1, V]


def _at(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """hidden [B, T, D] at one position [B] of each row -> [B, D]."""
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def _keys(key: jax.Array, index: jax.Array | int, stream: int) -> jax.Array:
    """One key per row [B] for draw number `index` (scalar or [B]) of a stream."""
    index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), key.shape)
    return jax.vmap(lambda k, i: jax.random.fold_in(jax.random.fold_in(k, stream), i))(key, index)


def _mark(seen: jax.Array, token: jax.Array, valid: jax.Array) -> jax.Array:
    """seen [..., V] with token [...] marked where valid."""
    return seen | ((jnp.arange(seen.shape[-1]) == token[..., None]) & valid[..., None])


def _end_full_rows(model: ChromaModel, s: BeatState) -> BeatState:
    """Ends rows that have no room for one more beat: never silently."""
    room = min(s.backbone.size, model.cfg.backbone.llama.max_positions)
    count, _ = schedule.beat_extent(s.has_text)
    full = s.backbone.length + count + 1 > room
    full |= s.has_text & (s.reasoner.length + 1 > s.reasoner.size)
    full &= s.finish == Finish.RUNNING
    return s._replace(finish=jnp.where(full, Finish.CONTEXT, s.finish))


def _given(s: BeatState) -> BeatState:
    """The state with this beat's text token, and H, from what its rows are given to speak, as far as that goes."""
    if s.forced is None:
        return s
    slot = (s.num_tokens % s.forced.tokens.shape[1])[:, None]
    forced = s.has_text & (s.num_tokens < s.forced.end)
    token = jnp.take_along_axis(s.forced.tokens, slot, axis=1)[:, 0]
    s = s._replace(token=jnp.where(forced, token, s.token))
    if s.forced.hidden is None:
        return s
    hidden = jnp.take_along_axis(s.forced.hidden, slot[..., None], axis=1)[:, 0]
    return s._replace(hidden=jnp.where(forced[:, None], hidden.astype(s.hidden.dtype), s.hidden))


def _speak(
    model: ChromaModel, s: BeatState, hidden: jax.Array, frame_index: jax.Array, seen: jax.Array
) -> _Spoken:
    """The frame that the Backbone's output `hidden` [B, D] predicts."""
    books = model.cfg.num_codebooks

    def pick(book, logits):
        keys = _keys(s.key, frame_index * books + book, _SPEECH)
        return choose(logits, s.controls.codes, keys, seen[:, book])

    def embed(code, book):
        return model.backbone.embed_codes(code[:, None], book)[:, 0]

    logits = model.backbone.logits(hidden)
    code0 = choose(logits, s.controls.code0, _keys(s.key, frame_index * books, _SPEECH), seen[:, 0])
    frame, code_logits = model.decoder.frame(hidden, code0, embed, pick)
    return _Spoken(frame, hidden, logits, code_logits)


def _accept(model: ChromaModel, s: BeatState, frame: jax.Array) -> tuple[BeatState, jax.Array]:
    """Counts the frame of each running row, or ends the row at the stop frame (codes 0..Q-2 all `codebook_eos`)."""
    running = s.finish == Finish.RUNNING
    stop = running & jnp.all(frame[:, :-1] == model.cfg.codebook_eos_token_id, axis=1)
    valid = running & ~stop
    num_frames = s.num_frames + valid
    finish = jnp.where(stop, Finish.STOP, s.finish)
    finish = jnp.where(valid & (num_frames >= s.max_frames), Finish.LENGTH, finish)
    seen = _mark(s.seen_codes, frame, valid[:, None])
    return s._replace(num_frames=num_frames, finish=finish, seen_codes=seen), valid


def _think(
    model: ChromaModel, s: BeatState, active: jax.Array, seen_text: jax.Array
) -> tuple[KVCache, jax.Array, jax.Array]:
    """The Reasoner's next state and token, for active rows; skipped once no row has text left."""

    def step(_, carry):
        hidden, cache = model.reasoner.step(s.token, carry[0], active)
        keys = _keys(s.key, s.num_tokens + 1, _TEXT)
        token = choose(model.reasoner.logits(hidden), s.controls.text, keys, seen_text)
        return cache, hidden, token

    # A loop of one round or none, and not lax.cond, whose branches XLA gives copies of the whole cache.
    rounds = jnp.any(active).astype(jnp.int32)
    return jax.lax.fori_loop(0, rounds, step, (s.reasoner, s.hidden, s.token))
