"""PyTorch oracles with random weights, and the same weights in our modules, placed by the checkpoint table."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax.checkpoint.torch_table import make_plan
from chroma_jax.config import LlamaConfig, ReasonerConfig, hf, tiny

torch = pytest.importorskip("torch")


def load(make: Callable[[], nnx.Module], path: str, tensors: Mapping[str, np.ndarray]) -> Any:
    """The module that `make` builds and that stands at `path` in the whole model, filled from a checkpoint's tensors.

    Every parameter must be filled, and every tensor used or known to be no part of the model.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    names = [f"{path}/{jax.tree_util.keystr(p, simple=True, separator='/')}" for p, _ in leaves]
    plan = make_plan(tensors, dict(zip(names, (leaf for _, leaf in leaves), strict=True)))
    arrays = []
    for leaf in plan.leaves:
        parts = [leaf.transform.to_ours(tensors[name], leaf.part_shape) for name in leaf.names]
        arrays.append(jnp.asarray(np.stack(parts) if leaf.stacked else parts[0]))
    return nnx.merge(graphdef, jax.tree_util.tree_unflatten(treedef, arrays))


def randomise(module, seed: int = 0) -> None:
    """Weights large enough that attention is far from uniform, no two norms alike, no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_scale = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(1 + 0.3 * noise if is_scale else 0.25 * noise)


def tensors_of(module, rename: Callable[[str], str | None]) -> dict[str, np.ndarray]:
    """The module's tensors under checkpoint names; those that `rename` maps to None are left out."""
    named = {rename(name): value.numpy() for name, value in module.state_dict().items()}
    return {name: value for name, value in named.items() if name is not None}


def llama_config(**values) -> LlamaConfig:
    """Our configuration of a LLaMA, read from the keys of its section of config.json."""
    config = hf.write(tiny())
    del config["decoder_config"]["rope_parameters"]
    config["decoder_config"] |= values
    return hf.read(config).decoder.llama


def reasoner_config(thinker: Mapping[str, Any]) -> ReasonerConfig:
    """Our configuration of a Reasoner, read from `thinker_config` of config.json."""
    config = hf.write(tiny())
    width = thinker["text_config"]["hidden_size"]
    config["thinker_config"] = thinker
    config["backbone_config"]["hidden_size"] = config["decoder_config"]["audio_embedding_dim"] = (
        width
    )
    return hf.read(config).reasoner


def near(got, want, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest magnitude; prints (for `pytest -rP`) what it was."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    largest = np.abs(want).max()
    print(f"error {np.abs(got - want).max() / largest:.1e} of the largest magnitude {largest:.3g}")
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest)
