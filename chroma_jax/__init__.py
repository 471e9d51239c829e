"""Chroma 1.0, the real-time spoken dialogue model, in JAX/Flax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chroma_jax.audio.chat import Turn
    from chroma_jax.config import ChromaConfig
    from chroma_jax.engine.sampling import Sampling, TokenSampling
    from chroma_jax.engine.warmup import compilation_cache
    from chroma_jax.generation.session import Chroma, Chunk, Reply, Voice
    from chroma_jax.model.quantized import quantize

__version__ = "0.1.0"

_HOMES = {
    "Chroma": "chroma_jax.generation.session",
    "ChromaConfig": "chroma_jax.config",
    "Chunk": "chroma_jax.generation.session",
    "Reply": "chroma_jax.generation.session",
    "Sampling": "chroma_jax.engine.sampling",
    "TokenSampling": "chroma_jax.engine.sampling",
    "Turn": "chroma_jax.audio.chat",
    "Voice": "chroma_jax.generation.session",
    "compilation_cache": "chroma_jax.engine.warmup",
    "quantize": "chroma_jax.model.quantized",
}

__all__ = [
    "Chroma",
    "ChromaConfig",
    "Chunk",
    "Reply",
    "Sampling",
    "TokenSampling",
    "Turn",
    "Voice",
    "compilation_cache",
    "quantize",
]


def __getattr__(name: str):
    # On first use, so that `import chroma_jax.config` costs no JAX start-up.
    if name not in _HOMES:
        raise AttributeError(f"module 'chroma_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
