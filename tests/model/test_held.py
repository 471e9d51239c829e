"""A held model is the same model, to the compiler as well."""

import jax
import numpy as np

from chroma_jax.config import tiny
from chroma_jax.model.chroma import random_model
from chroma_jax.model.held import held, opened


def test_opens_to_the_same_and_compiles_once():
    model, other = random_model(tiny(), 0), random_model(tiny(), 1)
    compilations = []

    @jax.jit
    def logits(model, hidden):
        compilations.append(hidden.shape)
        return opened(model).backbone.logits(hidden)

    hidden = np.random.default_rng(0).standard_normal((2, 64), np.float32)
    for each in (model, other, model):
        got = logits(held(each), hidden)
        np.testing.assert_allclose(got, each.backbone.logits(hidden), rtol=1e-5, atol=1e-6)
    assert len(compilations) == 1  # another model of the same shapes runs the same program
    assert opened(model) is model
    assert jax.tree.structure(opened(held(model))) == jax.tree.structure(model)
