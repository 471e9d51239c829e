"""PyTorch tensors to our parameters: one stacked parameter on the host at a time."""

from __future__ import annotations

import os
from collections.abc import Collection

import numpy as np

from chroma_jax.checkpoint import params, quantizing
from chroma_jax.checkpoint.params import Shardings
from chroma_jax.checkpoint.safetensors_io import bits, copy_tiled, for_each
from chroma_jax.checkpoint.torch_files import TorchFiles, open_torch
from chroma_jax.checkpoint.torch_table import LM_HEAD, CheckpointError, Leaf, Plan, make_plan
from chroma_jax.config import ChromaConfig
from chroma_jax.model.chroma import ChromaModel


def plan_torch(files: TorchFiles) -> tuple[ChromaConfig, Plan]:
    """Checks a whole checkpoint against our model, reading no more than what must be compared bit by bit.

    Returns its configuration (head tied exactly if the checkpoint has no head; each part in its stored dtype) and the
    plan. Raises CheckpointError.
    """
    # The tensors have the last word on tying: the flag stands at either of two levels, and is often wrong.
    cfg = params.with_tied_head(files.config, LM_HEAD not in files.tensors).with_quantized(None)
    plan = make_plan(files.tensors, params.flatten(params.abstract(cfg)), files.directory)
    for name, row in plan.skipped.items():
        if row.same_as and not _same(files, name, row.same_as):
            raise CheckpointError(
                f"{files.directory}: {name} differs from {row.same_as}, which it must be a copy of: "
                "transformers after 5.0.0rc0 no longer ties the public code's two"
            )
    stored = {leaf.path: [files.tensors[name].dtype for name in leaf.names] for leaf in plan.leaves}
    return params.with_stored_dtypes(cfg, stored), plan


def _same(files: TorchFiles, one: str, other: str) -> bool:
    a, b = files.read(one), files.read(other)
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))


def read_leaf(files: TorchFiles, leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    """One parameter of ours, read from the torch tensors that fill it, in `dtype`; layers are read in parallel."""
    out = np.empty(leaf.shape, dtype)

    def read(i: int) -> None:
        tensor = _cast(files.read(leaf.names[i], reuse=True), dtype, leaf.names[i])
        part = out[i] if leaf.stacked else out
        copy_tiled(bits(part), leaf.transform.to_ours(bits(tensor), leaf.part_shape))

    for_each(read, len(leaf.names), out.nbytes)
    return out


def _cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    if dtype == np.float16 and not np.array_equal(np.isfinite(cast), np.isfinite(tensor)):
        raise CheckpointError(f"{name} has values beyond the range of float16; bfloat16 holds them")
    return cast


def load_torch(
    directory: str | os.PathLike,
    dtype: str | None = None,
    shardings: Shardings = None,
    stages: Collection[str] | None = None,
    quantize: str | None = None,
) -> tuple[ChromaConfig, ChromaModel]:
    """Loads a checkpoint in the Hub's layout (config.json and safetensors), without PyTorch.

    Args:
      directory: where it lies.
      dtype: what Reasoner, Backbone and Decoder compute in and are held in: "float32", "bfloat16" or "float16". None
        keeps what is stored: each of audio encoder, text model, Backbone and Decoder in the widest dtype that its own
        tensors have. The Codec is always float32.
      shardings: where the parameters go: a tree of `jax.sharding.Sharding` shaped like the model, a function from the
        abstract model to such a tree, or one Sharding for everything. None: the default device.
      stages: names of those to read, of `params.STAGES`; the parameters of the others stay `jax.ShapeDtypeStruct`s. None: all.
      quantize: "int8" or "fp8" to hold kernels and tables in eight bits (see `model/quantized.py`); each is quantised where it
        belongs as soon as it is read. None: as stored.

    Returns:
      The configuration and the model. The host holds one (stacked) parameter at a time.

    Raises:
      ValueError: (CheckpointError) a checkpoint that is damaged, incomplete, or not Chroma; found before any data is read.
    """
    files = open_torch(directory)
    cfg, plan = plan_torch(files)
    stored = quantizing.full(cfg)
    cfg = quantizing.asked(cfg if dtype is None else cfg.with_dtype(dtype), quantize, directory)
    abstract, wanted, where = params.model_of(cfg, shardings)
    arrays = dict(wanted)
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    for path in params.of_stages(leaves, stages):
        if path in wanted:
            array = read_leaf(files, leaves[path], wanted[path].dtype)
            arrays[path] = params.place(array, where[path])
        else:
            array = read_leaf(files, leaves[path], stored[path].dtype)
            array = params.place(array, where[quantizing.parts(path)[0]])
            arrays |= quantizing.quantized(path, array, quantize, where)
    return cfg, params.build(abstract, arrays)
