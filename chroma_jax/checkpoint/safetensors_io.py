"""Reading and writing of .safetensors files in numpy, one tensor at a time, bfloat16 included.

The format is eight bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes. Plain reads into fresh memory, no mapping: what a process holds is what it asked for. Every file is
checked from end to end before any of its tensors is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from chroma_jax.checkpoint.torch_table import CheckpointError
from chroma_jax.checkpoint.transforms import Shape

MAX_HEADER_BYTES = 100_000_000
LFS_POINTER = b"version https://git-lfs.github.com"  # what Git writes in place of a large file

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
# Transposing in tiles of this many rows and columns keeps both sides in cache.
_TILE = 256
_PARALLEL_BYTES = 2**24
# Per reading thread: the largest tensor of one layer.
_BUFFER_BYTES = 2**26
_buffers = threading.local()
# What numpy moves about fast, whatever the bits mean.
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    path: str
    shape: Shape
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def bits(x: np.ndarray) -> np.ndarray:
    """The array as unsigned integers of the same size: copied faster, and compared bit by bit."""
    return x.view(_BITS[x.dtype.itemsize])


def read_header(path: str) -> dict[str, TensorInfo]:
    """The tensors of one file. Raises CheckpointError naming the file if it is not whole."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8:
                raise CheckpointError(f"{path} is truncated: {size} bytes, no header")
            if head == LFS_POINTER[:8]:
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the weights: `git lfs pull` in its folder brings them"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} has a corrupted header: it claims a length of {length} bytes"
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated: {size} bytes, but its header alone takes {8 + length}"
                )
            text = f.read(length)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from e
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        infos = _tensors(path, header, 8 + length)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} has a corrupted header: {e}") from e
    end = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise CheckpointError(
                f"{path} has a corrupted header: data of {name} does not follow the one before"
            )
        end += info.nbytes
    if end > size:
        raise CheckpointError(f"{path} is truncated: {size} bytes, but its tensors end at {end}")
    if end < size:
        raise CheckpointError(f"{path} is corrupted: {size - end} bytes follow its last tensor")
    return infos


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice} stands there twice")
    return out


def _tensors(path: str, header: Any, start: int) -> dict[str, TensorInfo]:
    if not isinstance(header, dict):
        raise ValueError("it is no JSON object")
    infos = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name} has unknown dtype {dtype!r}")
        if not _are_sizes(shape):
            raise ValueError(f"{name} has shape {shape!r}")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{name} has data_offsets {offsets!r}")
        info = TensorInfo(path, tuple(shape), DTYPES[dtype], start + offsets[0])
        if offsets[1] - offsets[0] != info.nbytes:
            raise ValueError(
                f"{name} of {dtype} {shape} takes {info.nbytes} bytes, data_offsets are {offsets}"
            )
        infos[name] = info
    return infos


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def read_tensor(info: TensorInfo, reuse: bool = False) -> np.ndarray:
    """One tensor, in fresh memory; with `reuse`, in memory that this thread's next `reuse` overwrites.

    Reuse spares the kernel the clearing of pages, which takes as long as the reading.
    """
    if reuse and info.nbytes <= _BUFFER_BYTES:
        if not hasattr(_buffers, "bytes"):
            _buffers.bytes = np.empty(_BUFFER_BYTES, np.uint8)
        raw = _buffers.bytes[: info.nbytes]
    else:
        raw = np.empty(info.nbytes, np.uint8)
    with open(info.path, "rb", buffering=0) as f:
        f.seek(info.offset)
        view, count = memoryview(raw), 0
        while count < info.nbytes and (got := f.readinto(view[count:])):
            count += got
    if count != info.nbytes:
        raise CheckpointError(f"{info.path} is truncated: it ended while being read")
    return raw.view(info.dtype).reshape(info.shape)


class Writer:
    """Writes one file whose tensors are announced beforehand and written in any order, by any thread."""

    def __init__(self, path: str, tensors: Mapping[str, tuple[Shape, np.dtype]]):
        # As in the safetensors library: wide dtypes first, so that everything is aligned; then by name.
        names = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._pending: dict[str, tuple[int, Shape, np.dtype]] = {}
        at = 0
        for name in names:
            shape, dtype = tensors[name]
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            self._pending[name] = (at, tuple(shape), dtype)
            at = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by close)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + at)

    def write(self, name: str, array: np.ndarray) -> None:
        """One tensor. Raises ValueError if it is not as announced."""
        offset, shape, dtype = self._pending.pop(name, (0, None, None))
        if (array.shape, array.dtype) != (shape, dtype):
            raise ValueError(
                f"{name} {array.shape} {array.dtype} is written, {shape} {dtype} was announced"
            )
        view, at = (
            memoryview(contiguous(bits(array)).reshape(-1).view(np.uint8)),
            self._start + offset,
        )
        while view:
            count = os.pwrite(self._file.fileno(), view, at)
            view, at = view[count:], at + count

    def finish(self) -> None:
        """Sees to it that all is there and on the disk."""
        if self._pending:
            raise ValueError(f"{len(self._pending)} tensors were announced and not written")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, finished or not."""
        self._file.close()


def for_each(task: Callable[[int], None], count: int, nbytes: int) -> None:
    """task(0), ..., task(count - 1), in parallel where `nbytes` of work is worth it: most of it is copying."""
    if count == 1 or nbytes < _PARALLEL_BYTES:
        for i in range(count):
            task(i)
    else:
        list(_threads().map(task, range(count)))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), "checkpoint")


def contiguous(x: np.ndarray) -> np.ndarray:
    """`x` in C order: itself, or a copy."""
    if x.flags.c_contiguous:
        return x
    out = np.empty(x.shape, x.dtype)
    copy_tiled(out, x)
    return out


def copy_tiled(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source; when source is a transposed view, tile by tile (several times faster).

    `target` is in C order.
    """
    shape = _as_matrix(source)
    if source.flags.c_contiguous or shape is None:
        target[...] = source
        return
    target, source = target.reshape(shape), source.reshape(shape)
    rows, columns = shape
    for i in range(0, rows, _TILE):
        for j in range(0, columns, _TILE):
            target[i : i + _TILE, j : j + _TILE] = source[i : i + _TILE, j : j + _TILE]


def _as_matrix(x: np.ndarray) -> tuple[int, int] | None:
    """The two-dimensional shape that `x` can be viewed in without a copy: its first or its last axis kept apart."""
    joins = [x.strides[k] == x.strides[k + 1] * x.shape[k + 1] for k in range(x.ndim - 1)]
    if x.ndim >= 2 and all(joins[1:]):
        return x.shape[0], x.size // max(x.shape[0], 1)
    if x.ndim >= 2 and all(joins[:-1]):
        return x.size // max(x.shape[-1], 1), x.shape[-1]
    return None


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Bytes of data of some tensors."""
    return sum(info.nbytes for info in infos)
