"""The tensors of a file that PyTorch pickled, as numpy arrays: without PyTorch, and without running what the file holds."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for any object that is no tensor: it can be made and filled, and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    extend = append


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries and tensors; names of whatever else are never looked up. `kinds` collects what the storages hold."""

    def __init__(self, f: Any, kinds: dict[str, np.dtype]):
        super().__init__(f)
        self._kinds = kinds

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        if module == "torch._utils" and name.startswith("_rebuild_tensor"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, tuple(shape), tuple(strides))  # fmt: skip
        if module == "torch" and name in _DTYPES:
            return _Storage(np.dtype(_DTYPES[name]), "")
        return _Inert

    def persistent_load(self, saved: Any) -> _Storage:
        _, kind, key, *_ = saved
        if not isinstance(kind, _Storage):
            raise pickle.UnpicklingError("tensors of a kind that is not known")
        self._kinds[str(key)] = kind.dtype
        return kind._replace(key=str(key))


def read(path: str | os.PathLike, *inside: str) -> dict[str, np.ndarray]:
    """The state dict of a `.pt` or `.pth` file, of any age of PyTorch's.

    `inside` are keys under which it may lie; the first that is there is taken, else the whole. What is no tensor is left out.
    Raises ValueError naming a file that is damaged or no such file; nothing in the file is executed.
    """
    try:
        with open(path, "rb") as f:
            content, storages = _zipped(f) if zipfile.is_zipfile(f) else _legacy(f)
        for key in inside:
            if isinstance(content, dict) and key in content:
                content = content[key]
                break
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("no dictionary of tensors")
        return {k: _array(v, storages) for k, v in content.items() if isinstance(v, _Tensor)}
    except FileNotFoundError as e:
        raise ValueError(f"no such file: {os.fspath(path)}") from e
    except Exception as e:  # a damaged pickle may raise anything
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(
            f"{os.fspath(path)}: no weights of PyTorch's that can be read: {first}"
        ) from e


def _array(tensor: _Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
    flat = storages[tensor.storage.key][tensor.offset :]
    size = flat.itemsize
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if min(tensor.shape, default=1) == 0:
        return np.zeros(tensor.shape, flat.dtype)
    if last >= len(flat) or min(tensor.strides, default=0) < 0:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, [size * s for s in tensor.strides])
    return view.copy()


def _zipped(f: io.BufferedReader) -> tuple[Any, dict[str, np.ndarray]]:
    archive, kinds = zipfile.ZipFile(f), {}
    (index,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
    folder = index.removesuffix("data.pkl")
    content = _Unpickler(io.BytesIO(archive.read(index)), kinds).load()
    return content, {
        key: np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)
        for key, dtype in kinds.items()
    }


def _legacy(f: io.BufferedReader) -> tuple[Any, dict[str, np.ndarray]]:
    """Before PyTorch 1.6: magic number, version, machine, content, storage keys, then each storage with its length before it."""
    f.seek(0)
    kinds: dict[str, np.dtype] = {}
    for _ in range(3):
        _Unpickler(f, kinds).load()
    content, keys = _Unpickler(f, kinds).load(), _Unpickler(f, kinds).load()
    storages = {}
    for key in map(str, keys):
        count = int.from_bytes(f.read(8), "little")
        block = f.read(count * kinds[key].itemsize)
        storages[key] = np.frombuffer(block, kinds[key], count)
    return content, storages
