"""Losses against the numbers of the public PyTorch code, and their sums against plain Python."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_training as small
from flax import nnx
from model.random_weights import with_config

from chroma_jax import schedule
from chroma_jax.model.decoder import Decoder
from chroma_jax.training import losses


@pytest.fixture(scope="module")
def dialogue():
    batch = small.with_hidden()
    return jax.tree.map(jnp.asarray, batch.dialogue(batch.hidden))


@pytest.fixture(scope="module")
def whole(dialogue):
    out = jax.jit(schedule.teacher_forced)(small.model(), dialogue)
    return out, losses.teacher_forced_sums(out, dialogue)


def test_backbone_loss_equals_the_golden(golden, cases):
    model = golden.model
    x = jnp.asarray(cases["losses/backbone/input_embeddings"])
    logits = jax.jit(lambda m, x: m.backbone.logits(m.backbone.llama(x)))(model, x)[:, :-1]
    labels = cases["losses/backbone/labels_c0"][:, 1:]
    counts = labels != -100
    sums = losses.code_sums(logits[:, :, None], np.where(counts, labels, 0)[..., None], counts)
    loss = float(sums.loss[0] / sums.count[0])
    np.testing.assert_allclose(loss, cases["losses/backbone/loss"], rtol=0, atol=1e-5)
    assert int(sums.count[0]) == counts.sum() < counts.size


def test_decoder_loss_equals_the_golden(golden, cases):
    """The public training forward counts the Decoder's positions from 0, generation does not: see model/decoder.py."""
    model = golden.model
    config = dataclasses.replace(model.cfg.decoder, shared_first_position=False)
    decoder = with_config(model.decoder, lambda: Decoder(config, rngs=nnx.Rngs(0)))
    frames = jnp.asarray(cases["losses/decoder/frames"])
    hidden = jnp.asarray(cases["losses/decoder/backbone_hidden"]).reshape(-1, 64)
    codes = model.backbone.embed_codes(frames.reshape(-1, 8)[:, :-1])
    logits = decoder(hidden, codes).reshape(*frames.shape[:2], 7, -1)
    labels = cases["losses/decoder/labels"]
    counts = (labels != -100).all(-1)
    np.testing.assert_array_equal(counts, (labels != -100).any(-1))
    sums = losses.code_sums(logits, np.where(labels == -100, 0, labels), counts)
    loss = float(sums.loss.sum() / sums.count.sum())
    np.testing.assert_allclose(loss, cases["losses/decoder/loss"], rtol=0, atol=1e-5)


def test_sums_equal_plain_python(dialogue, whole):
    out, sums = whole
    loss, correct, count = np.zeros(8), np.zeros(8), 0
    for row, length in enumerate(np.asarray(dialogue.frame_lengths)):
        for t in range(length):
            count += 1
            logits = [out.code0_logits[row, t], *out.code_logits[row, t]]
            for book, values in enumerate(logits):
                values, label = np.asarray(values, np.float64), int(dialogue.frames[row, t, book])
                loss[book] += (
                    math.log(np.exp(values - values.max()).sum()) + values.max() - values[label]
                )
                correct[book] += values.argmax() == label
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
    np.testing.assert_array_equal(sums.correct, correct)
    np.testing.assert_array_equal(sums.count, np.full(8, count))
    assert count < dialogue.frames.shape[0] * dialogue.frames.shape[1]


def test_the_stop_frame_is_a_target(dialogue, whole):
    """Leaving the last frame of each row out changes the loss by exactly its cross entropy."""
    out, sums = whole
    shorter = losses.teacher_forced_sums(
        out, dialogue._replace(frame_lengths=dialogue.frame_lengths - 1)
    )
    rows, last = jnp.arange(small.ROWS), dialogue.frame_lengths - 1
    assert not np.asarray(dialogue.frames[rows, last]).any()
    stop = jax.nn.log_softmax(out.code0_logits)[rows, last, 0]
    np.testing.assert_allclose(sums.loss[0] - shorter.loss[0], -stop.sum(), rtol=1e-4)


