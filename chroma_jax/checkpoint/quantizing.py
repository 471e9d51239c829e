"""Quantised parameters in checkpoints: made while a full one is read, stored in its place.

A quantised parameter is two in the flat mapping: ".../q/values" and ".../q/scales" stand where ".../q" stood. It is always made
of what is stored, not of what that is cast to, so that quantising while loading and while converting give the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from chroma_jax.checkpoint import params
from chroma_jax.checkpoint.torch_table import CheckpointError
from chroma_jax.config import ChromaConfig
from chroma_jax.model.quantized import quantize_param
from chroma_jax.sharding import SCALES, VALUES


def parts(path: str) -> tuple[str, str]:
    """The paths of values and scales."""
    return f"{path}/{VALUES}", f"{path}/{SCALES}"


def full(cfg: ChromaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of the model as it is when nothing is quantised."""
    return params.flatten(params.abstract(cfg.with_quantized(None)))


def quantized(
    path: str,
    array: jax.Array | np.ndarray,
    kind: str,
    where: Mapping[str, jax.sharding.Sharding | None] | None = None,
) -> dict[str, jax.Array]:
    """Values and scales of a full parameter by path, in their shardings. Raises CheckpointError if it is not finite."""
    try:
        arrays = quantize_param(path, array, kind)
    except ValueError as e:
        raise CheckpointError(str(e)) from e
    placed = {}
    for part, value in zip(parts(path), arrays, strict=True):
        sharding = where and where[part]
        placed[part] = value if sharding is None else jax.device_put(value, sharding)
    return placed


def asked(cfg: ChromaConfig, kind: str | None, directory: str) -> ChromaConfig:
    """What a checkpoint is to be loaded as. Raises ValueError for an unknown kind, CheckpointError if it is held in another."""
    if kind is None:
        return cfg
    wanted = cfg.with_quantized(kind)
    if cfg.quantized not in (None, kind):
        raise CheckpointError(
            f"{directory} is quantised to {cfg.quantized} already; {kind} can be made of the checkpoint that it came from"
        )
    return wanted
