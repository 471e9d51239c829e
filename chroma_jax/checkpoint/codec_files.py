"""A Codec of its own, outside a Chroma, in the Hub's layout of Mimi: what transformers' `MimiModel.from_pretrained` loads.

config.json          model_type "mimi"
model.safetensors    float32
"""

from __future__ import annotations

import json
import os

import numpy as np
from flax import nnx

from chroma_jax.checkpoint import params
from chroma_jax.checkpoint.safetensors_io import read_header, read_tensor
from chroma_jax.checkpoint.staging import staged
from chroma_jax.checkpoint.store import load
from chroma_jax.checkpoint.torch_files import CONFIG_FILE, SINGLE_FILE, read_json
from chroma_jax.checkpoint.torch_table import CheckpointError, Leaf, leaf_for, make_plan
from chroma_jax.config import CodecConfig, hf
from chroma_jax.model.codec import Codec

_OURS, _THEIRS = "codec/", "codec_model."  # what stands before the names of a Codec inside a Chroma


def save_codec(
    directory: str | os.PathLike, cfg: CodecConfig, codec: Codec, *, overwrite: bool = False
) -> None:
    """Writes a Codec. `directory` appears only when it is complete.

    Raises:
      ValueError: (CheckpointError) it exists and is not to be overwritten, or cannot be written.
    """
    from safetensors.numpy import save_file

    tensors = {}
    for path, array in params.flatten(codec).items():
        array = np.asarray(array, np.float32)
        leaf = leaf_for(_OURS + path, array.shape)
        for i, name in enumerate(leaf.names):
            part = array[i] if leaf.stacked else array
            tensor = leaf.transform.to_torch(part, leaf.torch_shape)
            tensors[name.removeprefix(_THEIRS)] = np.ascontiguousarray(tensor)
    with staged(directory, overwrite=overwrite) as stage:
        save_file(tensors, os.path.join(stage, SINGLE_FILE), metadata={"format": "pt"})
        with open(os.path.join(stage, CONFIG_FILE), "w", encoding="utf-8") as f:
            json.dump(hf.write_codec(cfg), f, indent=2)
            f.write("\n")


def read_codec_config(directory: str | os.PathLike) -> CodecConfig:
    """The configuration of a Codec's directory. Raises ValueError naming the file."""
    file = os.path.join(os.fspath(directory), CONFIG_FILE)
    try:
        return hf.read_codec(read_json(file))
    except CheckpointError:
        raise
    except ValueError as e:
        raise CheckpointError(f"{file}: {e}") from e


def load_codec(directory: str | os.PathLike) -> tuple[CodecConfig, Codec]:
    """Reads a Codec, in float32.

    Raises:
      ValueError: (CheckpointError) the directory holds no Mimi, or not a whole one.
    """
    directory = os.fspath(directory)
    cfg = read_codec_config(directory)
    found = read_header(os.path.join(directory, SINGLE_FILE))
    tensors = {_THEIRS + name: info for name, info in found.items()}
    abstract = nnx.eval_shape(lambda: Codec(cfg, rngs=nnx.Rngs(0)))
    wanted = {_OURS + path: leaf for path, leaf in params.flatten(abstract).items()}
    plan = make_plan(tensors, wanted, directory)
    arrays = {leaf.path.removeprefix(_OURS): _read(tensors, leaf) for leaf in plan.leaves}
    return cfg, params.build(abstract, {p: params.place(a, None) for p, a in arrays.items()})


def _read(tensors, leaf: Leaf) -> np.ndarray:
    out = np.empty(leaf.shape, np.float32)
    for i, name in enumerate(leaf.names):
        part = out[i] if leaf.stacked else out
        tensor = np.array(read_tensor(tensors[name])).astype(np.float32)
        part[...] = leaf.transform.to_ours(tensor, leaf.part_shape)
    return out


def is_codec(directory: str | os.PathLike) -> bool:
    """Whether a directory's config.json says that a Codec alone is there."""
    try:
        return read_json(os.path.join(os.fspath(directory), CONFIG_FILE))["model_type"] == "mimi"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_any_codec(source: str | os.PathLike) -> tuple[CodecConfig, Codec]:
    """A Codec in Mimi's layout, or the one of a whole Chroma. Raises ValueError (CheckpointError) for anything else."""
    if is_codec(source):
        return load_codec(source)
    loaded = load(source, stages=("codec",))
    return loaded.config.codec, loaded.model.codec
