"""Directories that appear whole or not at all, under any name that a file system allows."""

import os

import pytest

from chroma_jax import paths
from chroma_jax.checkpoint import locking
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


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that stands in for an object store: folders are there when something is in them."""
    from etils import epath

    folder = tmp_path / "bucket"
    opened = []

    def at(path):
        opened.append(os.fspath(path))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return epath.Path(path)

    monkeypatch.setattr(paths, "at", at)
    monkeypatch.setattr(paths, "is_remote", lambda path: str(path).startswith(str(folder)))
    monkeypatch.setattr(paths, "check_remote", lambda path: None)
    monkeypatch.setattr(locking, "_SETTLE_SECONDS", 0.01)
    return folder, opened


def fill(stage, text):
    os.makedirs(os.path.join(stage, "params"))
    for name in ("chroma_jax.json", "params/a", "tokenizer.json"):
        with open(os.path.join(stage, name), "w") as f:
            f.write(text)


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("shared", [False, True])
def test_in_an_object_store(bucket, shared):
    folder, opened = bucket
    out = folder / "model"
    with staged(out, overwrite=False, shared=shared) as stage:
        assert (stage == str(out)) is shared
        fill(stage, "one")
    names = ("chroma_jax.json", "params/a", "tokenizer.json")
    assert content(folder) == {f"model/{name}": "one" for name in names}
    if not shared:  # the manifest comes last
        sent = [path for path in opened if path.startswith(f"{out}/")]
        assert sent[-1] == f"{out}/chroma_jax.json" and len(sent) == 3
    with pytest.raises(CheckpointError, match="is not empty; --overwrite replaces it"):
        staged(out, overwrite=False).__enter__()
    with pytest.raises(KeyError), staged(out, overwrite=True, shared=shared) as stage:
        fill(stage, "two")
        raise KeyError
    assert content(folder) == ({} if shared else {f"model/{name}": "one" for name in names})
    with staged(out, overwrite=True, shared=shared) as stage:
        fill(stage, "three")
    assert content(folder) == {f"model/{name}": "three" for name in names}
