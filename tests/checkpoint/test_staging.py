"""Directories that appear whole or not at all, under any name that a file system allows."""

import os

import pytest

from chroma_jax.checkpoint.staging import staged
from chroma_jax.checkpoint.torch_table import CheckpointError

NAMES = ["n" * 255, "é" * 127, "out[1] *?", "~", "a b"]


def write(out, overwrite: bool, content: str) -> None:
    with staged(out, overwrite=overwrite) as stage:
        for name in ("config.json", "new"):
            with open(os.path.join(stage, name), "w") as f:
                f.write(content)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:9])
def test_any_name_is_written_and_replaced(tmp_path, name):
    out = tmp_path / name
    write(out, False, "old")
    write(out, True, "new")
    assert (out / "new").read_text() == "new"
    with pytest.raises(ZeroDivisionError), staged(out, overwrite=True):
        raise ZeroDivisionError
    assert (out / "new").read_text() == "new"
    left = {entry for entry in os.listdir(tmp_path) if not entry.endswith(".lock")}
    assert left == {name}


def test_a_name_too_long_is_told_before_the_work(tmp_path):
    with (
        pytest.raises(CheckpointError, match="cannot write to .*: File name too long"),
        staged(tmp_path / ("n" * 256), overwrite=False),
    ):
        pytest.fail("the work began")
    assert not os.listdir(tmp_path)
