"""Checkpoints: PyTorch safetensors and our own Orbax directories, to and from the model's parameters."""

from chroma_jax.checkpoint.conversion import convert
from chroma_jax.checkpoint.from_torch import load_torch
from chroma_jax.checkpoint.store import Loaded, load, load_converted, save
from chroma_jax.checkpoint.to_torch import export
from chroma_jax.checkpoint.torch_files import read_config, resolve_source
from chroma_jax.checkpoint.torch_table import CheckpointError

__all__ = [
    "CheckpointError",
    "Loaded",
    "convert",
    "export",
    "load",
    "load_converted",
    "load_torch",
    "read_config",
    "resolve_source",
    "save",
]
