"""The step-level API: prefill, one beat, a scan over beats. Pure functions of (model, state): the unit of live streaming.

    state = prefill(model, prompt, controls, keys, max_frames, ...)    # the question heard, the first text token chosen
    state, out = beat(model, state)                                    # one text token, two frames, 160 ms of sound
    state, outs = decode(model, state, num_beats)                      # lax.scan of beat, in one jitted call

One beat: the Backbone takes [previous frame, H, E] (or the previous frame alone once a row's text is over) and predicts a
frame, takes that frame and predicts the next; the Decoder fills in codes 1..Q-1 of each; the Codec makes 2 x 1920 samples; the
Reasoner takes the text token and chooses the next. There is no branch per row: three positions are always run, and each row
says how many of them count. Nothing a row computes depends on its neighbours.

Axes: B batch, T positions, D width, Q codebooks, V vocabulary, C chunks, P transcript tokens, F voice frames.
"""

from __future__ import annotations

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax import schedule
from chroma_jax.generation.sampling import StageControls, choose
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.kv_cache import KVCache


class Finish(enum.IntEnum):
    """Why a row's reply ended."""

    RUNNING = 0
    STOP = 1  # the model spoke its stop frame
    LENGTH = 2  # max_frames reached
    CONTEXT = 3  # no room left in a cache or in the Backbone's positions
    CANCELLED = 4
    HELD = 5  # inside a beat only: a row that this beat leaves as it is


class Prompt(NamedTuple):
    """A batch of questions and voices, right-padded."""

    ids: jax.Array  # [B, T] int32, chat template with audio placeholders
    lengths: jax.Array  # [B] int32
    chunks: jax.Array | None  # [B, C, chunk_frames, mel_bins] float32; None without audio
    chunk_lengths: jax.Array | None  # [B, C] int32, valid mel frames; 0 for an absent chunk
    voice_ids: jax.Array  # [B, P] int32, transcript of the reference voice
    voice_id_lengths: jax.Array  # [B] int32
    voice_frames: jax.Array  # [B, F, Q] int32, its codes
    voice_frame_lengths: jax.Array  # [B] int32


class BeatState(NamedTuple):
    """Everything between two beats. Rows are independent; donate it."""

    reasoner: KVCache
    backbone: KVCache
    codec: Any  # the Codec's decode state
    hidden: jax.Array  # [B, D], H of this beat
    token: jax.Array  # [B] int32, text token of this beat
    has_text: jax.Array  # [B] bool, this beat has a text token
    frame: jax.Array  # [B, Q] int32, the frame before this beat
    num_frames: jax.Array  # [B] int32, frames given so far
    num_tokens: jax.Array  # [B] int32, text tokens given so far, im_end included
    max_frames: jax.Array  # [B] int32
    finish: jax.Array  # [B] int32, a Finish
    key: jax.Array  # [B] typed PRNG keys, one per request
    controls: StageControls
    seen_text: jax.Array  # [B, V] bool, text tokens given so far
    seen_codes: jax.Array  # [B, Q, V] bool, codes given so far, per codebook


class Beat(NamedTuple):
    """What one beat gave. Entries that are not valid are meaningless."""

    token: jax.Array  # [B] int32
    token_valid: jax.Array  # [B] bool
    frames: jax.Array  # [B, 2, Q] int32
    frame_valid: jax.Array  # [B, 2] bool, a prefix
    samples: (
        jax.Array | None
    )  # [B, 2 * frame_samples] float32 at the codec's rate; None without audio
    finish: jax.Array  # [B] int32, a Finish, after this beat
    trace: Trace | None


class Trace(NamedTuple):
    """Intermediate values of a beat, for parity tests and research."""

    reasoner_hidden: jax.Array  # [B, D]
    backbone_hidden: jax.Array  # [B, 2, D]
    code0_logits: jax.Array  # [B, 2, V] float32
    code_logits: jax.Array  # [B, 2, Q-1, V] float32


