"""The LLaMA stack's own contracts: steps equal the whole, rows never meet, caches forget what is beyond them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomise, with_config

from chroma_jax.config import LlamaConfig, RopeConfig
from chroma_jax.model.llama import Llama

LENGTH = 6
CONFIG = LlamaConfig(
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=100.0, sections=(1, 2, 1)),
    qkv_bias=True,
)
SPLITS = {
    "all at once": [6],
    "one by one": [1] * 6,
    "3+1+2": [3, 1, 2],
    "1+5": [1, 5],
    "2+2+1+1": [2, 2, 1, 1],
}

call = jax.jit(lambda model, *args: model(*args))
prefill = jax.jit(Llama.prefill, static_argnums=3)
step = jax.jit(Llama.step)


@functools.cache
def model_of(cfg=CONFIG):
    return randomise(Llama(cfg, rngs=nnx.Rngs(0)))


def embeddings(batch=3, length=LENGTH, seed=0):
    return np.random.default_rng(seed).standard_normal(
        (batch, length, CONFIG.hidden_size), np.float32
    )


def same(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def stepped(model, x, split, cache, **by_position):
    outputs, at = [], 0
    for width in split:
        part = {name: value[..., at : at + width] for name, value in by_position.items()}
        y, cache = step(model, x[:, at : at + width], cache, **part)
        outputs.append(y)
        at += width
    return np.concatenate(outputs, axis=1), cache


def test_context_and_order_matter():
    """What the tests below compare is not trivial."""
    model, x = model_of(), embeddings()
    y = call(model, x)
    assert np.abs(y[:, -1] - call(model, x[:, -1:])[:, 0]).max() > 0.1
    assert np.abs(y[:, -1] - call(model, x[:, [1, 0, 2, 3, 4, 5]])[:, -1]).max() > 1e-2
    np.testing.assert_array_equal(
        y[:, 0], call(model, np.concatenate([x[:, :1], -x[:, 1:]], 1))[:, 0]
    )


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("room", [0, 3], ids=["exact cache", "larger cache"])
def test_steps_equal_the_whole(split, room):
    model, x = model_of(), embeddings()
    y, cache = stepped(model, x, split, model.init_state(3, LENGTH + room))
    same(y, call(model, x))
    np.testing.assert_array_equal(cache.length, [LENGTH] * 3)


@pytest.mark.parametrize("split", list(SPLITS.values())[1:], ids=list(SPLITS)[1:])
def test_prefill_and_steps_equal_the_whole(split):
    model, x = model_of(), embeddings()
    first, cache = prefill(model, x[:, : split[0]], jnp.full(3, split[0]), LENGTH)
    rest, cache = stepped(model, x[:, split[0] :], split[1:], cache)
    same(np.concatenate([first, rest], axis=1), call(model, x))


def test_prefill_and_step_leave_the_same_cache():
    model, x = model_of(), embeddings()
    _, filled = prefill(model, x, jnp.full(3, LENGTH), 9)
    _, grown = stepped(model, x, [4, 2], model.init_state(3, 9))
    for a, b in zip(filled, grown, strict=True):
        same(a, b)


def test_rows_of_unequal_length():
    """Right-padded prompts, then single tokens: each row at its own position, as it would be alone."""
    model, prompt, lengths = model_of(), embeddings(), [2, 6, 4]
    answer = embeddings(length=3, seed=1)
    y, cache = prefill(model, prompt, jnp.array(lengths), LENGTH + 3)
    rest, cache = stepped(model, answer, [1, 1, 1], cache)
    np.testing.assert_array_equal(cache.length, np.add(lengths, 3))
    for row, length in enumerate(lengths):
        alone = np.concatenate([prompt[row : row + 1, :length], answer[row : row + 1]], axis=1)
        want = call(model, alone)[0]
        same(y[row, :length], want[:length])
        same(rest[row], want[length:])


def test_padding_is_seen_by_nothing():
    """Bit for bit: whatever stands beyond a row's length."""
    model, x, lengths = model_of(), embeddings(), jnp.array([2, 6, 4])
    other = np.where(np.arange(LENGTH)[:, None] < lengths[:, None, None], x, 1e3).astype(np.float32)
    outputs = []
    for prompt in (x, other):
        y, cache = prefill(model, prompt, lengths, LENGTH + 1)
        z, _ = step(model, embeddings(length=1, seed=1), cache)
        outputs.append((z, *(y[row, :n] for row, n in enumerate(lengths))))
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_count_smaller_than_width():
    """Three positions always run and each row says how many are real: the rest leaves no trace."""
    model, x = model_of(), embeddings(batch=4, length=9)
    cache = model.init_state(4, 9)
    rng = np.random.default_rng(2)
    counts = np.array([[3, 1, 0, 2], [3, 1, 1, 3], [3, 1, 3, 0], [0, 3, 1, 1]])
    taken, outputs = np.zeros(4, int), [[] for _ in range(4)]
    for count in counts:
        chunk = 1e2 * rng.standard_normal((4, 3, CONFIG.hidden_size)).astype(np.float32)
        for row, n in enumerate(count):
            chunk[row, :n] = x[row, taken[row] : taken[row] + n]
        y, cache = step(model, chunk, cache, count)
        for row, n in enumerate(count):
            outputs[row].append(y[row, :n])
        taken += count
    np.testing.assert_array_equal(cache.length, taken)
    assert taken.tolist() == [9, 6, 5, 6]
    want = call(model, x)
    for row, n in enumerate(taken):
        same(np.concatenate(outputs[row]), want[row, :n])


