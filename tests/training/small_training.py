"""A small model, a small batch and a small configuration, the same for all tests of training."""

import dataclasses
import functools

import jax
import numpy as np
from model.random_weights import randomise

from chroma_jax.config import tiny
from chroma_jax.data.batch import Batch
from chroma_jax.model.chroma import random_model
from chroma_jax.training import selection
from chroma_jax.training.config import LoraConfig, OptimizerConfig, TrainConfig

ROWS, FRAMES, TOKENS = 8, 6, 3
CONFIG = tiny()


def optimizer(**changes) -> OptimizerConfig:
    values = dict(
        learning_rate=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0, schedule="constant",
        warmup_steps=0, total_steps=100,
    )  # fmt: skip
    return OptimizerConfig(**values | changes)


def train_config(**changes) -> TrainConfig:
    values = dict(
        optimizer=optimizer(), trains=selection.STAGE_1, decoder_weight=0.5, compute_dtype="float32",
        reasoner_dtype="float32",
    )  # fmt: skip
    return TrainConfig(**values | changes)


def lora_config(**changes) -> TrainConfig:
    lora = LoraConfig(rank=4, alpha=8.0)
    return train_config(trains=selection.LORA_FINE_TUNING, lora=lora, **changes)


@functools.cache
def model():
    """Random, and far from uniform."""
    return jax.tree.map(jax.numpy.asarray, randomise(random_model(CONFIG)))


@functools.cache
def mild_model():
    """Random as at the beginning of a training."""
    return random_model(CONFIG)


def batch(rows: int = ROWS, seed: int = 0) -> Batch:
    """Random dialogues of unlike lengths; questions are a second of noise, or two."""
    rng = np.random.default_rng(seed)
    audio, reasoner = CONFIG.reasoner.audio, CONFIG.reasoner
    frame_lengths = rng.integers(FRAMES - 3, FRAMES + 1, rows)
    text_lengths = rng.integers(1, TOKENS + 1, rows)
    voice_id_lengths, voice_frame_lengths = rng.integers(1, 4, rows), rng.integers(1, 3, rows)
    frames = rng.integers(1, 64, (rows, FRAMES, 8))
    text = rng.integers(0, 499, (rows, TOKENS))
    chunk_lengths = rng.choice([40, 80], (rows, 1))
    prompt_lengths = chunk_lengths[:, 0] // 4 + 3
    prompt_ids = np.full((rows, 28), reasoner.pad_token_id)
    for row in range(rows):
        frames[row, frame_lengths[row] - 1 :] = 0  # the stop frame
        text[row, text_lengths[row] - 1] = CONFIG.im_end_token_id
        features = [reasoner.audio_token_id] * audio.num_features(int(chunk_lengths[row, 0]))
        ids = [reasoner.audio_start_token_id, *features, reasoner.audio_end_token_id, 7 + row]
        ids += text[row].tolist()
        prompt_ids[row, : len(ids)] = ids
    mel = rng.standard_normal((rows, 1, audio.chunk_frames, audio.num_mel_bins))
    whole = lambda x: np.asarray(x, np.int32)  # noqa: E731
    return Batch(
        prompt_ids=whole(prompt_ids),
        prompt_lengths=whole(prompt_lengths),
        chunks=mel.astype(np.float32),
        chunk_lengths=whole(chunk_lengths),
        hidden=None,
        text=whole(text),
        text_lengths=whole(text_lengths),
        frames=whole(frames),
        frame_lengths=whole(frame_lengths),
        voice_ids=whole(rng.integers(0, 499, (rows, 3))),
        voice_id_lengths=whole(voice_id_lengths),
        voice_frames=whole(rng.integers(1, 64, (rows, 2, 8))),
        voice_frame_lengths=whole(voice_frame_lengths),
        record_ids=np.arange(rows, dtype=np.int64) + 2**40,
    )


def with_hidden(rows: int = ROWS, seed: int = 0) -> Batch:
    """The same, with made-up precomputed Reasoner states and none of what would compute them."""
    width = CONFIG.reasoner.text.hidden_size
    hidden = np.random.default_rng(seed + 1).standard_normal((rows, TOKENS, width), np.float32)
    return batch(rows, seed)._replace(
        hidden=hidden,
        prompt_ids=np.zeros((rows, 1), np.int32),
        chunks=np.zeros((rows, 1, 1, 1), np.float32),
        chunk_lengths=np.zeros((rows, 1), np.int32),
    )


def host(tree):
    """Copies on the host, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return {name(path): np.array(leaf) for path, leaf in leaves}


def assert_same(got, want) -> None:
    """Bit for bit."""
    got, want = host(got), host(want)
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def assert_near(got, want, tolerance: float) -> None:
    """Each array within `tolerance` of the largest magnitude of that array."""
    got, want = host(got), host(want)
    assert got.keys() == want.keys()
    for path in want:
        limit = tolerance * np.abs(want[path]).max()
        np.testing.assert_allclose(got[path], want[path], rtol=0, atol=limit, err_msg=path)


def change(config, **values):
    return dataclasses.replace(config, **values)
