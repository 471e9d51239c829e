"""What stands between two beats, and what can be done to its rows: put one in, keep, end, give them more room.

Axes: B batch, T positions, D width, Q codebooks, V vocabulary, C chunks, P transcript tokens, F voice frames.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.engine.sampling import StageControls
from chroma_jax.model import kv_cache
from chroma_jax.model.kv_cache import KVCache


class Finish(enum.IntEnum):
    """Why a row's reply ended."""

    RUNNING = 0
    STOP = 1  # the model spoke its stop frame
    LENGTH = 2  # max_frames reached
    CONTEXT = 3  # no room left in a cache or in the Backbone's positions
    CANCELLED = 4
    PAUSED = 5  # inside a beat only: a row that this beat leaves as it is


class Prompt(NamedTuple):
    """A batch of questions and voices, right-padded. Where the Backbone has heard the voice already, its fields may be None."""

    ids: jax.Array  # [B, T] int32, chat template with audio placeholders
    lengths: jax.Array  # [B] int32
    chunks: jax.Array | None  # [B, C, chunk_frames, mel_bins] float32; None without audio
    chunk_lengths: jax.Array | None  # [B, C] int32, valid mel frames; 0 for an absent chunk
    voice_ids: jax.Array | None  # [B, P] int32, transcript of the reference voice
    voice_id_lengths: jax.Array | None  # [B] int32
    voice_frames: jax.Array | None  # [B, F, Q] int32, its codes
    voice_frame_lengths: jax.Array | None  # [B] int32


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


def row_axis(leaf: jax.Array) -> int:
    """The batch axis of an array of a BeatState: stacked caches [L, B, S, C] have layers in front, all others rows."""
    return 1 if leaf.ndim == 4 else 0


def insert_row(state: BeatState, row: BeatState, slot: jax.Array) -> BeatState:
    """The state with row `slot` replaced by that of a batch of one, whose caches are no larger. The others are untouched."""

    def put(whole: jax.Array, one: jax.Array) -> jax.Array:
        if row_axis(whole):  # what lies beyond the row's own length is nothing
            return whole.at[:, slot, : one.shape[2]].set(one[:, 0])
        return whole.at[slot].set(one[0])

    return jax.tree.map(put, state, row)


def end_rows(state: BeatState, rows: jax.Array) -> BeatState:
    """The state with `rows` [B] cancelled, if they are running."""
    ends = rows & (state.finish == Finish.RUNNING)
    return state._replace(finish=jnp.where(ends, Finish.CANCELLED, state.finish))


def grow(state: BeatState, reasoner_size: int, backbone_size: int) -> BeatState:
    """The state with caches of these sizes, none smaller than what its rows hold. Nothing that a row computes changes."""
    return state._replace(
        reasoner=kv_cache.resized(state.reasoner, reasoner_size),
        backbone=kv_cache.resized(state.backbone, backbone_size),
    )


def keep_rows(keep: jax.Array, before: BeatState, after: BeatState) -> BeatState:
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
