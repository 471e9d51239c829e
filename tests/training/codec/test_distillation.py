"""Code 0 learns from an audio encoder: what it hears, frame by frame, and how far the codec is from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_codec as small
from flax import nnx

from chroma_jax import checkpoint
from chroma_jax.audio.mel import MelConfig, log_mel
from chroma_jax.audio.wav import resample
from chroma_jax.checkpoint.params import flatten
from chroma_jax.config import tiny
from chroma_jax.data.crops import Crops, Ears
from chroma_jax.training import codec_run, selection
from chroma_jax.training.config import DistillationConfig
from chroma_jax.training.objectives.codec import Distillation, hear
from chroma_jax.training.step import build


def test_distance_is_one_minus_cosine():
    head = Distillation(5, 3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    semantic, features = (rng.normal(size=(2, 4, n)).astype(np.float32) for n in (5, 3))
    got = head(semantic, features)
    for b in range(2):
        mapped = semantic[b] @ np.asarray(head.kernel[...])
        cosines = [
            m @ f / np.linalg.norm(m) / np.linalg.norm(f)
            for m, f in zip(mapped, features[b], strict=True)
        ]
        np.testing.assert_allclose(got[b], 1 - np.mean(cosines), rtol=1e-5)


def test_features_are_averaged_over_frames():
    """Two chunks of 6 features, the second partial: 4 frames of 2 features each, in order."""
    chunks = np.zeros((2, 2, 24, 3), np.float32)
    features = np.arange(2 * 2 * 6 * 5, dtype=np.float32).reshape(4, 6, 5)
    batch = Crops(np.zeros((2, 8)), np.full(2, 8), None, chunks, np.array([[24, 8]] * 2))
    asked = []

    def encoder(mel, lengths):
        asked.append((mel.shape, lengths.tolist()))
        return jnp.asarray(features), lengths // 4

    got = hear(encoder, batch, 4, 2)
    assert asked == [((4, 24, 3), [24, 8, 24, 8])]
    rows = features.reshape(2, 12, 5)
    for frame in range(4):
        want = (rows[:, 2 * frame] + rows[:, 2 * frame + 1]) / 2
        np.testing.assert_allclose(got[:, frame], want)


def test_ears_hear_what_the_reasoner_would():
    rng = np.random.default_rng(1)
    wave = (0.1 * rng.normal(size=(2, 5760))).astype(np.float32)
    chunks, lengths = Ears(MelConfig(), 16).hear(wave, 24000)
    assert chunks.shape == (2, 2, 16, 128) and lengths.tolist() == [[16, 8]] * 2
    for row, heard in zip(wave, chunks, strict=True):
        mel = log_mel(resample(row, 24000, 16000))
        np.testing.assert_allclose(heard.reshape(32, 128)[:24], mel, atol=1e-6)


def distilling(golden_dir):
    loss = dict(distillation=DistillationConfig(checkpoint=str(golden_dir), weight=2.0))
    return small.train_config(loss)


def test_frame_rates_that_do_not_divide(golden_dir):
    with pytest.raises(ValueError, match="distillation wants a frame rate that divides 25"):
        build(small.codec_config(), distilling(golden_dir))


def test_its_parameters(golden_dir):
    trainer = build(tiny().codec, distilling(golden_dir))
    frozen = trainer.selection.paths(selection.FREEZE)
    assert frozen and all(path.startswith("audio_encoder/") for path in frozen)
    assert "distillation/kernel" in trainer.selection.paths(selection.TRAIN)
    with pytest.raises(ValueError, match="crops with chunks"):
        trainer.put(Crops(np.zeros((8, 1920), np.float32), np.full(8, 1920), np.arange(8)))


@pytest.mark.slow
def test_the_semantic_codebook_learns_from_the_checkpoint(golden_dir):
    """At the first step that is quantised, its projection gets a gradient of the distillation, and the acoustic one none."""
    config = distilling(golden_dir)
    sizes = checkpoint.read_config(golden_dir)
    codec = dataclasses.replace(tiny().codec, frame_rate=12.5)
    trainer = build(codec, config)

    class Run:
        train = config

        class model:  # noqa: N801
            start = "random"

    state, frozen = codec_run.begin(Run, trainer, None, [])
    want = flatten(checkpoint.load(golden_dir).model.reasoner.audio_encoder)
    np.testing.assert_array_equal(
        frozen["audio_encoder"]["projection"], np.asarray(want["projection"])
    )
    rng = np.random.default_rng(0)
    wave = (0.1 * rng.normal(size=(2, 3840))).astype(np.float32)
    ears = Ears(MelConfig(), sizes.reasoner.audio.chunk_frames)
    batch = Crops(wave, np.full(2, 3840, np.int32), np.arange(2), *ears.hear(wave, 24000))
    state = trainer.prepare(state, frozen, 2, lambda n: batch)
    batch = trainer.put(batch)
    draw = trainer.objective.draw(jnp.asarray(2), batch)

    @jax.jit
    def gradient(params):
        def value(params):
            return trainer._sums(params, state.averages, frozen, batch, draw).distillation

        return jax.value_and_grad(value)(params)

    distance, grads = gradient(state.params)
    assert 0 < distance < 4
    quantizer = grads["codec"]["quantizer"]
    assert np.abs(quantizer["semantic"]["input_proj"]).max() > 0
    assert not np.abs(quantizer["acoustic"]["input_proj"]).max() > 0
    assert np.abs(grads["distillation"]["kernel"]).max() > 0
    assert np.abs(grads["codec"]["encoder"]["layers"]["0"]["kernel"]).max() > 0
