"""One of our directories to a PyTorch checkpoint: the conversion backwards, one parameter in memory at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping

import jax
import numpy as np
from tqdm import tqdm

from chroma_jax import paths
from chroma_jax.checkpoint import params
from chroma_jax.checkpoint.safetensors_io import DTYPES, Writer, for_each
from chroma_jax.checkpoint.staging import check_apart, check_space, staged
from chroma_jax.checkpoint.store import groups, open_converted, read_params
from chroma_jax.checkpoint.torch_files import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    read_json,
    side_files,
)
from chroma_jax.checkpoint.torch_table import CheckpointError, Leaf, leaf_for

SHARD_BYTES = 5_000_000_000


def export(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes one of our directories as a checkpoint in the Hub's layout, with PyTorch's names and layouts.

    Every tensor that was converted comes back with the same bits, in the dtype it had (or was converted to). A tied
    model gets no `thinker.lm_head.weight`.

    Args:
      source: a directory written by `convert` or `save`.
      out: the directory to make; it appears only when it is complete.
      overwrite: whether a checkpoint at `out` may be replaced.
      progress: whether to show a progress bar on a terminal.
      shard_bytes: files are filled up to about this size; with more than one, there is an index.

    Raises:
      ValueError: (CheckpointError) the source is damaged or incomplete, or quantised, or `out` cannot be written.
    """
    source = os.path.expanduser(os.fspath(source))
    for place in (source, out):
        if paths.is_remote(place):
            raise CheckpointError(
                f"{place}: an export reads and writes directories of a file system"
            )
    check_apart(source, out)
    with staged(out, overwrite=overwrite) as stage:
        _export(source, stage, progress, shard_bytes)


def _export(source: str, stage: str, progress: bool, shard_bytes: int) -> None:
    cfg, manifest = open_converted(source)
    if cfg.quantized is not None:
        raise CheckpointError(
            f"{source} is quantised to {cfg.quantized}, which PyTorch's Chroma cannot hold; "
            "export the checkpoint that it was made from"
        )
    leaves = [leaf_for(path, a.shape) for path, a in params.flatten(params.abstract(cfg)).items()]
    dtypes = {name: DTYPES[code] for name, code in manifest.tensors.items()}
    shards = _shards(leaves, dtypes, shard_bytes)
    total = sum(_nbytes(leaf, dtypes) for leaf in leaves)
    check_space(stage, total)
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="export", disable=None if progress else True
    )
    with bar:
        for file, group in shards.items():
            _write_shard(source, os.path.join(stage, file), group, dtypes, bar)
    if len(shards) > 1:
        weight_map = {
            name: file for file, group in shards.items() for leaf in group for name in leaf.names
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(os.path.join(stage, INDEX_FILE), index)
    for name in side_files(source):
        shutil.copyfile(os.path.join(source, name), os.path.join(stage, name))
    _set_tied(os.path.join(stage, CONFIG_FILE), cfg.reasoner.tie_embeddings)


def _nbytes(leaf: Leaf, dtypes: Mapping[str, np.dtype]) -> int:
    return math.prod(leaf.torch_shape) * sum(dtypes[name].itemsize for name in leaf.names)


def _shards(
    leaves: list[Leaf], dtypes: Mapping[str, np.dtype], shard_bytes: int
) -> dict[str, list[Leaf]]:
    """Which parameters go to which file."""
    shards: list[list[Leaf]] = [[]]
    size = 0
    for leaf in leaves:
        nbytes = _nbytes(leaf, dtypes)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(leaf)
        size += nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {
        f"model-{i:05}-of-{len(shards):05}.safetensors": group for i, group in enumerate(shards, 1)
    }


def _write_shard(
    source: str, file: str, leaves: list[Leaf], dtypes: Mapping[str, np.dtype], bar: tqdm
) -> None:
    tensors = {name: (leaf.torch_shape, dtypes[name]) for leaf in leaves for name in leaf.names}
    by_path = {leaf.path: leaf for leaf in leaves}
    with contextlib.closing(Writer(file, tensors)) as writer:
        for group in groups({leaf.path: _nbytes(leaf, dtypes) for leaf in leaves}):
            _write_group(source, writer, [by_path[path] for path in group], dtypes, bar)
        writer.finish()


def _write_group(
    source: str, writer: Writer, group: list[Leaf], dtypes: Mapping[str, np.dtype], bar: tqdm
) -> None:
    # A function of its own, so that no array outlives it. On the host, whatever accelerator there is.
    host = jax.sharding.SingleDeviceSharding(_host())
    # Stored in a dtype that holds each of its tensors exactly, so that casting back loses nothing.
    stored = {leaf.path: params.widest(dtypes[name] for name in leaf.names) for leaf in group}
    specs = {
        leaf.path: jax.ShapeDtypeStruct(leaf.shape, stored[leaf.path], sharding=host)
        for leaf in group
    }
    arrays = read_params(source, specs)
    for leaf in group:
        array = np.asarray(arrays.pop(leaf.path))

        def write(i: int, leaf: Leaf = leaf, array: np.ndarray = array) -> None:
            name = leaf.names[i]
            part = (array[i] if leaf.stacked else array).astype(dtypes[name], copy=False)
            writer.write(name, leaf.transform.to_torch(part, leaf.torch_shape))

        for_each(write, len(leaf.names), array.nbytes)
        bar.update(_nbytes(leaf, dtypes))


def _host() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return jax.local_devices()[0]


def _set_tied(config: str, tied: bool) -> None:
    """Corrects config.json where its flag says otherwise than the tensors; leaves the file alone where it is right."""
    content = read_json(config)
    thinker = content["thinker_config"]
    text = thinker["text_config"]
    said = thinker.get("tie_word_embeddings")
    said = text.get("tie_word_embeddings") if said is None else said
    if bool(said) == tied:
        return
    thinker["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
    _write_json(config, content)


def _write_json(path: str, content: object) -> None:
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.write("\n")
