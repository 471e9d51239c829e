"""Our reader and writer against the safetensors library, and against damaged files."""

import json
import pathlib
import tempfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoints import assert_same_tensors

from chroma_jax.checkpoint.safetensors_io import (
    DTYPES,
    Writer,
    contiguous,
    read_header,
    read_tensor,
)
from chroma_jax.checkpoint.torch_table import CheckpointError

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.arange(4, dtype=np.float16).reshape(2, 1, 2),
    "d": np.array(7.0, np.float32),
    "e": np.zeros((0, 3), np.float32),
    "f": np.array([True, False, True]),
    "g": np.arange(3, dtype=np.int64),
}


def write_bytes(header: bytes | str | dict, data: bytes = b"", length: int | None = None) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def read_all(path) -> dict[str, np.ndarray]:
    return {name: read_tensor(info) for name, info in read_header(str(path)).items()}


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(TENSORS, path, metadata={"format": "pt"})
    assert_same_tensors(read_all(path), TENSORS)


@pytest.mark.parametrize("reverse", [False, True], ids=["in_order", "backwards"])
def test_the_library_reads_what_we_write(tmp_path, reverse):
    path = tmp_path / "x.safetensors"
    writer = Writer(str(path), {name: (x.shape, x.dtype) for name, x in TENSORS.items()})
    for name in sorted(TENSORS, reverse=reverse):
        writer.write(name, TENSORS[name])
    writer.finish()
    writer.close()
    assert_same_tensors(safetensors.numpy.load_file(path), TENSORS)
    assert_same_tensors(read_all(path), TENSORS)


def test_writer_takes_only_what_was_announced(tmp_path):
    writer = Writer(str(tmp_path / "x"), {"a": ((2,), np.dtype(np.float32))})
    with pytest.raises(ValueError, match="1 tensors were announced and not written"):
        writer.finish()
    with pytest.raises(ValueError, match="was announced"):
        writer.write("a", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="was announced"):
        writer.write("b", np.zeros(2, np.float32))
    writer.close()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_transposes_survive(tmp_path, dtype):
    x = (np.arange(600 * 300) % 251).astype(DTYPES[dtype]).reshape(600, 300).T
    writer = Writer(str(tmp_path / "x"), {"x": (x.shape, x.dtype)})
    writer.write("x", x)
    writer.finish()
    writer.close()
    assert_same_tensors(read_all(tmp_path / "x"), {"x": np.ascontiguousarray(x)})


@pytest.mark.parametrize(
    "axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 2, 1), (1, 0, 2)], ids=str
)
def test_tiled_copy_is_a_copy(axes):
    x = np.arange(7 * 300 * 280, dtype=np.uint32).reshape(7, 300, 280).transpose(axes)
    y = contiguous(x)
    assert y.flags.c_contiguous
    np.testing.assert_array_equal(y, x)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

DAMAGES = {
    "empty": (b"", "is truncated: 0 bytes"),
    "half_a_length": (b"\x10\0\0", "is truncated: 3 bytes"),
    "huge_length": (
        write_bytes("{}", length=2**63),
        "corrupted header: it claims a length of 9223372036854775808",
    ),
    "long_length": (
        write_bytes("{}", length=99),
        "is truncated: 10 bytes, but its header alone takes 107",
    ),
    "no_json": (write_bytes("{nonsense"), "corrupted header: "),
    "no_utf8": (write_bytes(b"\xff\xfe{}"), "corrupted header: "),
    "deep_json": (write_bytes("[" * 200_000), "corrupted header: "),
    "a_list": (write_bytes("[1, 2]"), "corrupted header: it is no JSON object"),
    "no_entry": (write_bytes('{"a": 3}'), "corrupted header: a has unknown dtype None"),
    "odd_dtype": (write_bytes({"a": A | {"dtype": "F7"}}, b"12345678"), "a has unknown dtype 'F7'"),
    "negative_shape": (write_bytes({"a": A | {"shape": [-2]}}, b"12345678"), r"a has shape \[-2\]"),
    "true_shape": (write_bytes({"a": A | {"shape": [True]}}, b"12345678"), r"a has shape \[True\]"),
    "three_offsets": (
        write_bytes({"a": A | {"data_offsets": [0, 4, 8]}}, b"12345678"),
        "data_offsets",
    ),
    "short_offsets": (
        write_bytes({"a": A | {"data_offsets": [0, 7]}}, b"1234567"),
        "takes 8 bytes",
    ),
    "twice": (
        write_bytes(f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}', b"12345678"),
        "a stands there twice",
    ),
    "overlap": (write_bytes({"a": A, "b": A}, b"12345678"), "data of b does not follow"),
    "gap": (
        write_bytes({"a": A | {"data_offsets": [8, 16]}}, b"12345678" * 2),
        "data of a does not follow",
    ),
    "short_data": (write_bytes({"a": A}, b"1234"), "is truncated: .* its tensors end at"),
    "long_data": (write_bytes({"a": A}, b"12345678..."), "is corrupted: 3 bytes follow"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found(tmp_path, content, message):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as e:
        read_header(str(path))
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read .*gone.safetensors: No such file"):
        read_header(str(tmp_path / "gone.safetensors"))


WHOLE = safetensors.numpy.save(TENSORS)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_anywhere_is_refused(size):
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "cut.safetensors")
        path.write_bytes(WHOLE[:size])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_header(str(path))


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=4))
def test_a_file_with_any_bytes_changed_is_refused_or_readable(at, change):
    content = WHOLE[:at] + change + WHOLE[at + len(change) :]
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "changed.safetensors")
        path.write_bytes(content)
        try:
            tensors = read_all(path)
        except CheckpointError as e:
            assert "changed.safetensors" in str(e)
        else:
            assert sum(x.nbytes for x in tensors.values()) <= len(content)
