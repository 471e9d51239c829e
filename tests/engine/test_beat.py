"""Teacher forcing equals streaming, beats compose, and a finished batch stays finished."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax import Sampling, TokenSampling, Turn, schedule
from chroma_jax.audio.batch import normalize_inputs, pack
from chroma_jax.engine import beat, programs
from chroma_jax.engine.state import Forced, row_axes
from chroma_jax.model import kv_cache
from chroma_jax.model.chroma import abstract_model

BEATS = 9


@pytest.fixture(scope="module")
def started(golden, voice):
    """Two rows that differ in question, voice and sampling, before their first beat; row 1's text ends early."""
    processor = golden.processor
    rows = [
        (processor.question(Turn(text="What time is it?")), processor.voice_arrays((voice.wave, 24000), voice.text)),
        (processor.question(Turn(text="Hello, and good morning.")), processor.voice_arrays((voice.wave[:20000], 24000), "and")),
    ]  # fmt: skip
    batch = normalize_inputs(golden.config, pack(rows))
    prompt = programs.as_prompt(batch, *programs.encode_voices(golden.model, batch))
    samplings = [
        Sampling(temperature=1.0, text=TokenSampling(temperature=1.0)),
        Sampling(temperature=0.8, top_k=30),
    ]

    def begin(model, **more):
        return programs.begin(model, prompt, 2 * BEATS, samplings, [1, 2], **more)

    _, out = programs.decode(golden.model, begin(golden.model), BEATS, audio=False, trace=True)
    config = dataclasses.replace(golden.config, im_end_token_id=int(out.token[3, 1]))
    model = nnx.merge(nnx.split(abstract_model(config))[0], nnx.state(golden.model))
    return model, prompt, begin


def assert_teacher_forcing_gives(model, prompt, out):
    """Traced beats, rows first, are what Backbone, Decoder and Reasoner compute of their tokens in one pass."""
    rows = len(prompt.lengths)
    text_lengths = out.token_valid.sum(axis=1)
    assert text_lengths[1] <= 4 < BEATS  # beats with and without text
    frames = out.frames.reshape(rows, 2 * BEATS, -1)
    dialogue = schedule.Dialogue(
        voice_ids=prompt.voice_ids,
        voice_id_lengths=prompt.voice_id_lengths,
        voice_frames=prompt.voice_frames,
        voice_frame_lengths=prompt.voice_frame_lengths,
        hidden=out.trace.reasoner_hidden,
        text=out.token,
        text_lengths=text_lengths,
        frames=frames,
        frame_lengths=np.full(rows, 2 * BEATS),
    )
    forced = jax.jit(schedule.teacher_forced)(model, dialogue)
    for name in ("backbone_hidden", "code0_logits", "code_logits"):
        streamed = getattr(out.trace, name)
        streamed = streamed.reshape(rows, 2 * BEATS, *streamed.shape[3:])
        whole = getattr(forced, name.replace("backbone_", ""))
        np.testing.assert_allclose(
            whole, streamed, rtol=0, atol=2e-5 * np.abs(streamed).max(), err_msg=name
        )
    # The Reasoner, too: its states over prompt and answer at once are the H that streaming fed.
    for b, length in enumerate(prompt.lengths):
        ids = np.concatenate([prompt.ids[b, :length], out.token[b, : text_lengths[b]]])
        hidden = jax.jit(lambda m, ids: m.reasoner(ids))(model, jnp.asarray(ids)[None])[0]
        streamed = out.trace.reasoner_hidden[b, : text_lengths[b]]
        np.testing.assert_allclose(
            hidden[length - 1 : length - 1 + len(streamed)],
            streamed,
            rtol=0,
            atol=1e-4 * np.abs(streamed).max(),
        )


def rows_first(out):
    return jax.tree.map(lambda x: np.swapaxes(x, 0, 1), out)


def test_teacher_forcing_equals_streaming(started):
    model, prompt, begin = started
    _, out = programs.decode(model, begin(model), BEATS, audio=False, trace=True)
    assert_teacher_forcing_gives(model, prompt, rows_first(out))


def test_given_words_are_spoken_as_teacher_forcing_has_them(started):
    """Row 0 is given a few words and goes on by itself, row 1 a whole text; and a row's own words give what it says itself."""
    model, prompt, begin = started
    own = rows_first(programs.decode(model, begin(model), BEATS, audio=False, trace=True)[1])
    end = model.cfg.im_end_token_id
    words = np.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, end, 0, 0]], np.int32)

    def speak(tokens, counts):
        state = programs.force(begin(model, forced_size=6), Forced(tokens, counts))
        return rows_first(programs.decode(model, state, BEATS, audio=False, trace=True)[1])

    out = speak(words, np.array([3, 4], np.int32))
    np.testing.assert_array_equal(out.token[0, :3], words[0, :3])
    assert out.token_valid[0].all() and (out.token[0, 3:6] != words[0, 3:6]).any()
    np.testing.assert_array_equal(out.token[1, :4], words[1, :4])
    np.testing.assert_array_equal(out.token_valid[1], np.arange(BEATS) < 4)
    assert_teacher_forcing_gives(model, prompt, out)
    again = speak(own.token[:, :6], np.array([6, 0], np.int32))
    np.testing.assert_array_equal(again.frames, own.frames)
    np.testing.assert_array_equal(again.token_valid, own.token_valid)


