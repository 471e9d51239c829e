"""PyTorch's files, old and new, read without it; what they would run is not run."""

import collections
import os
import pickle

import numpy as np
import pytest

from chroma_jax.evaluation.judges import pickles

torch = pytest.importorskip("torch", reason="torch writes the files that are read here")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_of_all_kinds(tmp_path, zipped):
    base = torch.arange(24.0).reshape(4, 6)
    saved = {
        "whole": base,
        "turned": base.T,
        "part": base[1:3, ::2],
        "half": base.half(),
        "brain": base.bfloat16(),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
    }
    torch.save({"model": collections.OrderedDict(saved), "epoch": 3}, tmp_path / "x.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    found = pickles.read(tmp_path / "x.pt", "state_dict", "model")
    assert list(found) == list(saved)
    for name, tensor in saved.items():
        want = tensor.detach()
        if name == "brain":
            found[name], want = found[name].astype(np.float32), want.float()
        np.testing.assert_array_equal(found[name], want.numpy(), err_msg=name)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_is_executed(tmp_path, zipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"x": torch.ones(2)}, "args": Evil()}, "x.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    np.testing.assert_array_equal(pickles.read("x.pt", "model")["x"], [1, 1])
    assert not os.path.exists("made_by_a_pickle")


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2])], ids=["empty", "text", "list"])  # fmt: skip
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(ValueError, match="bad.pt"):
        pickles.read(tmp_path / "bad.pt")


def test_absent_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such file: .*absent.pt"):
        pickles.read(tmp_path / "absent.pt")
