"""The losses, kept as sums so that microbatches and shards add up to exactly the loss of the whole batch.

Of speech, the paper's two:

L = (1 - λ) L_backbone + λ L_decoder. L_backbone is the mean cross entropy of code 0 over a batch's frames, L_decoder that of
codes 1..Q-1 over its frames (or a drawn part of them). The stop frame is a frame like the others. Source: paper section 4.

Of text: the mean cross entropy of the Reasoner's answer tokens over a batch's tokens, the final im_end among them.

Axes: B batch, T frames, K drawn frames, L answer tokens, Q codebooks, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax import schedule
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.schedule import Dialogue, TeacherForced


class Sums(NamedTuple):
    """Sums over frames, per codebook; or over answer tokens, with Q = 1. They add."""

    loss: jax.Array  # [Q] float32, cross entropy in nats
    correct: jax.Array  # [Q] float32, how often the likeliest code or token was the right one
    count: jax.Array  # [Q] float32, frames or tokens


class Draw(NamedTuple):
    """Which frames of each row the Decoder's loss is computed on."""

    index: jax.Array  # [B, K] int32
    counts: jax.Array  # [B, K] bool, false where a row has fewer


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [..., V] and labels [...] -> cross entropy and correctness [...], float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    return loss, (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def code_sums(logits: jax.Array, labels: jax.Array, counts: jax.Array) -> Sums:
    """Logits [B, T, n, V] and labels [B, T, n] of n codebooks, frames that count [B, T] -> sums [n]."""
    loss, correct = cross_entropy(logits, labels)
    # Frames that do not count may hold anything, infinities included.
    within = counts[..., None]
    return Sums(
        jnp.where(within, loss, 0).sum((0, 1)),
        jnp.where(within, correct, 0).sum((0, 1)),
        jnp.broadcast_to(counts.sum(), labels.shape[2:]).astype(jnp.float32),
    )


def valid_frames(lengths: jax.Array, size: int) -> jax.Array:
    """[B] -> [B, size] bool."""
    return jnp.arange(size) < lengths[:, None]


def draw_frames(key: jax.Array, lengths: jax.Array, size: int, fraction: float) -> Draw:
    """Draws ceil(fraction * length) of each row's frames, each equally likely; K = ceil(fraction * size) static places."""
    noise = jax.random.uniform(key, (lengths.shape[0], size))
    noise = jnp.where(valid_frames(lengths, size), noise, -1.0)
    places = math.ceil(fraction * size)
    _, index = jax.lax.top_k(noise, places)
    drawn = jnp.ceil(fraction * lengths.astype(jnp.float32)).astype(jnp.int32)
    return Draw(index.astype(jnp.int32), valid_frames(jnp.minimum(drawn, places), places))


def teacher_forced_sums(out: TeacherForced, dialogue: Dialogue) -> Sums:
    """The sums of all frames from what `schedule.teacher_forced` gave."""
    counts = valid_frames(dialogue.frame_lengths, dialogue.frames.shape[1])
    logits = jnp.concatenate([out.code0_logits[:, :, None], out.code_logits], axis=2)
    return code_sums(logits, dialogue.frames, counts)


def dialogue_sums(model: ChromaModel, dialogue: Dialogue, draw: Draw | None = None) -> Sums:
    """The sums of a batch of dialogues; with `draw`, the Decoder runs on the drawn frames only."""
    if draw is None:
        return teacher_forced_sums(schedule.teacher_forced(model, dialogue), dialogue)
    frames = dialogue.frames
    hidden = schedule.frame_states(model, dialogue)
    counts = valid_frames(dialogue.frame_lengths, frames.shape[1])
    first = code_sums(model.backbone.logits(hidden)[:, :, None], frames[..., :1], counts)
    hidden, frames = (
        jnp.take_along_axis(x, draw.index[..., None], axis=1) for x in (hidden, frames)
    )
    logits = schedule.frame_logits(model, hidden, frames)
    others = code_sums(logits, frames[..., 1:], draw.counts)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, others)


def text_sums(logits: jax.Array, text: jax.Array, lengths: jax.Array) -> Sums:
    """Logits [B, L, V] of answer tokens `text` [B, L], of which `lengths` [B] count -> sums [1]."""
    counts = valid_frames(lengths, text.shape[1])
    return code_sums(logits[:, :, None], text[..., None], counts)


def text_share(sums: Sums, count: jax.Array) -> jax.Array:
    """This part's share of the loss of text, where `count` [1] are the tokens of the whole batch."""
    return (sums.loss / jnp.maximum(count, 1))[0]


def text_metrics(sums: Sums) -> dict[str, jax.Array]:
    """Scalars of a batch of text."""
    loss = text_share(sums, sums.count)
    accuracy = (sums.correct / jnp.maximum(sums.count, 1))[0]
    return {
        "loss": loss,
        "text_loss": loss,
        "text_accuracy": accuracy,
        "text_tokens": sums.count[0],
    }


def weighted(sums: Sums, count: jax.Array, decoder_weight: float) -> jax.Array:
    """This part's share of L, where `count` [Q] are the frames of the whole batch. Shares add up to L."""
    per_book = sums.loss / jnp.maximum(count, 1)
    # A weight of zero leaves nothing, not even 0 * infinity.
    share = jnp.zeros((), jnp.float32)
    if decoder_weight < 1:
        share += (1 - decoder_weight) * per_book[0]
    if decoder_weight > 0:
        share += decoder_weight * per_book[1:].mean()
    return share


def metrics(sums: Sums, decoder_weight: float) -> dict[str, jax.Array]:
    """Scalars of a batch: the losses, and loss and accuracy per codebook."""
    count = jnp.maximum(sums.count, 1)
    loss, accuracy = sums.loss / count, sums.correct / count
    out = {
        "loss": weighted(sums, sums.count, decoder_weight),
        "backbone_loss": loss[0],
        "decoder_loss": loss[1:].mean(),
        "backbone_accuracy": accuracy[0],
        "decoder_accuracy": accuracy[1:].mean(),
        "frames": sums.count[0],
        "decoder_frames": sums.count[1],
    }
    for book in range(loss.shape[0]):
        out[f"loss/code_{book}"], out[f"accuracy/code_{book}"] = loss[book], accuracy[book]
    return out