def test_a_row_is_taken_out_and_put_in(started):
    """What row 1 was, put in row 0's place, says what row 1 says."""
    model, _, begin = started
    state, _ = programs.decode(model, begin(model), 2)
    row = programs.extract_rows(state, np.array([1]))
    assert row.finish.shape == (1,) and row.backbone.k.shape[1] == 1
    size = int(row.reasoner.length[0]) + 3  # as many thoughts as follow
    small = row._replace(reasoner=kv_cache.resized(row.reasoner, size))
    state = programs.insert_rows(state, small, np.array([0]))
    _, out = programs.decode(model, state, 3)
    valid = np.asarray(out.frame_valid)
    assert valid.all()
    for name in ("frames", "frame_valid", "token_valid", "finish"):
        values = np.asarray(getattr(out, name))
        np.testing.assert_array_equal(values[:, 0], values[:, 1], err_msg=name)
    np.testing.assert_allclose(out.samples[:, 0], out.samples[:, 1], rtol=0, atol=1e-5)


def test_a_part_of_the_state_that_the_table_does_not_know_is_named(started):
    model, _, begin = started
    state = jax.eval_shape(lambda: begin(model))
    assert row_axes(state).reasoner == (1, 1, 0)
    with pytest.raises(ValueError, match=r"\.hidden has shape \[5, 2\], not 2 rows on axis 0"):
        row_axes(state._replace(hidden=jnp.zeros((5, 2))))


@pytest.mark.parametrize("split", [[1] * BEATS, [4, 5], [2, 6, 1]], ids=str)
def test_any_split_into_calls_gives_the_same(started, split):
    model, _, begin = started
    _, whole = programs.decode(model, begin(model), BEATS)
    state, parts = begin(model), []
    for count in split:
        state, out = programs.decode(model, state, count)
        parts.append(out)
    for name in ("token", "token_valid", "frames", "frame_valid", "finish"):
        joined = np.concatenate([getattr(p, name) for p in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name), err_msg=name)
    samples = np.concatenate([p.samples for p in parts])
    np.testing.assert_allclose(samples, whole.samples, rtol=0, atol=1e-5)


def test_a_finished_row_costs_no_room_and_gives_nothing(started):
    model, _, begin = started
    state, _ = programs.decode(model, begin(model), BEATS, audio=False)
    assert (state.finish == beat.Finish.LENGTH).all()
    lengths = np.asarray(state.backbone.length), np.asarray(state.reasoner.length)
    state, out = programs.decode(model, state, 2, audio=False)
    assert not out.frame_valid.any()
    assert not out.token_valid.any()
    np.testing.assert_array_equal(state.backbone.length, lengths[0])
    np.testing.assert_array_equal(state.reasoner.length, lengths[1])
    np.testing.assert_array_equal(state.num_frames, 2 * BEATS)


def test_bfloat16_runs_and_stays_near(golden, started):
    """Greedy codes of random weights part soon, so what is compared is the first prediction."""
    model, _, begin = started
    config = model.cfg.with_dtype("bfloat16")
    half = jax.tree.map(
        lambda want, x: x.astype(want.dtype), nnx.state(abstract_model(config)), nnx.state(model)
    )
    half = nnx.merge(nnx.split(abstract_model(config))[0], half)
    _, want = programs.beat(model, begin(model), audio=False, trace=True)
    state, got = programs.beat(half, begin(half), audio=True, trace=True)
    assert state.hidden.dtype == jnp.bfloat16
    assert state.backbone.k.dtype == jnp.bfloat16
    assert got.trace.code0_logits.dtype == jnp.float32
    # A row never depends on its neighbour: the same program with another one gives the same bits. Rows alone are another program,
    # which rounds in another order, so in bfloat16 "exactly as alone" is not promised.
    other = begin(half)
    other = programs.insert_rows(other, programs.extract_rows(other, np.array([1])), np.array([0]))
    _, beside = programs.beat(half, other, audio=True, trace=True)
    for name in ("code0_logits", "code_logits", "reasoner_hidden"):
        a, b = (np.asarray(getattr(o.trace, name), np.float32)[1] for o in (got, beside))
        np.testing.assert_array_equal(a, b, err_msg=name)
    np.testing.assert_array_equal(got.samples[1], beside.samples[1])
    error = np.abs(got.trace.code0_logits[:, 0] - want.trace.code0_logits[:, 0]).max()
    assert error < 0.05 * np.abs(want.trace.code0_logits[:, 0]).max()
    assert np.isfinite(got.samples).all()
