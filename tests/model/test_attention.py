"""Attention: every way against the plain one; the TPU kernel is interpreted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomise

from chroma_jax.config import LlamaConfig, RopeConfig
from chroma_jax.model import attention, kv_cache, splash
from chroma_jax.model.dispatch import Dispatch, dispatch
from chroma_jax.model.llama import Llama
from chroma_jax.sharding import make_mesh


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128, so that few positions are several."""
    monkeypatch.setattr(splash, "_BLOCK", 128)


def drawn(rows=2, width=200, heads=4, kv_heads=2, head_dim=16, seed=0):
    """q, k, v, and what their output is weighed with."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, width, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def plain(q, k, v):
    return attention.masked(q, k, v, np.tri(q.shape[1], dtype=bool)[None])


def by_kernel(q, k, v):
    return splash.causal(q, k, v, interpret=True).swapaxes(1, 2)


def value_and_gradients(attend, q, k, v, weights):
    out, back = jax.vjp(attend, q, k, v)
    return out, *back(weights.astype(out.dtype))


def error(got, want):
    want = np.asarray(want, np.float32)
    return np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("whole", [True, False], ids=["one kernel back", "two kernels back"])
def test_the_kernel_is_causal_attention(small_blocks, monkeypatch, whole):
    """Two blocks and padding; heads in pairs on their k and v."""
    monkeypatch.setattr(splash, "_WHOLE", 2560 if whole else 0)
    inputs = drawn()
    want = jax.jit(functools.partial(value_and_gradients, plain))(*inputs)
    got = jax.jit(functools.partial(value_and_gradients, by_kernel))(*inputs)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and error(a, b) < 3e-6


@pytest.mark.parametrize("head_dim", [64, 32], ids=["Backbone's scale", "a scale that rounds"])
def test_the_kernel_in_bfloat16(small_blocks, head_dim):
    """Within 2.5 times the plain way's own distance from float32, which is a rounding or two."""
    inputs = drawn(rows=1, heads=2, kv_heads=1, head_dim=head_dim, seed=1)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    exact = value_and_gradients(plain, *(x.astype(jnp.float32) for x in rounded))
    ours = jax.jit(functools.partial(value_and_gradients, by_kernel))(*rounded)
    usual = jax.jit(functools.partial(value_and_gradients, plain))(*rounded)
    for a, b, c in zip(ours, usual, exact, strict=True):
        assert a.dtype == jnp.bfloat16 and error(b, c) < 0.006
        assert error(a, c) < 2.5 * error(b, c)


@pytest.mark.parametrize(
    ("kv_heads", "rows"), [(2, 4), (1, 3)], ids=["divided", "kv heads repeated, rows whole"]
)
def test_the_kernel_on_a_mesh(small_blocks, kv_heads, rows):
    """Rows over data and fsdp, heads over tensor, where they divide."""
    inputs = drawn(rows=rows, width=130, heads=4, kv_heads=kv_heads, seed=2)
    want = jax.jit(functools.partial(value_and_gradients, plain))(*inputs)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        got = jax.jit(functools.partial(value_and_gradients, by_kernel))(*inputs)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 3e-6


def test_where_the_kernel_runs():
    def way(*size):
        return type(attention.of_sequence(*size))

    assert way(1251, 64) is attention.Masked  # this is a CPU
    with jax.set_mesh(make_mesh({"fsdp": -1})):
        assert way(1251, 64) is attention.Masked
    with dispatch(Dispatch(platform="tpu")):
        assert way(1251, 64) is way(1251, 128) is attention.Splash
        assert way(1251, 24) is way(8, 128) is attention.Masked
        np.testing.assert_array_equal(attention.of_sequence(8, 128).mask[0], np.tri(8, dtype=bool))
        assert way(1251, 64, np.ones((1, 1251, 1251), bool)) is attention.Masked


