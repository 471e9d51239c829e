"""Checkpoints to test with: the golden one, and random ones of any shape, dtype and number of files."""

import json
import pathlib
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from chroma_jax.checkpoint import params
from chroma_jax.checkpoint.safetensors_io import bits
from chroma_jax.checkpoint.torch_table import leaf_for
from chroma_jax.config import ChromaConfig, hf, tiny
from chroma_jax.model.chroma import ChromaModel

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "chroma-tiny"


def random_tensors(cfg: ChromaConfig, dtype_of=lambda name: np.float32) -> dict[str, np.ndarray]:
    """Random values under PyTorch's names; each tensor's depend on its name only."""
    shapes = {}
    for path, param in params.flatten(params.abstract(cfg)).items():
        leaf = leaf_for(path, param.shape)
        shapes |= dict.fromkeys(leaf.names, leaf.torch_shape)
    return {
        name: np.random.default_rng(zlib.crc32(name.encode()))
        .standard_normal(shape)
        .astype(np.dtype(dtype_of(name)))
        for name, shape in shapes.items()
    }


def random_ours(cfg: ChromaConfig, seed: int = 0) -> ChromaModel:
    """A model of ours with random parameters, without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    wanted = params.flatten(params.abstract(cfg))
    arrays = {
        path: jnp.asarray(rng.standard_normal(p.shape).astype(p.dtype))
        for path, p in wanted.items()
    }
    return params.build(params.abstract(cfg), arrays)


def mixed_dtype(name: str) -> np.dtype:
    """Every dtype, even among the layers of one stack; the codec in float32 but for one tensor."""
    if name.startswith("codec_model."):
        return ml_dtypes.bfloat16 if name == "codec_model.upsample.conv.weight" else np.float32
    if name.startswith("thinker.audio_tower."):
        return np.float16
    if name.startswith("thinker."):
        return ml_dtypes.bfloat16
    if name.startswith("backbone.model.layers."):
        return np.float32 if ".layers.0." in name else ml_dtypes.bfloat16
    return np.float32


def write_checkpoint(directory, tensors, config=None, shards=1):
    """A directory in the Hub's layout, by the safetensors library. Returns it."""
    directory.mkdir(parents=True)
    if config is None:
        config = hf.write(tiny())
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return directory
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        safetensors.numpy.save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def read_checkpoint(directory) -> dict[str, np.ndarray]:
    """All tensors of a directory in the Hub's layout, by the safetensors library."""
    tensors = {}
    for file in sorted(directory.glob("model*.safetensors")):
        part = safetensors.numpy.load_file(file)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def assert_same_tensors(got, want):
    """Same names, dtypes, shapes and bits."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        array, other = np.asarray(array), np.asarray(got[name])
        assert (other.dtype, other.shape) == (array.dtype, array.shape), name
        assert np.array_equal(bits(other), bits(array)), name


def assert_same_model(got, want):
    """Same parameters, bit by bit."""
    assert_same_tensors(params.flatten(got), params.flatten(want))
