"""The Reasoner's own contracts: features find their placeholders, steps equal the whole, rows never meet."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomise, with_config

from chroma_jax.config import ReasonerConfig, tiny
from chroma_jax.model.reasoner import Reasoner

TINY = tiny().reasoner
CONFIG = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, hidden_size=32, num_layers=2, intermediate_size=40),
    audio=dataclasses.replace(
        TINY.audio, num_mel_bins=10, hidden_size=24, intermediate_size=40, window=8, output_size=32
    ),
)
AUDIO = CONFIG.audio_token_id
# Valid frames of each row's chunks: clips that end in the middle of a row, a chunk of no sound, a row without any.
CHUNK_LENGTHS = np.array([[16, 5, 16, 16], [3, 12, 0, 7], [0, 0, 0, 0], [16, 16, 16, 16]])

call = jax.jit(lambda model, *args: model(*args))
encode_audio = jax.jit(Reasoner.encode_audio)
prefill = jax.jit(Reasoner.prefill, static_argnums=4)
step = jax.jit(Reasoner.step)


@functools.cache
def model_of(cfg: ReasonerConfig = CONFIG):
    return randomise(Reasoner(cfg, rngs=nnx.Rngs(0)))


def chunks(seed=0):
    shape = (*CHUNK_LENGTHS.shape, CONFIG.audio.chunk_frames, CONFIG.audio.num_mel_bins)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def same(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def prompts():
    """Right-padded ids with as many placeholders as each row has features, in pieces, and lengths."""
    rng = np.random.default_rng(1)
    counts = (((CHUNK_LENGTHS - 1) // 2 + 1) // 2).sum(axis=1)
    rows = []
    for count in counts:
        text = rng.integers(0, 500, 8)
        rows.append(
            [
                *text[:2],
                *[AUDIO] * (count // 3),
                *text[2:4],
                *[AUDIO] * (count - count // 3),
                *text[4:],
            ]
        )
    ids = np.full((len(rows), max(map(len, rows)) + 2), CONFIG.pad_token_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, np.array([len(row) for row in rows])


def test_features_stand_first_and_in_order():
    """Rows of unequal clips: valid features are gathered at the start, whatever chunk they come from."""
    model, mel = model_of(), chunks()
    got = encode_audio(model, mel, CHUNK_LENGTHS)
    assert got.shape == (4, 4 * CONFIG.audio.chunk_features, 32)
    for row in range(4):
        flat, counts = call(model.audio_encoder, mel[row], CHUNK_LENGTHS[row])
        want = np.concatenate([f[:n] for f, n in zip(flat, counts, strict=True)])
        if len(want):
            same(got[row, : len(want)], want)


def test_encoding_chunk_by_chunk():
    """While a clip is still being spoken: its chunks one at a time give the features of the whole."""
    model, mel, lengths = model_of(), chunks()[:1], np.array([[16, 16, 16, 9]])
    whole = encode_audio(model, mel, lengths)
    parts = [encode_audio(model, mel[:, i : i + 1], lengths[:, i : i + 1]) for i in range(4)]
    same(np.concatenate(parts, axis=1)[:, :14], whole[:, :14])


def test_placeholders_are_replaced_in_order():
    model = model_of()
    ids = np.array([[7, AUDIO, AUDIO, 8, AUDIO, 9], [AUDIO, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]])
    features = np.random.default_rng(0).standard_normal((3, 4, 32), np.float32)
    got = np.asarray(model.embed_prompt(ids, features))
    want = np.array(model.embed(ids))
    want[0, [1, 2, 4]] = features[0, :3]
    want[1, 0] = features[1, 0]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(model.embed_prompt(ids, None), model.embed(ids))


def test_prefill_and_steps_equal_the_whole():
    """Prompts of unequal length, then an answer that ends earlier in some rows."""
    model, (ids, lengths) = model_of(), prompts()
    features = encode_audio(model, chunks(), CHUNK_LENGTHS)
    hidden, cache = prefill(model, ids, jnp.asarray(lengths), features, ids.shape[1] + 3)
    answer, spoken = np.random.default_rng(2).integers(0, 500, (4, 3)), np.array([3, 1, 2, 0])
    outputs = []
    for t in range(3):
        # What a row that has ended feeds is of no account.
        y, cache = step(model, np.where(t < spoken, answer[:, t], 499), cache, t < spoken)
        outputs.append(y)
    np.testing.assert_array_equal(cache.length, lengths + spoken)
    for row, (length, count) in enumerate(zip(lengths, spoken, strict=True)):
        whole = np.append(ids[row, :length], answer[row, :count])[None]
        want = call(model, whole, features[row : row + 1])[0]
        same(hidden[row, :length], want[:length])
        if count:
            same(np.stack([y[row] for y in outputs[:count]]), want[length:])


def test_an_ended_row_can_go_on():
    """The step of a row that is not active leaves nothing behind."""
    model = model_of()
    ids = np.random.default_rng(0).integers(0, 500, (2, 6))
    _, cache = prefill(model, ids[:, :4], jnp.full(2, 4), None, 6)
    _, idle = step(model, np.array([1, ids[1, 4]]), cache, np.array([False, True]))
    y, _ = step(model, np.array([ids[0, 4], ids[1, 5]]), idle, np.array([True, True]))
    want = call(model, ids)
    same(y, np.stack([want[0, 4], want[1, 5]]))


def test_a_row_alone():
    model, (ids, lengths) = model_of(), prompts()
    together = call(model, ids, encode_audio(model, chunks(), CHUNK_LENGTHS))
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        features = encode_audio(model, chunks()[one], CHUNK_LENGTHS[one])
        same(call(model, ids[one, :length], features)[0], together[row, :length])


def test_equal_components_are_the_default():
    model, (ids, _) = model_of(), prompts()
    features = encode_audio(model, chunks(), CHUNK_LENGTHS)
    positions = np.broadcast_to(np.arange(ids.shape[1]), (3, *ids.shape))
    want = call(model, ids, features)
    np.testing.assert_array_equal(call(model, ids, features, positions), want)
    unequal = positions * np.array([1, 2, 3])[:, None, None]
    assert np.abs(call(model, ids, features, unequal) - want).max() > 1e-2


def test_heads():
    """Tied: the embedding is the head, and there is no other; untied: a matrix of its own."""
    hidden = np.random.default_rng(0).standard_normal((2, 3, 32), np.float32)
    untied = model_of()
    same(untied.logits(hidden), hidden @ np.asarray(untied.head[...]))
    cfg = dataclasses.replace(CONFIG, tie_embeddings=True)
    tied = randomise(Reasoner(cfg, rngs=nnx.Rngs(0)))
    assert not hasattr(tied, "head")
    same(tied.logits(hidden), hidden @ np.asarray(tied.embedding[...]).T)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bfloat16_stays_near(tied):
    cfg32 = dataclasses.replace(CONFIG, tie_embeddings=tied)
    low = dict(dtype="bfloat16", param_dtype="bfloat16")
    cfg16 = dataclasses.replace(
        cfg32,
        text=dataclasses.replace(CONFIG.text, **low),
        audio=dataclasses.replace(CONFIG.audio, **low),
    )
    model32 = model_of(cfg32)
    model16 = with_config(model32, lambda: Reasoner(cfg16, rngs=nnx.Rngs(0)))
    ids, lengths = prompts()

    def logits(model):
        features = encode_audio(model, chunks(), CHUNK_LENGTHS)
        hidden, cache = prefill(model, ids, jnp.asarray(lengths), features, ids.shape[1])
        assert cache.k.dtype == hidden.dtype == model.cfg.text.dtype
        return model.logits(hidden)

    got, want = logits(model16), logits(model32)
    assert got.dtype == jnp.float32
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    got, want = np.asarray(got)[valid], np.asarray(want)[valid]
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"relative error {error:.1e}")
    assert error < 0.05
