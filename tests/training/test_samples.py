"""Sample replies are what a user would hear, on any mesh, compiled once; given words are spoken as teacher forcing has them."""

import dataclasses

import jax
import numpy as np
import pytest
import small_training as small
from data_pipeline.corpus import OPTIONS, read_records, write_corpus

from chroma_jax import schedule
from chroma_jax.audio.prompt import Processor
from chroma_jax.audio.wav import load_audio
from chroma_jax.checkpoint import load
from chroma_jax.data.mixture import Mixture
from chroma_jax.data.prepare import prepare
from chroma_jax.engine import programs
from chroma_jax.engine.reply import collect
from chroma_jax.engine.sampling import Sampling
from chroma_jax.training import samples
from chroma_jax.training.samples import Samples
from chroma_jax.training.step import build

SECONDS = 0.8


@pytest.fixture(scope="module")
def golden_model(golden_dir):
    return load(golden_dir)


def sampler(golden_model, dataset, count=3, train=None):
    """(samples of a trainer with that model's parameters, its state, its frozen parameters)"""
    trainer = build(golden_model.config, train or small.train_config())
    state, frozen = trainer.from_model(golden_model.model)
    tokenizer = Processor.load(trainer.cfg, golden_model.directory).tokenizer
    mixture = Mixture(trainer.cfg, [dataset], num_shapes=2)
    made = Samples(trainer, mixture, tokenizer, count=count, max_seconds=SECONDS, seed=0)
    return made, state, frozen


def run(model, state, frames):
    """A reply of so many frames in one call."""
    _, out = programs.decode(model, state, -(-frames // 2))
    return collect(model.cfg, [jax.device_get(out)], True)


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x._replace(frames=0, audio=0) == y._replace(frames=0, audio=0)
        np.testing.assert_array_equal(x.frames, y.frames)
        np.testing.assert_allclose(x.audio, y.audio, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def spoken(golden_model, dataset):
    made, state, frozen = sampler(golden_model, dataset)
    before = small.host((state, frozen))
    replies = made(state, frozen)
    same(made(state, frozen), replies)
    assert made.compilations == 1
    small.assert_same((state, frozen), before)  # neither donated nor changed
    return made, replies


def test_a_sample_is_the_reply_that_a_user_gets(spoken, golden_model, dataset):
    made, replies = spoken
    tokenizer = Processor.load(golden_model.config, golden_model.directory).tokenizer
    assert [reply.record for reply in replies] == ["r0", "r1", "r2"]
    frames = int(SECONDS * 12.5)
    state = programs.begin(golden_model.model, made._prompt, frames, [Sampling()] * 3, [7, 8, 9])
    out = run(golden_model.model, state, frames)
    for row, (reply, record) in enumerate(zip(replies, read_records(dataset), strict=False)):
        np.testing.assert_array_equal(reply.frames, out.frames[row, : out.num_frames[row]])
        np.testing.assert_allclose(reply.audio, out.audio[row], rtol=0, atol=1e-5)
        tokens = out.text_tokens[row, : out.num_text_tokens[row]]
        assert reply.text == tokenizer.decode(tokens)
        assert reply.same_text == (tokens.tolist() == record.text.tolist()[: len(tokens)])
        assert reply.finish == out.finish_reason[row]
        np.testing.assert_array_equal(made._prompt.ids[row, : len(record.question_ids)], record.question_ids)  # fmt: skip


def test_the_records_own_answers(spoken, golden_model, dataset):
    made, _ = spoken
    trainer = made._trainer
    answers = made.recorded(*trainer.from_model(golden_model.model))
    for answer, record in zip(answers, read_records(dataset), strict=False):
        np.testing.assert_array_equal(answer.frames, record.codes[:-1])
        assert len(answer.audio) == 1920 * len(answer.frames) and answer.same_frames == 1
    decode = jax.jit(lambda codec, codes: codec.decode(codes))
    want = decode(golden_model.model.codec, answers[0].frames[None])[0]
    np.testing.assert_allclose(answers[0].audio, want, rtol=0, atol=1e-5)


MESHES = [
    dict(data=2, fsdp=2, tensor=2),
    pytest.param(dict(fsdp=8), marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_on_a_mesh_it_says_the_same(spoken, golden_model, dataset, mesh):
    made, state, frozen = sampler(golden_model, dataset, train=small.train_config(mesh=mesh))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    same(made(state, frozen), spoken[1])
    assert made(state, frozen) and made.compilations == 1


@pytest.mark.slow
def test_lora_speaks_with_its_factors_merged(golden_model, dataset):
    made, state, frozen = sampler(golden_model, dataset, train=small.lora_config())
    state = state._replace(params=jax.tree.map(lambda x: x + 0.3, state.params))
    replies = made(state, frozen)
    frames, model = int(SECONDS * 12.5), made._trainer.model_of(state, frozen)
    begun = programs.begin(model, made._prompt, frames, [Sampling()] * 3, [0] * 3)
    out = run(model, begun, frames)
    for row, reply in enumerate(replies):
        np.testing.assert_array_equal(reply.frames, out.frames[row, : out.num_frames[row]])


@pytest.fixture(scope="module")
def with_states(tmp_path_factory, voice_path, golden_dir):
    """Two records that hold the Reasoner's states instead of their questions' sound."""
    folder = tmp_path_factory.mktemp("states")
    clip = load_audio(voice_path, 24000)
    manifest = write_corpus(folder / "corpus", np.concatenate([clip, clip]), count=2)
    options = dataclasses.replace(OPTIONS, precompute_hidden=True, hidden_dtype="float32")
    prepare(manifest, golden_dir, folder / "set", options, devices=jax.devices()[:1])
    return folder / "set"


def test_with_precomputed_states_the_records_words_are_spoken(golden_model, with_states):
    made, state, frozen = sampler(golden_model, with_states, count=5)
    replies = made(state, frozen)
    assert [reply.record for reply in replies] == ["r0", "r1"]
    # What was spoken is, frame by frame, what teacher forcing finds likeliest after the record's words and these frames.
    batch, size = made._batch, max(len(reply.frames) for reply in replies)
    frames = np.zeros((2, size, 8), np.int32)
    for row, reply in enumerate(replies):
        assert reply.same_text and len(reply.frames) > 4
        frames[row, : len(reply.frames)] = reply.frames
    lengths = np.array([len(reply.frames) for reply in replies], np.int32)
    dialogue = batch.dialogue(batch.hidden)._replace(frames=frames, frame_lengths=lengths)
    out = jax.jit(schedule.teacher_forced)(golden_model.model, dialogue)
    logits = np.concatenate([out.code0_logits[:, :, None], out.code_logits], axis=2)
    for row, reply in enumerate(replies):
        likeliest = logits[row, : len(reply.frames)].argmax(axis=-1)
        np.testing.assert_array_equal(likeliest, reply.frames)


def test_the_share_of_frames():
    wanted = np.arange(24).reshape(3, 8)
    assert samples.same_frames(wanted, wanted) == 1
    assert samples.same_frames(wanted[:2], wanted) == pytest.approx(2 / 3)
    assert samples.same_frames(np.concatenate([wanted, wanted]), wanted) == 1
    other = wanted.copy()
    other[1, 7] += 1
    assert samples.same_frames(other, wanted) == pytest.approx(2 / 3)
    assert samples.same_frames(wanted[:0], wanted) == 0
    assert samples.same_frames(wanted[:0], wanted[:0]) == 1
