"""Low-rank factors beside frozen kernels: W + alpha / rank * A B (LoRA, arXiv 2106.09685), per layer of a stack.

A kernel is [L, inputs, outputs], either of which may be several axes (heads, head dim). A is [L, inputs, rank], drawn; B is
[L, rank, outputs], zero at first, so that training begins at the base model.

Axes: L layers, r rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from chroma_jax.sharding import LORA_A, LORA_B
from chroma_jax.training.config import LoraConfig


def _inputs(path: str) -> int:
    """Number of a kernel's input axes: heads and head dim of attention's output, one elsewhere."""
    return 2 if path.endswith("attention/o") else 1


def init(
    cfg: LoraConfig, kernels: Mapping[str, tuple[int, ...]], key: jax.Array
) -> dict[str, jax.Array]:
    """Factors in float32, by path, for kernels of these shapes. A's variance is 1 / inputs."""
    factors = {}
    for path, (layers, *shape) in kernels.items():
        inputs, outputs = shape[: _inputs(path)], shape[_inputs(path) :]
        # A key of its own for each path: adding a kernel changes no other's factors.
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.normal(own, (layers, *inputs, cfg.rank), jnp.float32)
        factors[f"{path}/{LORA_A}"] = a / math.sqrt(math.prod(inputs))
        factors[f"{path}/{LORA_B}"] = jnp.zeros((layers, cfg.rank, *outputs), jnp.float32)
    return factors


def merge(
    cfg: LoraConfig, kernels: Mapping[str, jax.Array], factors: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The kernels with their factors added, in float32, in the kernels' dtypes."""
    merged = {}
    for path, kernel in kernels.items():
        a, b = factors[f"{path}/{LORA_A}"], factors[f"{path}/{LORA_B}"]
        layers, rank = b.shape[:2]
        update = a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)
        scale = cfg.alpha / cfg.rank
        merged[path] = (kernel + scale * update.reshape(kernel.shape)).astype(kernel.dtype)
    return merged
