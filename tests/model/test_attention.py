"""Attention over whole sequences: the TPU kernel, interpreted on the CPU, against the plain way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomise

from chroma_jax.config import LlamaConfig, RopeConfig
from chroma_jax.model import attention
from chroma_jax.model.llama import Llama
from chroma_jax.sharding import make_mesh


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128, so that few positions are several."""
    monkeypatch.setattr(attention, "_BLOCK", 128)


def drawn(rows=2, width=200, heads=4, kv_heads=2, head_dim=16, seed=0):
    """q, k, v, and what their output is weighed with."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, width, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def plain(q, k, v):
    mask = attention.causal_mask(q.shape[1], q.shape[3])
    return attention.attend(q, k, v, mask)


def by_kernel(q, k, v):
    return attention.flash(q, k, v, interpret=True).swapaxes(1, 2)


def value_and_gradients(attend, q, k, v, weights):
    out, back = jax.vjp(attend, q, k, v)
    return out, *back(weights.astype(out.dtype))


def error(got, want):
    want = np.asarray(want, np.float32)
    return np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("whole", [True, False], ids=["one kernel back", "two kernels back"])
def test_the_kernel_is_causal_attention(small_blocks, monkeypatch, whole):
    """Two blocks and padding; heads in pairs on their k and v."""
    monkeypatch.setattr(attention, "_WHOLE", 2560 if whole else 0)
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


def test_where_the_kernel_runs(monkeypatch):
    assert attention.causal_mask(1251, 64).shape == (1, 1251, 1251)  # this is a CPU
    with jax.set_mesh(make_mesh({"fsdp": -1})):
        assert attention.causal_mask(1251, 64) is not None
    monkeypatch.setattr(attention, "_on_tpu", lambda: True)
    assert attention.causal_mask(1251, 64) is None
    assert attention.causal_mask(1251, 128) is None
    np.testing.assert_array_equal(attention.causal_mask(8, 128)[0], np.tri(8, dtype=bool))
    assert attention.causal_mask(1251, 24) is not None


@pytest.mark.parametrize("width", [1, 128, 256, 257, 640, 641, 1251, 1280, 2048])
def test_lengths_are_padded_to_blocks(width):
    padded = attention.pad(jnp.zeros((1, width, 2)), 1).shape[1]
    assert width <= padded < width + 256 and padded % 128 == 0
    assert attention.pad(jnp.zeros((3, 1, padded)), -1).shape[-1] == padded
    assert attention.causal_share(width) == {1: 1, 2: 3 / 4, 4: 5 / 8}[-(-width // 640)]


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
def as_on_tpu(small_blocks, monkeypatch):
    """What a TPU would run, interpreted; a function that says whether it did."""
    runs = []

    def flash(q, k, v):
        runs.append(q.shape[1])
        return kernel(q, k, v, interpret=True)

    kernel = attention.flash
    monkeypatch.setattr(attention, "_on_tpu", lambda: True)
    monkeypatch.setattr(attention, "_KERNEL_FROM", 130)
    monkeypatch.setattr(attention, "flash", flash)
    return runs


def loss(model, x, weights):
    return (model(x) * weights).sum()


def test_a_stack_with_the_kernel(as_on_tpu, monkeypatch):
    """Outputs, gradients, and what prefill keeps; lengths are those that were given."""
    model = randomise(Llama(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(3)
    x, weights = rng.standard_normal((2, 2, 140, CONFIG.hidden_size), np.float32)
    positions = np.broadcast_to(np.arange(140) // 2, (3, 2, 140))
    lengths = np.asarray([140, 60])

    def everything():
        prefill = jax.jit(lambda *args: Llama.prefill(*args, size=150, positions=positions))
        return jax.jit(jax.value_and_grad(loss))(model, x, weights), prefill(model, x, lengths)

    got = everything()
    assert as_on_tpu == [256] * len(as_on_tpu) and as_on_tpu
    monkeypatch.setattr(attention, "_on_tpu", lambda: False)
    want, ran = everything(), len(as_on_tpu)
    assert len(as_on_tpu) == ran
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and error(a, b) < 2e-5


def test_a_mask_of_ones_own_never_takes_the_kernel(as_on_tpu):
    cfg = dataclasses.replace(CONFIG, num_layers=1)
    model = Llama(cfg, rngs=nnx.Rngs(1))
    x = np.random.default_rng(4).standard_normal((1, 140, cfg.hidden_size), np.float32)
    model(x, mask=np.ones((1, 140, 140), bool))
    assert not as_on_tpu
