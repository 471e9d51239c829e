"""The Backbone's sequence: where transcript, voice, Reasoner states, text and frames stand. One source for all uses.

    [text_start] [voice transcript] [text_end] [voice frames] [zero]  H0 E0 a0 a1  H1 E1 a2 a3  ...  an an+1 ...
    |---------------------- voice prompt --------------------| |-- beat 0 --|
                                                               zero H0 E0 a0  a1 H1 E1 a2  ...

H_i is the Reasoner's hidden state from which text token i was chosen, E_i that token's embedding, a_t the sum of the
embeddings of frame t's codes. The output at E_i predicts frame 2i, the output at a frame that no pair follows predicts the
next frame. After the pair of the last text token (im_end) frames follow frames. Source: paper section 3; reference
`prepare_inputs_for_generation`.

A *beat* is the span [previous frame] [H_i] [E_i] [frame 2i] (four positions, two while there is no text), and predicts
frames 2i and 2i + 1: prefill ends before the zero vector, which stands where beat 0 has no previous frame.

Axes: B batch, S positions, L text tokens, T frames, P transcript tokens, F voice frames, D width, Q codebooks.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.model.chroma import ChromaModel

FRAMES_PER_TEXT = 2
POSITIONS_PER_BEAT = 2 + FRAMES_PER_TEXT


class Kind(enum.IntEnum):
    """What a position of the sequence holds."""

    PAD = 0
    TEXT_START = 1
    VOICE_TEXT = 2
    TEXT_END = 3
    VOICE_FRAME = 4
    ZERO = 5
    HIDDEN = 6
    TEXT = 7
    FRAME = 8


class Layout(NamedTuple):
    """What stands at each position, and which one of its kind."""

    kind: jax.Array  # [B, S] int32, a Kind
    index: jax.Array  # [B, S] int32, index into that kind's source


class Dialogue(NamedTuple):
    """A voice and an answer, right-padded: what teacher forcing needs. Training and evaluation use the same."""

    voice_ids: jax.Array  # [B, P] int32, transcript tokens of the reference voice
    voice_id_lengths: jax.Array  # [B]
    voice_frames: jax.Array  # [B, F, Q] int32, its codes
    voice_frame_lengths: jax.Array  # [B]
    hidden: jax.Array  # [B, L, D], Reasoner state H_i before each text token
    text: jax.Array  # [B, L] int32, answer tokens, im_end included
    text_lengths: jax.Array  # [B]
    frames: jax.Array  # [B, T, Q] int32, answer codes, stop frame included where there is one
    frame_lengths: jax.Array  # [B]


class TeacherForced(NamedTuple):
    """What the Backbone and the Decoder say about each frame of a dialogue, given everything before it."""

    hidden: jax.Array  # [B, T, D], the Backbone's output that predicts frame t
    code0_logits: jax.Array  # [B, T, V] float32
    code_logits: (
        jax.Array
    )  # [B, T, Q-1, V] float32, codes 1..Q-1 given code 0 and the codes between


def voice_length(voice_ids: jax.Array | int, voice_frames: jax.Array | int) -> jax.Array | int:
    """Positions of the voice prompt without the zero vector: transcript and frames, and the two marks around the text."""
    return voice_ids + voice_frames + 2


def total_length(voice_ids, voice_frames, text, frames):
    """Positions of a whole dialogue in which the last frame is fed too (numbers or arrays)."""
    return voice_length(voice_ids, voice_frames) + 1 + 2 * text + frames


def layout(
    voice_ids: jax.Array, voice_frames: jax.Array, text: jax.Array, frames: jax.Array, size: int
) -> Layout:
    """The sequence of each row from its four lengths [B], in `size` positions; longer rows are cut, shorter padded.

    The number of text tokens must fit the frames: a pair stands only before a frame, text <= ceil(frames / 2).
    """
    at = jnp.arange(size)
    voice_ids, voice_frames, text, frames = (
        n[:, None] for n in (voice_ids, voice_frames, text, frames)
    )
    voice_start = 2 + voice_ids  # first voice frame
    zero = voice_length(voice_ids, voice_frames)
    reply = at - zero - 1  # position within H0 E0 a0 a1 ...
    paired = reply < POSITIONS_PER_BEAT * text
    pair, slot = reply // POSITIONS_PER_BEAT, reply % POSITIONS_PER_BEAT
    frame = jnp.where(
        paired,
        FRAMES_PER_TEXT * pair + slot - 2,
        FRAMES_PER_TEXT * text + reply - POSITIONS_PER_BEAT * text,
    )
    is_frame = (reply >= 0) & ((slot >= 2) | ~paired)
    kinds = (
        (at == 0, Kind.TEXT_START, 0),
        ((at >= 1) & (at < 1 + voice_ids), Kind.VOICE_TEXT, at - 1),
        (at == 1 + voice_ids, Kind.TEXT_END, 0),
        ((at >= voice_start) & (at < zero), Kind.VOICE_FRAME, at - voice_start),
        (at == zero, Kind.ZERO, 0),
        ((reply >= 0) & paired & (slot == 0), Kind.HIDDEN, pair),
        ((reply >= 0) & paired & (slot == 1), Kind.TEXT, pair),
        (is_frame & (frame < frames), Kind.FRAME, frame),
    )
    conditions = [condition for condition, _, _ in kinds]
    kind = jnp.select(conditions, [jnp.int32(k) for _, k, _ in kinds], jnp.int32(Kind.PAD))
    index = jnp.select(conditions, [jnp.asarray(i, jnp.int32) for _, _, i in kinds], jnp.int32(0))
    shape = (voice_ids.shape[0], size)
    return Layout(jnp.broadcast_to(kind, shape), jnp.broadcast_to(index, shape))


def predictors(
    voice_ids: jax.Array, voice_frames: jax.Array, text: jax.Array, count: int
) -> jax.Array:
    """Positions [B, count] whose outputs predict frames 0..count-1 of each row, from lengths [B]."""
    frame = jnp.arange(count)
    text = text[:, None]
    start = voice_length(voice_ids, voice_frames)[:, None] + 1
    beat, second = frame // FRAMES_PER_TEXT, frame % FRAMES_PER_TEXT
    with_text = POSITIONS_PER_BEAT * beat + 1 + second  # E_i, then a_2i
    without = 2 * text + frame - 1  # the frame before
    return start + jnp.where(beat < text, with_text, without)


def embed(
    model: ChromaModel,
    where: Layout,
    voice_ids: jax.Array,
    voice_frames: jax.Array,
    hidden: jax.Array | None = None,
    text: jax.Array | None = None,
    frames: jax.Array | None = None,
) -> jax.Array:
    """Backbone inputs [B, S, D] of a layout; sources as in `Dialogue` (those of the answer may be absent)."""
    cfg = model.cfg
    ids = jnp.zeros_like(where.index)
    ids = jnp.where(where.kind == Kind.TEXT_START, cfg.text_start_token_id, ids)
    ids = jnp.where(where.kind == Kind.TEXT_END, cfg.text_end_token_id, ids)
    ids = jnp.where(where.kind == Kind.VOICE_TEXT, _take(voice_ids, where.index), ids)
    codes = jnp.where(
        (where.kind == Kind.VOICE_FRAME)[..., None], _take(voice_frames, where.index), jnp.int32(0)
    )
    if text is not None:
        ids = jnp.where(where.kind == Kind.TEXT, _take(text, where.index), ids)
    if frames is not None:
        codes = jnp.where((where.kind == Kind.FRAME)[..., None], _take(frames, where.index), codes)

    def among(*kinds: Kind) -> jax.Array:
        return jnp.isin(where.kind, jnp.asarray(kinds))[..., None]

    is_text = among(Kind.TEXT_START, Kind.VOICE_TEXT, Kind.TEXT_END, Kind.TEXT)
    # The Backbone's dtype rules: Reasoner embeddings are cast into it.
    as_frames = model.backbone.embed_frames(codes)
    x = jnp.where(is_text, model.reasoner.embed(ids).astype(as_frames.dtype), 0)
    x = jnp.where(among(Kind.VOICE_FRAME, Kind.FRAME), as_frames, x)
    if hidden is not None:
        x = jnp.where(among(Kind.HIDDEN), _take(hidden, where.index).astype(x.dtype), x)
    return x


def embed_beat(
    model: ChromaModel,
    previous: jax.Array,
    has_previous: jax.Array,
    hidden: jax.Array,
    text: jax.Array,
) -> jax.Array:
    """The first three positions of a beat [B, 3, D]: previous frame [B, Q] (zero vector where there is none), H [B, D], E of text [B]."""
    frame = jnp.where(has_previous[:, None], model.backbone.embed_frames(previous), 0)
    e = model.reasoner.embed(text)
    return jnp.stack([frame, hidden.astype(frame.dtype), e.astype(frame.dtype)], axis=1)


def beat_extent(has_text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For rows with or without a text token [B]: how many of `embed_beat`'s positions count, and where to read the output."""
    count = jnp.where(has_text, 3, 1)
    return count, count - 1


