"""The optimizer against PyTorch's AdamW, the learning rate's shape, and what is decayed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_training as small

from chroma_jax.checkpoint.params import flatten
from chroma_jax.checkpoint.store import nest
from chroma_jax.model.chroma import abstract_model
from chroma_jax.training import optim


def parameters(rng):
    new = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    return nest({
        "backbone/head": new(3, 4),
        "backbone/llama/norm/scale": new(4),
        "backbone/audio_embedding": new(2, 3, 4),
    })  # fmt: skip


@pytest.mark.parametrize("clip", [None, 0.7], ids=["no clipping", "clipping"])
def test_equals_pytorch(clip):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    config = small.optimizer(clip_norm=clip, schedule="cosine", warmup_steps=2, total_steps=6)
    optimizer, rate = optim.make_optimizer(config), optim.learning_rate(config)
    params = jax.tree.map(jnp.asarray, parameters(rng))
    theirs = [torch.tensor(np.array(leaf), requires_grad=True) for leaf in jax.tree.leaves(params)]
    table, head, scale = theirs  # in the order of their paths
    oracle = torch.optim.AdamW(
        [dict(params=[head], weight_decay=0.1), dict(params=[table, scale], weight_decay=0.0)],
        lr=1.0, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    state = optimizer.init(params)
    for step in range(5):
        gradient = parameters(rng)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for ours, other in zip(jax.tree.leaves(gradient), theirs, strict=True):
            other.grad = torch.tensor(ours)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
        for group in oracle.param_groups:
            group["lr"] = float(rate(step))
        oracle.step()
    for ours, other in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours, other.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_warm_up_and_cosine():
    config = small.optimizer(
        learning_rate=2.0, schedule="cosine", warmup_steps=4, total_steps=14, final_fraction=0.1
    )
    rates = [float(optim.learning_rate(config)(step)) for step in range(20)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[4], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rates[9], 2.0 * (0.1 + 0.9 / 2), rtol=1e-6)
    np.testing.assert_allclose(rates[14:], 0.2, rtol=1e-5)
    assert (np.diff(rates[4:15]) < 0).all()


@pytest.mark.parametrize("warmup", [0, 3])
def test_constant(warmup):
    rate = optim.learning_rate(small.optimizer(learning_rate=2.0, warmup_steps=warmup))
    rates = [float(rate(step)) for step in (warmup, warmup + 1, 10**6)]
    np.testing.assert_allclose(rates, 2.0)
    np.testing.assert_allclose(rate(0), 2.0 / max(warmup, 1), rtol=1e-6)


def test_what_is_decayed():
    """Of the whole model: no norm, no bias, no embedding; every kernel, every head and LoRA factor."""
    arrays = flatten(abstract_model(small.CONFIG))
    decays = small.host(optim.decayed(nest(arrays)))
    for path, leaf in arrays.items():
        if path.startswith("codec/"):
            continue
        stacked = "layers/" in path
        is_vector = leaf.ndim - stacked <= 1 or path.endswith("_bias")
        assert decays[path] == (not is_vector and "embedding" not in path), path
    factor = {"backbone": {"llama": {"layers": {"gate": {"lora_a": 0, "lora_b": 0}}}}}
    assert all(jax.tree.leaves(optim.decayed(factor)))
