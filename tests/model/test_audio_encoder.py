"""The audio encoder's own contracts: chunks are independent, and what lies beyond their lengths is not heard."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomise, with_config

from chroma_jax.audio.mel import mel_chunks
from chroma_jax.config import AudioEncoderConfig, chroma_4b
from chroma_jax.model.audio_encoder import AudioEncoder, sinusoids

CONFIG = AudioEncoderConfig(
    num_mel_bins=10,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=3,
    window=8,
    output_size=20,
)
LENGTHS = np.array([16, 5, 12, 0, 3, 16])
COUNTS = [4, 1, 3, 0, 1, 4]

call = jax.jit(lambda model, *args: model(*args))


@functools.cache
def model_of(cfg=CONFIG):
    return randomise(AudioEncoder(cfg, rngs=nnx.Rngs(0)))


def mels(count=6):
    shape = (count, CONFIG.chunk_frames, CONFIG.num_mel_bins)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def same(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_sinusoids():
    table = sinusoids(200, 8)
    waves = [1, 10000 ** (1 / 3), 10000 ** (2 / 3), 10000]
    for position in (0, 1, 199):
        want = [f(position / w) for f in (math.sin, math.cos) for w in waves]
        np.testing.assert_allclose(table[position], want, atol=2e-5)


def test_counts():
    features, counts = call(model_of(), mels(), LENGTHS)
    assert features.shape == (6, CONFIG.chunk_features, CONFIG.output_size)
    assert counts.tolist() == COUNTS
    assert np.isfinite(features).all()


@pytest.mark.parametrize("cfg", [CONFIG, chroma_4b().reasoner.audio], ids=["small", "released"])
def test_counts_add_up_to_the_placeholders(cfg):
    """Chunk by chunk or at once, a clip of any length has as many features as the prompt has placeholders."""
    frames = np.arange(1, 3 * cfg.chunk_frames + 2)
    chunks = [mel_chunks([np.zeros((m, 1))], cfg.chunk_frames)[1] for m in frames]
    for m, lengths in zip(frames, chunks, strict=True):
        assert sum((lengths - 1) // 2 + 1) // 2 == cfg.num_features(m)
        assert sum(((lengths - 1) // 2 + 1) // 2) == cfg.num_features(m)
    assert cfg.chunk_features == cfg.num_features(cfg.chunk_frames)


def test_chunk_by_chunk_equals_all_chunks():
    model, mel = model_of(), mels()
    features, _ = call(model, mel, LENGTHS)
    for i, count in enumerate(COUNTS):
        one, n = call(model, mel[i : i + 1], LENGTHS[i : i + 1])
        assert n.tolist() == [count]
        if count:
            same(one[0, :count], features[i, :count])


def test_what_lies_beyond_is_not_heard():
    """Not even garbage, or numbers that are none."""
    model, mel = model_of(), mels()
    want, _ = call(model, mel, LENGTHS)
    beyond = np.arange(CONFIG.chunk_frames) >= LENGTHS[:, None]
    for garbage in (1e6, np.nan):
        got, _ = call(model, np.where(beyond[..., None], np.float32(garbage), mel), LENGTHS)
        for i, count in enumerate(COUNTS):
            np.testing.assert_array_equal(got[i, :count], want[i, :count])


@pytest.mark.parametrize("length", [4, 8, 12])
def test_a_partial_chunk_equals_a_shorter_window(length):
    """Padding is as the true end of the sound: the same weights on chunks of just that length."""
    cfg = dataclasses.replace(CONFIG, window=length // 2)
    short = with_config(model_of(), lambda: AudioEncoder(cfg, rngs=nnx.Rngs(0)))
    mel = mels(2)
    got, counts = call(model_of(), mel, np.array([length, length]))
    want, full = call(short, mel[:, :length], np.array([length, length]))
    assert counts.tolist() == full.tolist() == [length // 4] * 2
    same(got[:, : length // 4], want)


def test_every_valid_frame_is_heard():
    """A feature depends on all frames of its chunk, and on no other chunk."""
    model, mel = model_of(), mels(2)
    lengths = np.array([16, 7])
    want, _ = call(model, mel, lengths)
    for frame in (0, 3, 6):
        changed = mel.copy()
        changed[1, frame] += 1
        got, _ = call(model, changed, lengths)
        np.testing.assert_array_equal(got[0], want[0])
        assert np.abs(got[1, :2] - want[1, :2]).max(axis=-1).min() > 1e-3


def test_positions_restart_and_matter():
    model, mel = model_of(), mels(1)
    twice, _ = call(model, np.concatenate([mel, mel]), np.array([16, 16]))
    same(twice[0], twice[1])
    constant, _ = call(model, np.ones_like(mel), np.array([16]))
    assert np.std(constant[0, 1:3], axis=0).max() > 1e-2


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_stays_near(param_dtype):
    cfg = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype=param_dtype)
    model = with_config(model_of(), lambda: AudioEncoder(cfg, rngs=nnx.Rngs(0)))
    got, counts = call(model, mels(), LENGTHS)
    want, _ = call(model_of(), mels(), LENGTHS)
    assert got.dtype == jnp.bfloat16 and counts.tolist() == COUNTS
    valid = np.arange(got.shape[1]) < np.array(COUNTS)[:, None]
    got, want = np.asarray(got, np.float32)[valid], np.asarray(want)[valid]
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"relative error {error:.1e}")
    assert error < 0.03