def prefill(
    model: ChromaModel,
    prompt: Prompt,
    controls: StageControls,
    key: jax.Array,
    max_frames: jax.Array,
    *,
    reasoner_size: int,
    backbone_size: int,
) -> BeatState:
    """Hears the question, takes in the voice, chooses the first text token.

    Args:
      model: the four stages.
      prompt: questions and voices.
      controls: sampling controls, one per row (`sampling.controls`).
      key: [B] typed PRNG keys, one per row.
      max_frames: [B] int32, frames after which a row ends.
      reasoner_size: positions of the Reasoner's cache: at least T, plus one per beat.
      backbone_size: positions of the Backbone's cache: at least P + F + 2, plus four per beat.

    Returns:
      The state before beat 0.
    """
    features = None
    if prompt.chunks is not None:
        features = model.reasoner.encode_audio(prompt.chunks, prompt.chunk_lengths)
    hidden, reasoner_cache = model.reasoner.prefill(
        prompt.ids, prompt.lengths, features, reasoner_size
    )
    last = jnp.take_along_axis(hidden, (prompt.lengths - 1)[:, None, None], axis=1)[:, 0]
    return start(model, prompt, reasoner_cache, last, controls, key, max_frames, backbone_size)


def start(
    model: ChromaModel,
    prompt: Prompt,
    reasoner_cache: KVCache,
    hidden: jax.Array,
    controls: StageControls,
    key: jax.Array,
    max_frames: jax.Array,
    backbone_size: int,
) -> BeatState:
    """The part of `prefill` after the Reasoner has heard the question: its cache, and its state H_0 [B, D]."""
    cfg = model.cfg
    batch, books = prompt.ids.shape[0], cfg.num_codebooks
    lengths = (prompt.voice_id_lengths, prompt.voice_frame_lengths)
    size = schedule.voice_length(prompt.voice_ids.shape[1], prompt.voice_frames.shape[1])
    none = jnp.zeros((batch,), jnp.int32)
    where = schedule.layout(*lengths, none, none, size)
    x = schedule.embed(model, where, prompt.voice_ids, prompt.voice_frames)
    voice_length = schedule.voice_length(*lengths)
    _, backbone_cache = model.backbone.llama.prefill(x, voice_length, backbone_size)
    nothing_seen = jnp.zeros((batch, cfg.reasoner.vocab_size), bool)
    token = choose(model.reasoner.logits(hidden), controls.text, _keys(key, 0, _TEXT), nothing_seen)
    return BeatState(
        reasoner=reasoner_cache,
        backbone=backbone_cache,
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
    )


def beat(
    model: ChromaModel,
    state: BeatState,
    hold: jax.Array | None = None,
    *,
    audio: bool = True,
    trace: bool = False,
) -> tuple[BeatState, Beat]:
    """One text token and two audio frames of every running row.

    Args:
      model: the four stages.
      state: from `prefill` or the beat before.
      hold: [B] bool, rows that this beat leaves exactly as they are (their listener is behind); None for no rows.
      audio: whether the Codec runs; without it `samples` is None.
      trace: whether to return intermediate values.

    Returns:
      The next state, and what this beat gave.
    """
    if hold is not None:
        hold &= state.finish == Finish.RUNNING
        held = state._replace(finish=jnp.where(hold, Finish.HELD, state.finish))
        after, out = beat(model, held, audio=audio, trace=trace)
        return _keep_rows(hold, state, after), out._replace(
            finish=jnp.where(hold, Finish.RUNNING, out.finish)
        )
    s = _end_full_rows(model, state)
    running = s.finish == Finish.RUNNING
    token_valid = running & s.has_text
    seen_text = _mark(s.seen_text, s.token, token_valid)

    # Backbone and Decoder: [previous frame, H, E] -> first frame; first frame -> second frame.
    x = schedule.embed_beat(model, s.frame, s.num_frames > 0, s.hidden, s.token)
    count, read = schedule.beat_extent(s.has_text)
    y, cache = model.backbone.llama.step(x, s.backbone, jnp.where(running, count, 0))
    first_hidden = jnp.take_along_axis(y, read[:, None, None], axis=1)[:, 0]
    first = _speak(model, s, first_hidden, s.num_frames, s.seen_codes)
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


