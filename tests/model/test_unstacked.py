"""Layers apart compute what stacked layers do, in every way that a LLaMA is run, quantised or not."""

import jax
import numpy as np
import pytest
from flax import nnx

from chroma_jax.config import tiny
from chroma_jax.model.chroma import random_model
from chroma_jax.model.quantized import quantize
from chroma_jax.model.unstacked import unstacked


@pytest.mark.parametrize("kind", [None, "int8"])
def test_equals_the_stack(kind):
    model = random_model(tiny())
    if kind:
        model = quantize(model, kind)
    apart = unstacked(model)
    assert isinstance(apart.backbone.llama.layers, nnx.List)
    assert not isinstance(model.backbone.llama.layers, nnx.List)

    @jax.jit
    def outputs(model, x, lengths):
        llama = model.backbone.llama
        y, cache = llama.prefill(x, lengths, 16)
        stepped, cache = llama.step(x[:, :3], cache)
        return llama(x), y, stepped, cache

    x = np.random.default_rng(0).standard_normal((2, 8, 64), np.float32)
    lengths = np.array([8, 5], np.int32)
    for got, want in zip(
        *(jax.tree.leaves(outputs(m, x, lengths)) for m in (apart, model)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_everything_else_is_shared():
    model = random_model(tiny())
    apart = unstacked(model)
    assert apart.codec.quantizer is not None
    assert apart.reasoner.embedding[...] is model.reasoner.embedding[...]
    count = lambda m: sum(x.size for x in jax.tree.leaves(m))  # noqa: E731
    assert count(apart) == count(model)
