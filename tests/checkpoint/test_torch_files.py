"""Opening a checkpoint in the Hub's layout: what is accepted, and what each refusal says."""

import json
import types

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from random_checkpoints import (
    assert_same_tensors,
    random_tensors,
    read_checkpoint,
    write_checkpoint,
)

from chroma_jax.checkpoint.torch_files import open_torch, resolve_source, side_files
from chroma_jax.checkpoint.torch_table import CheckpointError
from chroma_jax.config import tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(tiny())


@pytest.fixture
def sharded(tmp_path, tensors):
    return write_checkpoint(tmp_path / "sharded", tensors, shards=3)


@pytest.mark.parametrize("shards", [1, 3])
def test_opens_single_and_sharded(tmp_path, tensors, shards):
    files = open_torch(write_checkpoint(tmp_path / "it", tensors, shards=shards))
    assert files.config == tiny()
    assert_same_tensors({name: files.read(name) for name in files.tensors}, tensors)


def test_the_single_file_wins(sharded, tensors):
    write_checkpoint(sharded.parent / "other", tensors)
    (sharded.parent / "other" / "model.safetensors").rename(sharded / "model.safetensors")
    (sharded / "model-00001-of-00003.safetensors").unlink()
    assert open_torch(sharded).tensors.keys() == tensors.keys()


def no_directory(directory):
    return directory / "gone", "no such directory: .*gone"


def a_file(directory):
    return directory / "config.json", "no such directory: .*config.json"


def no_config(directory):
    (directory / "config.json").unlink()
    return directory, "has no config.json: it is no checkpoint"


def bad_config(directory):
    (directory / "config.json").write_text("{")
    return directory, "config.json is not valid JSON"


def foreign_config(directory):
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 3}))
    return directory, "config.json: .*[Cc]hroma"


def no_weights(directory):
    (directory / INDEX).unlink()
    return directory, "has no weights: neither model.safetensors nor model.safetensors.index.json"


def no_shard(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()
    return (
        directory,
        "lacks 1 of the 3 shards in its index, first model-00002-of-00003.safetensors$",
    )


def cut_shard(directory):
    shard = directory / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    return directory, "model-00003-of-00003.safetensors is truncated"


def pointer(directory):
    """What is there where Git LFS was not run."""
    shard = directory / "model-00003-of-00003.safetensors"
    shard.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4400000000\n"
    )
    return directory, "model-00003-of-00003.safetensors is a Git LFS pointer, not the weights: `git"


def bad_index(directory):
    (directory / INDEX).write_text("[")
    return directory, f"{INDEX} is not valid JSON"


def mapless_index(directory):
    (directory / INDEX).write_text('{"metadata": {}}')
    return directory, f"{INDEX} has no weight_map"


def climbing_index(directory):
    edit_index(directory, lambda m: m.update({"thinker.model.norm.weight": "../x.safetensors"}))
    return directory, f"{INDEX} has no weight_map of tensor names to file names"


def absent_tensor(directory):
    edit_index(directory, lambda m: m.update(extra="model-00001-of-00003.safetensors"))
    return directory, "tensor extra should be in model-00001-of-00003.safetensors, says the index"


def unlisted_tensor(directory):
    edit_index(directory, lambda m: m.pop("thinker.model.norm.weight"))
    return directory, "tensor thinker.model.norm.weight is in .*, but not in the index"


def tensor_in_two_shards(directory):
    first = directory / "model-00001-of-00003.safetensors"
    write_checkpoint(
        directory.parent / "other", {"thinker.model.norm.weight": np.zeros(3, np.float32)}
    )
    (directory.parent / "other" / "model.safetensors").rename(directory / "four.safetensors")
    edit_index(
        directory, lambda m: m.update({next(iter(m)): m[next(iter(m))], "fake": "four.safetensors"})
    )
    assert first.exists()
    return (
        directory,
        "tensor thinker.model.norm.weight is in four.safetensors too; the index has it in model-0000",
    )


def edit_index(directory, edit):
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "spoil",
    [
        no_directory, a_file, no_config, bad_config, foreign_config, no_weights, no_shard, cut_shard, pointer, bad_index,
        mapless_index, climbing_index, absent_tensor, unlisted_tensor, tensor_in_two_shards,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_is_wrong_is_told(sharded, spoil):
    directory, message = spoil(sharded)
    with pytest.raises(CheckpointError, match=message):
        open_torch(directory)


def test_side_files_are_all_but_the_weights(sharded):
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
        "chroma_jax.json",
        "x.bin",
    ):
        (sharded / name).write_text("x")
    (sharded / "folder.json").mkdir()
    want = ["LICENSE", "chat_template.jinja", "config.json", "merges.txt", "tokenizer.json"]
    assert side_files(str(sharded)) == want
    assert len(read_checkpoint(sharded)) > 0


def test_a_directory_is_itself(tmp_path, monkeypatch):
    assert resolve_source(tmp_path) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_source(f"~/{tmp_path.name}") == str(tmp_path)


@pytest.mark.parametrize(
    "source", ["./owner/name", "/no/where", "~/nowhere", "name", "a/b/c", "../up", "", "a/.b"]
)
def test_what_looks_local_is_not_looked_for_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub")
    )
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_source(source)


def test_a_file_is_no_source(golden):
    with pytest.raises(
        CheckpointError, match=r"config\.json is a file; the checkpoint's directory"
    ):
        resolve_source(golden / "config.json")


def hub_error(kind, status):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("a long story\nin lines", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.GatedRepoError, 403), r"FlashLabs/Chroma-4B is gated: accept its licence on "
         r"https://huggingface.co/FlashLabs/Chroma-4B, then sign in with `hf auth login` or set HF_TOKEN"),
        (hub_error(errors.RepositoryNotFoundError, 401), "no directory and no Hub repository FlashLabs/Chroma-4B"),
        (hub_error(errors.HfHubHTTPError, 401), r"refused FlashLabs/Chroma-4B \(401\): accept .* HF_TOKEN"),
        (hub_error(errors.HfHubHTTPError, 403), r"refused FlashLabs/Chroma-4B \(403\): accept .* HF_TOKEN"),
        (hub_error(errors.HfHubHTTPError, 503), "could not send FlashLabs/Chroma-4B: a long story"),
        (errors.LocalEntryNotFoundError("not here\nbut"), r"\(offline\?\): not here"),
        (errors.OfflineModeIsEnabled("off"), r"\(offline\?\): off"),
        (RuntimeError("no route"), r"\(offline\?\): no route"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=["gated", "unknown", "401", "403", "503", "not_cached", "offline", "no_network", "disk_full"],
)  # fmt: skip
def test_hub_errors_say_what_to_do(monkeypatch, error, message):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=message) as e:
        resolve_source("FlashLabs/Chroma-4B")
    assert "\n" not in str(e.value)


def test_a_hub_id_is_downloaded_without_what_is_not_needed(monkeypatch, tmp_path):
    asked = {}

    def download(repo, *, allow_patterns):
        asked[repo] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source("FlashLabs/Chroma-4B") == str(tmp_path)
    assert {"*.safetensors", "*.json", "*.jinja", "*.txt"} <= set(asked["FlashLabs/Chroma-4B"])
    assert not any(pattern in ("*", "*.bin", "*.py") for pattern in asked["FlashLabs/Chroma-4B"])