def row_axis(leaf: jax.Array) -> int:
    """The batch axis of an array of a BeatState: stacked caches [L, B, S, K, H] have layers in front, all others rows."""
    return 1 if leaf.ndim == 5 else 0


def insert_row(state: BeatState, row: BeatState, slot: jax.Array) -> BeatState:
    """The state with row `slot` replaced by that of a batch of one with the same cache sizes. The others are untouched."""

    def put(whole: jax.Array, one: jax.Array) -> jax.Array:
        index = (slice(None),) * row_axis(whole) + (slot,)
        return whole.at[index].set(jnp.squeeze(one, row_axis(one)))

    return jax.tree.map(put, state, row)


def end_rows(state: BeatState, rows: jax.Array) -> BeatState:
    """The state with `rows` [B] cancelled, if they are running."""
    ends = rows & (state.finish == Finish.RUNNING)
    return state._replace(finish=jnp.where(ends, Finish.CANCELLED, state.finish))


_TEXT, _SPEECH = 0, 1  # streams of a request's randomness


class _Spoken(NamedTuple):
    frame: jax.Array  # [B, Q]
    hidden: jax.Array  # [B, D]
    code0_logits: jax.Array  # [B, V]
    code_logits: jax.Array  # [B, Q-1, V]


def _keys(key: jax.Array, index: jax.Array | int, stream: int) -> jax.Array:
    """One key per row [B] for draw number `index` (scalar or [B]) of a stream."""
    index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), key.shape)
    return jax.vmap(lambda k, i: jax.random.fold_in(jax.random.fold_in(k, stream), i))(key, index)


def _mark(seen: jax.Array, token: jax.Array, valid: jax.Array) -> jax.Array:
    """seen [..., V] with token [...] marked where valid."""
    return seen | ((jnp.arange(seen.shape[-1]) == token[..., None]) & valid[..., None])


def _keep_rows(keep: jax.Array, before: BeatState, after: BeatState) -> BeatState:
    """`before` for the rows to keep, `after` for the others.

    Keys and values of the growing caches need no such care: what lies beyond a row's length is nothing.
    """

    def pick(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(keep, _others(old)), old, new)

    def _others(leaf: jax.Array) -> tuple[int, ...]:
        return tuple(axis for axis in range(leaf.ndim) if axis != row_axis(leaf))

    kept = jax.tree.map(
        pick,
        before._replace(reasoner=None, backbone=None),
        after._replace(reasoner=None, backbone=None),
    )
    lengths = {
        name: getattr(after, name)._replace(
            length=pick(getattr(before, name).length, getattr(after, name).length)
        )
        for name in ("reasoner", "backbone")
    }
    return kept._replace(**lengths)


def _end_full_rows(model: ChromaModel, s: BeatState) -> BeatState:
    """Ends rows that have no room for one more beat: never silently."""
    room = min(s.backbone.size, model.cfg.backbone.llama.max_positions)
    count, _ = schedule.beat_extent(s.has_text)
    full = s.backbone.length + count + 1 > room
    full |= s.has_text & (s.reasoner.length + 1 > s.reasoner.size)
    full &= s.finish == Finish.RUNNING
    return s._replace(finish=jnp.where(full, Finish.CONTEXT, s.finish))


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

    def step():
        hidden, cache = model.reasoner.step(s.token, s.reasoner, active)
        keys = _keys(s.key, s.num_tokens + 1, _TEXT)
        return (
            cache,
            hidden,
            choose(model.reasoner.logits(hidden), s.controls.text, keys, seen_text),
        )

    def skip():
        return s.reasoner, s.hidden, s.token

    return jax.lax.cond(jnp.any(active), step, skip)
