"""A flat model is the same model, to the compiler as well."""

import jax
import numpy as np

from chroma_jax.config import tiny
from chroma_jax.model.chroma import random_model
from chroma_jax.model.flat import FlatModule, module_of


def test_opens_to_the_same_and_compiles_once():
    model, other = random_model(tiny(), 0), random_model(tiny(), 1)
    compilations = []

    @jax.jit
    def logits(model, hidden):
        compilations.append(hidden.shape)
        return module_of(model).backbone.logits(hidden)

    hidden = np.random.default_rng(0).standard_normal((2, 64), np.float32)
    for each in (model, other, model):
        got = logits(FlatModule.of(each), hidden)
        np.testing.assert_allclose(got, each.backbone.logits(hidden), rtol=1e-5, atol=1e-6)
    assert len(compilations) == 1  # another model of the same shapes runs the same program
    assert module_of(model) is model
    assert jax.tree.structure(module_of(FlatModule.of(model))) == jax.tree.structure(model)
