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

    def begin(model):
        return programs.begin(model, prompt, 2 * BEATS, samplings, [1, 2])

    _, out = programs.decode(golden.model, begin(golden.model), BEATS, audio=False, trace=True)
    config = dataclasses.replace(golden.config, im_end_token_id=int(out.token[3, 1]))
    model = nnx.merge(nnx.split(abstract_model(config))[0], nnx.state(golden.model))
    return model, prompt, begin


def test_teacher_forcing_equals_streaming(started):
    model, prompt, begin = started
    _, out = programs.decode(model, begin(model), BEATS, audio=False, trace=True)
    out = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), out)  # rows first
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
    error = np.abs(got.trace.code0_logits[:, 0] - want.trace.code0_logits[:, 0]).max()
    assert error < 0.05 * np.abs(want.trace.code0_logits[:, 0]).max()
    assert np.isfinite(got.samples).all()