def frame_states(model: ChromaModel, dialogue: Dialogue) -> jax.Array:
    """The Backbone over whole dialogues in one parallel pass: its outputs [B, T, D] that predict each frame.

    They equal what streaming computes on the same tokens. At and beyond a row's `frame_lengths` they are meaningless.
    """
    d = dialogue
    size = total_length(
        d.voice_ids.shape[1], d.voice_frames.shape[1], d.text.shape[1], d.frames.shape[1]
    )
    # A pair stands only before a frame: tokens that speech has no room for are not in the sequence.
    text_lengths = jnp.minimum(d.text_lengths, -(-d.frame_lengths // FRAMES_PER_TEXT))
    lengths = (d.voice_id_lengths, d.voice_frame_lengths, text_lengths)
    where = layout(*lengths, d.frame_lengths, size)
    x = embed(model, where, d.voice_ids, d.voice_frames, d.hidden, d.text, d.frames)
    outputs = model.backbone.llama(x)
    return _take(outputs, jnp.minimum(predictors(*lengths, d.frames.shape[1]), size - 1))


def frame_logits(model: ChromaModel, hidden: jax.Array, frames: jax.Array) -> jax.Array:
    """The Decoder on given frames [B, T, Q] and the states [B, T, D] that predict them: logits [B, T, Q-1, V] of codes 1..Q-1."""
    batch, count, books = frames.shape
    codes = model.backbone.embed_codes(frames[..., :-1]).reshape(batch * count, books - 1, -1)
    logits = model.decoder(hidden.reshape(batch * count, -1), codes)
    return logits.reshape(batch, count, books - 1, -1)


def teacher_forced(model: ChromaModel, dialogue: Dialogue) -> TeacherForced:
    """Backbone and Decoder over whole dialogues in one parallel pass; equals what streaming computes on the same tokens.

    Frames at and beyond a row's `frame_lengths` give meaningless outputs. The loss on `TeacherForced` is the paper's.
    """
    hidden = frame_states(model, dialogue)
    return TeacherForced(
        hidden=hidden,
        code0_logits=model.backbone.logits(hidden),
        code_logits=frame_logits(model, hidden, dialogue.frames),
    )


def _take(source: jax.Array, index: jax.Array) -> jax.Array:
    """source [B, n, ...] at index [B, S] -> [B, S, ...]; indices outside are clamped (their positions are masked)."""
    index = jnp.clip(index, 0, source.shape[1] - 1)
    return jnp.take_along_axis(
        source, index.reshape(*index.shape, *(1,) * (source.ndim - 2)), axis=1
    )