def test_a_full_cache_drops_writes():
    """Positions beyond the cache change nothing in it, and the ones that still fit are right."""
    model, x = model_of(), embeddings(length=8)
    _, cache = stepped(model, x, [5], model.init_state(3, 6))
    y, after = step(model, x[:, 5:], cache)
    same(y[:, 0], call(model, x)[:, 5])
    _, exact = step(model, x[:, 5:6], cache)
    same(after.k, exact.k)
    same(after.v, exact.v)
    np.testing.assert_array_equal(after.k[:, :, :5], cache.k[:, :, :5])
    _, beyond = step(model, x[:, :3], after)
    np.testing.assert_array_equal(beyond.k, after.k)
    np.testing.assert_array_equal(beyond.v, after.v)


@pytest.mark.parametrize("components", [1, 3], ids=["one component", "three components"])
def test_given_positions(components):
    """`positions` reach the whole call, prefill and steps alike, and need not be where the keys are stored."""
    model, x = model_of(), embeddings()
    shape = (3, LENGTH) if components == 1 else (3, 3, LENGTH)
    positions = np.cumsum(np.random.default_rng(3).integers(0, 4, shape), axis=-1)
    want = call(model, x, positions)
    assert np.abs(want - call(model, x)).max() > 1e-2
    y, _ = stepped(model, x, [3, 1, 2], model.init_state(3, LENGTH), positions=positions)
    same(y, want)
    first, cache = prefill(model, x[:, :4], jnp.full(3, 4), LENGTH, positions[..., :4])
    same(first, want[:, :4])
    same(stepped(model, x[:, 4:], [2], cache, positions=positions[..., 4:])[0], want[:, 4:])


def test_equal_components_are_plain():
    model, x = model_of(), embeddings()
    positions = np.broadcast_to(np.arange(LENGTH), (3, 3, LENGTH))
    np.testing.assert_array_equal(call(model, x, positions), call(model, x))


def test_given_mask():
    """Hiding the first two positions is leaving them out."""
    model, x = model_of(), embeddings()
    mask = np.tril(np.ones((1, LENGTH, LENGTH), bool))
    positions = np.broadcast_to(np.arange(LENGTH), (3, LENGTH))
    same(call(model, x, positions, mask), call(model, x))
    mask[:, 2:, :2] = False
    same(call(model, x, positions, mask)[:, 2:], call(model, x[:, 2:], positions[:, 2:]))


def test_a_row_alone():
    model, x = model_of(), embeddings()
    y, _ = stepped(model, x, [4, 2], model.init_state(3, LENGTH))
    for row in range(3):
        same(call(model, x[row : row + 1]), call(model, x)[row : row + 1])
        alone, _ = stepped(model, x[row : row + 1], [4, 2], model.init_state(1, LENGTH))
        same(alone, y[row : row + 1])


def test_steps_inside_a_scan():
    """The cache is a loop carry: one compiled step for the whole sequence."""
    model, x = model_of(), embeddings()

    @jax.jit
    def run(model, x):
        def one(cache, x):
            y, cache = model.step(x[:, None], cache)
            return cache, y[:, 0]

        return jax.lax.scan(one, model.init_state(3, LENGTH), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    same(run(model, x), call(model, x))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_stays_near(param_dtype):
    """Eight bits of mantissa over two layers: a few hundredths."""
    cfg = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype=param_dtype)
    model, x = with_config(model_of(), lambda: Llama(cfg, rngs=nnx.Rngs(0))), embeddings()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {param_dtype}
    want = np.asarray(call(model_of(), x))
    y, cache = prefill(model, x[:, :4], jnp.full(3, 4), LENGTH)
    z, cache = stepped(model, x[:, 4:], [1, 1], cache)
    assert y.dtype == cache.k.dtype == cache.v.dtype == jnp.bfloat16
    for got in (call(model, x), np.concatenate([y, z], axis=1)):
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        print(f"relative error {error:.1e}")
        assert error < 0.03
