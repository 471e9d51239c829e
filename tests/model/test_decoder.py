"""The Decoder's own contracts: a frame made code by code is the frame that teacher forcing sees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomise, with_config

from chroma_jax.config import tiny
from chroma_jax.model.decoder import Decoder

CONFIG = tiny().decoder
BATCH, BOOKS, VOCAB, WIDTH = 5, CONFIG.num_codebooks, CONFIG.vocab_size, CONFIG.embedding_size
TABLE = np.random.default_rng(7).standard_normal((BOOKS, VOCAB, WIDTH)).astype(np.float32)

settings = pytest.mark.parametrize(
    "shared", [True, False], ids=["shared first position", "counted"]
)


@functools.cache
def model_of(shared=True):
    cfg = dataclasses.replace(CONFIG, shared_first_position=shared)
    return randomise(Decoder(cfg, rngs=nnx.Rngs(0)))


def inputs(batch=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((batch, WIDTH)).astype(np.float32)
    return hidden, rng.integers(0, VOCAB, batch)


def embed(codes, book):
    return jnp.asarray(TABLE)[book, codes]


@jax.jit
def greedy(model, hidden, code0):
    return model.frame(hidden, code0, embed, lambda book, logits: jnp.argmax(logits, axis=-1))


@jax.jit
def forced(model, hidden, frames):
    """Teacher forcing on codes 0..Q-2 of whole frames [B, Q]."""
    return model(hidden, jnp.asarray(TABLE)[jnp.arange(BOOKS - 1), frames[:, :-1]])


def same(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@settings
def test_greedy_frame_equals_teacher_forcing(shared):
    model, (hidden, code0) = model_of(shared), inputs()
    frame, logits = greedy(model, hidden, code0)
    assert frame.shape == (BATCH, BOOKS)
    np.testing.assert_array_equal(frame[:, 0], code0)
    want = forced(model, hidden, frame)
    same(logits, want)
    np.testing.assert_array_equal(frame[:, 1:], want.argmax(axis=-1))
    assert len(np.unique(frame[:, 1:])) > BOOKS  # not one code everywhere


@settings
def test_any_frame_equals_teacher_forcing(shared):
    """Codes chosen against the logits: what comes after follows the choice, and each code has its own codebook."""
    model, (hidden, _) = model_of(shared), inputs()
    frames = np.random.default_rng(3).integers(0, VOCAB, (BATCH, BOOKS))

    @jax.jit
    def given(model, hidden, frames):
        return model.frame(hidden, frames[:, 0], embed, lambda book, logits: frames[:, book])

    made, logits = given(model, hidden, frames)
    np.testing.assert_array_equal(made, frames)
    want = forced(model, hidden, frames)
    same(logits, want)
    # Each logit depends on the state and on every earlier code of the frame, and on no later one.
    for book in range(BOOKS):
        changed = frames.copy()
        changed[:, book] = (changed[:, book] + 1) % VOCAB
        difference = np.abs(forced(model, hidden, changed) - want).max(axis=(0, 2))
        assert (difference[:book] == 0).all() and (difference[book:] > 1e-3).all()
    assert np.abs(forced(model, -hidden, frames) - want).max(axis=(0, 2)).min() > 1e-3


def test_first_position_matters():
    hidden, _ = inputs()
    frames = np.random.default_rng(3).integers(0, VOCAB, (BATCH, BOOKS))
    a, b = (forced(model_of(shared), hidden, frames) for shared in (True, False))
    assert np.abs(a - b).max() > 1e-2


def test_a_row_alone():
    model, (hidden, code0) = model_of(), inputs()
    frame, logits = greedy(model, hidden, code0)
    for row in range(BATCH):
        alone, its_logits = greedy(model, hidden[row : row + 1], code0[row : row + 1])
        np.testing.assert_array_equal(alone[0], frame[row])
        same(its_logits[0], logits[row])


def test_two_codebooks():
    """The smallest frame: one code beside code 0, and no loop."""
    cfg = dataclasses.replace(CONFIG, num_codebooks=2)
    model, (hidden, code0) = randomise(Decoder(cfg, rngs=nnx.Rngs(0))), inputs()
    frame, logits = greedy(model, hidden, code0)
    want = jax.jit(lambda m, *args: m(*args))(model, hidden, TABLE[0, code0][:, None])
    assert frame.shape == (BATCH, 2)
    same(logits, want)
    np.testing.assert_array_equal(frame[:, 1], want[:, 0].argmax(axis=-1))


def test_bfloat16_stays_near():
    cfg = dataclasses.replace(
        CONFIG, llama=dataclasses.replace(CONFIG.llama, dtype="bfloat16", param_dtype="bfloat16")
    )
    model16 = with_config(model_of(), lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    hidden, _ = inputs()
    frames = np.random.default_rng(3).integers(0, VOCAB, (BATCH, BOOKS))
    got, want = forced(model16, hidden, frames), np.asarray(forced(model_of(), hidden, frames))
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"relative error {error:.1e}")
    assert error < 0.03
    frame, logits = greedy(model16, jnp.asarray(hidden, jnp.bfloat16), frames[:, 0])
    assert logits.dtype == jnp.float32
    again = forced(model16, jnp.asarray(hidden, jnp.bfloat16), frame)
    error = np.linalg.norm(logits - again) / np.linalg.norm(again)
    print(f"code by code: {error:.1e}")
    assert error < 0.03
