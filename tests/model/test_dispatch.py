"""Every way that a step of the model can be computed in gives what passes over the whole give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chroma_jax.config import tiny
from chroma_jax.model.chroma import random_model
from chroma_jax.model.dispatch import Dispatch, by_platform, dispatch


@pytest.mark.parametrize("rows", [1, 2])
def test_steps_of_the_model_as_on_tpus(rows):
    """Backbone and Codec step by step against their passes over the whole. (On CPUs all other tests are this.)"""
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

    with dispatch(Dispatch(platform="tpu")):
        for got, want in zip(*both_ways(model, x, codes), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("platform", [None, "cpu", "tpu", "default"])
def test_a_choice_and_the_program_that_was_compiled_under_another(platform):
    @jax.jit
    def which(x):
        return by_platform(x, cpu=lambda x: x + 1, tpu=lambda x: x + 2, default=lambda x: x + 3)

    assert which(0) == 1
    with dispatch(Dispatch(platform=platform)):
        assert which(0) == {None: 1, "cpu": 1, "tpu": 2, "default": 3}[platform]
    assert which(0) == 1
