"""What is computed another way on another kind of device is the same: each way is run here, whatever the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chroma_jax.config import tiny
from chroma_jax.model import layers
from chroma_jax.model.chroma import random_model
from chroma_jax.model.layers import project


@pytest.fixture(params=["cpu", "tpu", "default"])
def platform(request, monkeypatch):
    """All choices by platform are this one's, as far as it is named."""

    def choose(*args, default=None, **branches):
        chosen.append(request.param)
        return branches.get(request.param, default)(*args)

    chosen = []
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    yield request.param
    assert chosen


def same(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize(
    ("spec", "rows", "kernel"),
    [
        ("BTD,DNH->BTNH", (1, 1, 64), (64, 8, 16)),
        ("BTNH,NHD->BTD", (1, 1, 4, 16), (4, 16, 32)),
        ("...D,DV->...V", (1, 64), (64, 40)),
    ],
    ids=str,
)
def test_one_row(platform, monkeypatch, spec, rows, kernel):
    monkeypatch.setattr(layers, "_CPU_LARGE", 0)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(rows, np.float32), rng.standard_normal(kernel, np.float32)
    same(project(spec, jnp.asarray(x), jnp.asarray(w)), np.einsum(spec, x, w))
    low = project(spec, jnp.asarray(x, jnp.bfloat16), jnp.asarray(w), "float32")
    assert low.dtype == jnp.float32


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("platform", ["tpu"], indirect=True)  # on CPUs all other tests are this
def test_steps_of_the_model(platform, rows):
    """Backbone and Codec step by step against their passes over the whole."""
    model = random_model(tiny())
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, 6, model.cfg.backbone.llama.hidden_size), np.float32)
    codes = rng.integers(0, 60, (rows, 2, model.cfg.num_codebooks))

    @jax.jit
    def both_ways(model, x, codes):
        llama = model.backbone.llama
        y, cache = llama.prefill(x[:, :3], jnp.full((rows,), 3), 8)
        parts = [y]
        for start, end in ((3, 4), (4, 6)):
            y, cache = llama.step(x[:, start:end], cache)
            parts.append(y)
        state, waves = model.codec.init_decode_state(rows), []
        for frame in range(2):
            samples, state = model.codec.decode_step(codes[:, frame : frame + 1], state)
            waves.append(samples)
        steps = jnp.concatenate(parts, axis=1), jnp.concatenate(waves, axis=1)
        return steps, (llama(x), model.codec.decode(codes))

    for got, want in zip(*both_ways(model, x, codes), strict=True):
        same(got, want)
