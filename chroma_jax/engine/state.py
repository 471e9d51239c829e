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
from chroma_jax.model.codec.transformer import TransformerState
from chroma_jax.model.kv_cache import KVCache


class Finish(enum.IntEnum):
    """Why a row's reply ended."""

    RUNNING = 0
    STOP = 1  # the model spoke its stop frame
    LENGTH = 2  # max_frames reached
    CONTEXT = 3  # no room left in a cache or in the Backbone's positions
    CANCELLED = 4
    PAUSED = 5  # inside a beat only: a row that this beat leaves as it is
    FAILED = 6  # on the host only: an exception ended it


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


class Forced(NamedTuple):
    """Words that the rows are given to speak in place of the Reasoner's own. Token i of a reply stands at slot i % W."""

    tokens: jax.Array  # [B, W] int32
    end: jax.Array  # [B] int32, tokens given so far: those before this one are forced, later ones are the Reasoner's
    hidden: jax.Array | None = (
        None  # [B, W, D], states to speak them with; None: the Reasoner thinks on them
    )


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
    forced: Forced | None = None  # None where every row speaks its own words


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


# Where the rows of what a state is made of lie; all other arrays have them in front.
_ROW_AXES = {
    KVCache: KVCache(k=1, v=1, length=0),
    TransformerState: TransformerState(k=1, v=1, position=0),
}


def row_axes(state: BeatState) -> BeatState:
    """The batch axis of each array of a state, in a tree like it.

    Raises:
      ValueError: an array without that many rows there: a part that the table does not know.
    """

    def of(part: Any) -> Any:
        return _ROW_AXES.get(type(part), 0)

    axes = jax.tree.map(of, state, is_leaf=lambda part: type(part) in _ROW_AXES)
    rows = state.finish.shape[0]
    for (path, axis), leaf in zip(
        jax.tree.leaves_with_path(axes), jax.tree.leaves(state), strict=True
    ):
        if axis >= leaf.ndim or leaf.shape[axis] != rows:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} has shape {list(leaf.shape)}, "
                f"not {rows} rows on axis {axis}"
            )
    return axes


def insert_rows(state: BeatState, rows: BeatState, slots: jax.Array) -> BeatState:
    """The state with rows `slots` [n] replaced by those of a batch of n, whose caches are no larger.

    The others are untouched. What lies beyond a row's own length is nothing and is not copied.
    """

    def put(whole: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        if axis:  # a stack of layers in front, places behind
            return whole.at[:, slots, : new.shape[2]].set(new)
        return whole.at[slots].set(new)

    return jax.tree.map(put, state, rows, row_axes(state))


def extract_rows(state: BeatState, slots: jax.Array) -> BeatState:
    """Rows `slots` [n] as a state of their own; the inverse of `insert_rows`."""
    return jax.tree.map(lambda x, axis: jnp.take(x, slots, axis), state, row_axes(state))


def empty_like(row: BeatState, rows: int) -> BeatState:
    """A state of as many rows, shaped as those of `row`, a batch of one, in which nothing runs."""
    wide = jax.tree.map(lambda x, axis: jnp.repeat(x, rows, axis), row, row_axes(row))
    return wide._replace(finish=jnp.full((rows,), Finish.CANCELLED, jnp.int32))


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

    The growing caches need no such care: a row that does not run keeps its length, and what lies beyond it is nothing.
    """

    def pick(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        others = tuple(a for a in range(old.ndim) if a != axis)
        return jnp.where(jnp.expand_dims(keep, others), old, new)

    def small(state: BeatState) -> BeatState:
        return state._replace(reasoner=None, backbone=None)

    kept = jax.tree.map(pick, small(before), small(after), small(row_axes(before)))
    return kept._replace(reasoner=after.reasoner, backbone=after.backbone)
