"""A PyTorch checkpoint to one of our directories, one parameter in memory at a time."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from chroma_jax import paths
from chroma_jax.checkpoint import params, quantizing
from chroma_jax.checkpoint.from_torch import plan_torch, read_leaf
from chroma_jax.checkpoint.literal import literal
from chroma_jax.checkpoint.safetensors_io import DTYPES, NAMES, total_bytes
from chroma_jax.checkpoint.staging import check_apart, check_space, staged
from chroma_jax.checkpoint.store import (
    PARAMS,
    Manifest,
    groups,
    is_converted,
    nest,
    orbax_context,
    write_manifest,
)
from chroma_jax.checkpoint.torch_files import (
    CONFIG_FILE,
    TorchFiles,
    open_torch,
    read_json,
    resolve_source,
    side_files,
)
from chroma_jax.checkpoint.torch_table import VISION_TOWER, CheckpointError, Plan
from chroma_jax.config.hf import write_quantized
from chroma_jax.config.types import QUANTIZED
from chroma_jax.model.quantized import input_axes

_BY_NAME = {name: dtype for dtype, name in params.PARAM_DTYPES.items()}


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = logging.info,
    quantize: str | None = None,
) -> None:
    """Writes a checkpoint of the Hub's layout as a directory that `load` reads.

    Everything about the source is checked before anything is written, and `out` appears only when it is complete.

    Args:
      source: a directory with config.json and safetensors, or a Hub id "owner/name".
      out: the directory to make.
      dtype: what Reasoner, Backbone and Decoder are stored in: "float32", "bfloat16" or "float16". None keeps the dtype of
        every tensor. The Codec keeps its dtypes anyway.
      overwrite: whether a checkpoint at `out` may be replaced.
      progress: whether to show a progress bar on a terminal.
      say: where to tell what is left out, and the bytes that saves.
      quantize: "int8" or "fp8" to store kernels and tables in eight bits (see `model/quantized.py`): half of bfloat16's room.
        What is made so cannot be exported or trained.

    Raises:
      ValueError: (CheckpointError) the source is not a whole Chroma checkpoint, or `out` cannot be written.
    """
    if dtype is not None and dtype not in _BY_NAME:
        raise CheckpointError(f"dtype must be one of {', '.join(sorted(_BY_NAME))}; got {dtype!r}")
    if quantize is not None and quantize not in QUANTIZED:
        raise CheckpointError(f"quantize must be {' or '.join(QUANTIZED)}; got {quantize!r}")
    check_apart(source, out)
    with staged(out, overwrite=overwrite) as stage:
        directory = resolve_source(source)
        if is_converted(directory):
            raise CheckpointError(
                f"{directory} is converted already; --export makes a PyTorch checkpoint of it"
            )
        files = open_torch(directory)
        cfg, plan = plan_torch(files)
        tensors = _stored_dtypes(files, plan, dtype)
        skipped = _report_skipped(files, plan, say)
        _write_params(os.path.join(stage, PARAMS), files, plan, tensors, progress, quantize)
        for name in side_files(directory):
            paths.upload(os.path.join(directory, name), os.path.join(stage, name))
        if quantize is not None:
            config = os.path.join(stage, CONFIG_FILE)
            content = read_json(os.path.join(directory, CONFIG_FILE)) | write_quantized(quantize)
            paths.at(config).write_text(json.dumps(content, indent=2))
        manifest = Manifest(
            source=os.fspath(source),
            tied=cfg.reasoner.tie_embeddings,
            tensors=tensors,
            skipped=skipped,
            files={},
        )
        write_manifest(stage, manifest)


def _write_params(
    target: str,
    files: TorchFiles,
    plan: Plan,
    tensors: Mapping[str, str],
    progress: bool,
    quantize: str | None,
) -> None:
    dtypes = {
        leaf.path: params.widest(DTYPES[tensors[name]] for name in leaf.names)
        for leaf in plan.leaves
    }
    sizes = {leaf.path: math.prod(leaf.shape) * dtypes[leaf.path].itemsize for leaf in plan.leaves}
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    total = sum(sizes.values())
    quantised = [p for p in leaves if quantize is not None and input_axes(p) is not None]
    saved = sum(sizes[p] * (dtypes[p].itemsize - 1) // dtypes[p].itemsize for p in quantised)
    check_space(os.path.dirname(target), total - saved)

    def read(path: str) -> dict[str, np.ndarray]:
        array = read_leaf(files, leaves[path], dtypes[path])
        if path not in quantised:
            return {path: array}
        return {p: np.asarray(x) for p, x in quantizing.quantized(path, array, quantize).items()}

    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="convert", disable=None if progress else True
    )
    with bar, orbax_context():
        with contextlib.closing(_Saver(target)) as saver:
            for group in groups(sizes):
                saver.save({p: x for path in group for p, x in read(path).items()})
                bar.update(sum(sizes[path] for path in group))
            saver.wait()
        ocp.partial.finalize(literal(target))


class _Saver:
    """Writes a group of parameters in the background while the next one is read.

    Orbax takes its own copy of what it writes, and the group itself is let go: two groups are in memory, no more.
    """

    def __init__(self, target: str):
        self._target, self._pending = literal(target), None

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        self.wait()
        self._pending = ocp.partial.save_async(self._target, nest(arrays))

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
            _return_freed_memory()

    def close(self) -> None:
        # After a failure: what is being written must be over before the directory is swept away.
        with contextlib.suppress(Exception):
            self.wait()


def _return_freed_memory() -> None:
    """glibc keeps what Orbax's writing threads have freed, gigabytes of it, unless it is asked to give it back."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _stored_dtypes(files: TorchFiles, plan: Plan, dtype: str | None) -> dict[str, str]:
    """PyTorch name -> the safetensors dtype it is converted to, and exported in."""
    return {
        name: NAMES[
            files.tensors[name].dtype
            if dtype is None or params.is_codec(leaf.path)
            else _BY_NAME[dtype]
        ]
        for leaf in plan.leaves
        for name in leaf.names
    }


def _report_skipped(files: TorchFiles, plan: Plan, say: Callable[[str], None]) -> dict[str, int]:
    reasons: dict[str, list[str]] = {}
    for name, row in plan.skipped.items():
        reasons.setdefault(row.why, []).append(name)
    for why, names in reasons.items():
        nbytes = total_bytes(files.tensors[name] for name in names)
        say(f"skipped {why}: {len(names)} tensors, {nbytes / 1e6:,.1f} MB saved")
    vision = [name for name in plan.skipped if name.startswith(VISION_TOWER)]
    return {
        "tensors": len(plan.skipped),
        "bytes": total_bytes(files.tensors[name] for name in plan.skipped),
        "vision_tower_bytes": total_bytes(files.tensors[name] for name in vision),
    }