def test_what_lies_beyond_a_row_counts_for_nothing(dialogue, whole):
    out, sums = whole
    valid = losses.valid_frames(dialogue.frame_lengths, small.FRAMES)
    spoiled = out._replace(
        code0_logits=jnp.where(valid[..., None], out.code0_logits, jnp.nan),
        code_logits=jnp.where(valid[..., None, None], out.code_logits, jnp.inf),
    )
    small.assert_same(losses.teacher_forced_sums(spoiled, dialogue), sums)


def test_drawing_all_frames_is_the_whole_loss(dialogue, whole):
    index = jnp.broadcast_to(jnp.arange(small.FRAMES)[::-1], (small.ROWS, small.FRAMES))
    counts = index < dialogue.frame_lengths[:, None]
    sums = jax.jit(losses.dialogue_sums)(small.model(), dialogue, losses.Draw(index, counts))
    small.assert_near(sums, whole[1], 1e-6)


def test_drawn_frames_alone_count(dialogue, whole):
    """With one frame of each row drawn, code 0 still counts all, the others exactly that one."""
    index = jnp.full((small.ROWS, 1), 1)
    draw = losses.Draw(index, jnp.ones((small.ROWS, 1), bool).at[3].set(False))
    sums = jax.jit(losses.dialogue_sums)(small.model(), dialogue, draw)
    np.testing.assert_allclose(sums.loss[0], whole[1].loss[0], rtol=1e-6)
    rows = np.delete(np.arange(small.ROWS), 3)
    logits = jax.nn.log_softmax(whole[0].code_logits[rows, 1])
    labels = dialogue.frames[rows, 1, 1:]
    want = -jnp.take_along_axis(logits, labels[..., None], -1)[..., 0].sum(0)
    np.testing.assert_allclose(sums.loss[1:], want, rtol=1e-5)
    assert sums.count.tolist() == [float(whole[1].count[0])] + [7.0] * 7


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75])
def test_draw_frames(fraction):
    lengths = jnp.asarray([10, 7, 1, 0])
    draws = jax.vmap(lambda k: losses.draw_frames(k, lengths, 10, fraction))(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert draws.index.shape[2] == math.ceil(fraction * 10)
    for row, length in enumerate(lengths.tolist()):
        counts, index = np.asarray(draws.counts[:, row]), np.asarray(draws.index[:, row])
        assert (counts.sum(1) == math.ceil(fraction * length)).all()
        chosen = np.zeros((len(index), 10))
        np.add.at(chosen, (np.arange(len(index))[:, None], index), counts)
        assert chosen.max(initial=0) <= 1 and not chosen[:, length:].any()  # distinct, real frames
        if length:  # each as likely as the others
            share = math.ceil(fraction * length) / length
            np.testing.assert_allclose(chosen[:, :length].mean(0), share, atol=0.05)


def test_shares_of_parts_add_up(whole):
    sums = whole[1]
    part = jax.tree.map(lambda x: 0.25 * x, sums)
    total = losses.weighted(sums, sums.count, 0.3)
    np.testing.assert_allclose(4 * losses.weighted(part, sums.count, 0.3), total, rtol=1e-6)
    metrics = losses.metrics(sums, 0.3)
    want = 0.7 * metrics["backbone_loss"] + 0.3 * metrics["decoder_loss"]
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
    per_code = [metrics[f"loss/code_{book}"] for book in range(1, 8)]
    np.testing.assert_allclose(metrics["decoder_loss"], np.mean(per_code), rtol=1e-6)


def test_no_frames_is_no_loss():
    empty = losses.code_sums(
        jnp.zeros((2, 3, 8, 5)), jnp.zeros((2, 3, 8), int), jnp.zeros((2, 3), bool)
    )
    assert losses.metrics(empty, 0.5)["loss"] == 0