@pytest.mark.parametrize("width", [1, 128, 256, 257, 640, 641, 1251, 1280, 2048])
def test_lengths_are_padded_to_blocks(width):
    padded = splash.pad(jnp.zeros((1, width, 2)), 1).shape[1]
    assert width <= padded < width + 256 and padded % 128 == 0
    assert splash.pad(jnp.zeros((3, 1, padded)), -1).shape[-1] == padded
    assert splash.causal_share(width) == {1: 1, 2: 3 / 4, 4: 5 / 8}[-(-width // 640)]


CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    max_positions=512,
    norm_eps=1e-5,
    rope=RopeConfig(theta=100.0, sections=(8, 16, 8)),
    qkv_bias=True,
    remat="full",
)


@pytest.fixture
def runs(small_blocks, monkeypatch):
    """The lengths that the kernel was run at."""
    runs, kernel = [], splash.causal

    def causal(q, k, v, interpret):
        runs.append(q.shape[1])
        return kernel(q, k, v, interpret)

    monkeypatch.setattr(splash, "causal", causal)
    return runs


AS_ON_TPUS = Dispatch(platform="tpu", splash_from=130)


def loss(model, x, weights):
    return (model(x) * weights).sum()


def test_a_stack_with_the_kernel(runs):
    """Outputs, gradients, and what prefill keeps; lengths are those that were given."""
    model = randomise(Llama(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(3)
    x, weights = rng.standard_normal((2, 2, 140, CONFIG.hidden_size), np.float32)
    positions = np.broadcast_to(np.arange(140) // 2, (3, 2, 140))
    lengths = np.asarray([140, 60])

    def everything():
        prefill = jax.jit(lambda *args: Llama.prefill(*args, size=150, positions=positions))
        return jax.jit(jax.value_and_grad(loss))(model, x, weights), prefill(model, x, lengths)

    with dispatch(AS_ON_TPUS):
        got = everything()
    assert runs == [256] * len(runs) and runs
    want, ran = everything(), len(runs)
    assert len(runs) == ran
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and error(a, b) < 2e-5


def test_a_mask_of_ones_own_never_takes_the_kernel(runs):
    cfg = dataclasses.replace(CONFIG, num_layers=1)
    model = Llama(cfg, rngs=nnx.Rngs(1))
    x = np.random.default_rng(4).standard_normal((1, 140, cfg.hidden_size), np.float32)
    with dispatch(AS_ON_TPUS):
        model(x, mask=np.ones((1, 140, 140), bool))
    assert not runs


WAYS = {
    "by head": Dispatch(platform="default"),
    "together": Dispatch(platform="tpu"),
    "together, alone and long": Dispatch(platform="tpu", together_rows=1, together_queries=99),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("rows", "width", "heads", "kv_heads", "head_dim"),
    [
        (2, 1, 16, 2, 128),
        (1, 1, 32, 8, 64),
        (3, 3, 32, 8, 64),
        (2, 2, 8, 2, 128),
        (2, 40, 4, 1, 16),
    ],
    ids=["Reasoner", "Backbone alone", "Backbone", "Decoder", "one kv head"],
)
def test_over_a_cache(way, rows, width, heads, kv_heads, head_dim):
    """Rows of unlike lengths at the widths of the published model."""
    rng = np.random.default_rng(5)
    q = rng.standard_normal((rows, width, heads, head_dim), np.float32)
    k, v = rng.standard_normal((2, rows, 96, kv_heads, head_dim), np.float32)
    mask = np.arange(96) <= (np.arange(rows)[:, None] * 7 + 50 + np.arange(width))[:, :, None]
    with dispatch(WAYS[way]):
        got = attention.cached(q, kv_cache.flat(k), kv_cache.flat(v), mask)
    k, v = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    logits = np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(head_dim)
    logits = np.where(mask[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    assert error(got, np.einsum("BNTS,BSNH->BTNH", weights, v)) < 1e-5


@pytest.mark.parametrize("window", [3, 250])
def test_within_a_window(window):
    """The second chunk over the first, which lies in a ring with an empty slot, against one mask over everything."""
    q, k, v, _ = drawn(rows=2, width=12, kv_heads=4)
    where = np.tile(np.arange(12), (2, 1))
    first = [np.pad(kv_cache.flat(x)[:, :7], [(0, 0), (1, 0), (0, 0)]) for x in (k, v)]
    past = attention.Past(*first, np.pad(where[:, :7], [(0, 0), (1, 0)], constant_values=-1))
    got = attention.sliding(q[:, 7:], k[:, 7:], v[:, 7:], where[:, 7:], past, window)
    ago = np.arange(12)[:, None] - np.arange(12)
    want = attention.masked(q, k, v, ((ago >= 0) & (ago < window))[None])
    assert error(got, want[:, 7:]) < 1e-5
