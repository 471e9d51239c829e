"""Conversion to our directory: the same numbers, complete or not there at all."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from random_checkpoints import (
    GOLDEN,
    assert_same_model,
    mixed_dtype,
    random_tensors,
    write_checkpoint,
)

from chroma_jax.checkpoint import CheckpointError, convert, load, load_converted, load_torch, params
from chroma_jax.checkpoint.staging import staged
from chroma_jax.config import hf, tiny


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(tiny())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_golden_converts(tmp_path, dtype):
    said = []
    convert(GOLDEN, tmp_path / "out", say=said.append)
    assert_same_model(load_converted(tmp_path / "out", dtype)[1], load_torch(GOLDEN, dtype)[1])
    assert said == ["skipped the vision tower, which Chroma never uses: 22 tensors, 0.3 MB saved"]
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32", "float16"])
def test_mixed_sharded_checkpoint_converts(tmp_path, dtype):
    source = write_checkpoint(tmp_path / "it", random_tensors(tiny(), mixed_dtype), shards=3)
    convert(source, tmp_path / "out", dtype)
    cfg, model = load_converted(tmp_path / "out")
    want_cfg, want = load_torch(source, dtype)
    assert_same_model(model, want)
    assert cfg == want_cfg


@pytest.mark.parametrize("then", ["float32", "bfloat16"])
def test_loading_casts_as_load_torch_does(tmp_path, then):
    source = write_checkpoint(tmp_path / "it", random_tensors(tiny(), mixed_dtype))
    convert(source, tmp_path / "out")
    assert_same_model(load_converted(tmp_path / "out", then)[1], load_torch(source, then)[1])


def test_many_groups_convert_like_one(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr("chroma_jax.checkpoint.store.GROUP_BYTES", 300_000)
    monkeypatch.setattr("chroma_jax.checkpoint.safetensors_io._PARALLEL_BYTES", 1000)
    source = write_checkpoint(tmp_path / "it", tensors)
    convert(source, tmp_path / "out")
    assert_same_model(load_converted(tmp_path / "out")[1], load_torch(source)[1])


def test_tied_head_survives(tmp_path, tensors):
    tensors = dict(tensors)
    del tensors["thinker.lm_head.weight"]
    source = write_checkpoint(tmp_path / "it", tensors)
    convert(source, tmp_path / "out")
    cfg, model = load_converted(tmp_path / "out")
    assert cfg.reasoner.tie_embeddings
    assert "reasoner/head" not in params.flatten(model)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == hf.write(tiny())


def test_side_files_come_along_verbatim(tmp_path, golden):
    (golden / "tokenizer.json").write_bytes(b'{"x": \xc3\xa9 }\n')
    (golden / "chat_template.jinja").write_text("{{ x }}")
    convert(golden, tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (golden / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / "chroma_jax.json").read_text())
    assert manifest["format"] == "chroma_jax"
    assert manifest["skipped"] == {"tensors": 22, "bytes": 292096, "vision_tower_bytes": 292096}
    assert manifest["tensors"]["thinker.lm_head.weight"] == "F32"
    assert set(manifest["written_by"]) >= {"chroma_jax", "jax", "flax", "orbax-checkpoint"}


def assert_untouched(out, error_type, message, **kwargs):
    with pytest.raises(error_type, match=message):
        convert(kwargs.pop("source", GOLDEN), out, **kwargs)
    parent = pathlib.Path(out).parent
    assert not parent.is_dir() or not any(n.name.startswith(".") for n in parent.iterdir())


def test_an_occupied_target_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert_untouched(out, CheckpointError, r"out exists and is not empty; --overwrite replaces it")
    assert_untouched(
        out, CheckpointError, r"out is no checkpoint: it will not be overwritten", overwrite=True
    )
    assert (out / "thesis.txt").read_text() == "mine"
    assert_untouched(
        out / "thesis.txt", CheckpointError, r"thesis.txt is a file; a directory is wanted"
    )


def test_an_empty_target_is_fine_and_a_checkpoint_can_be_replaced(tmp_path, tensors):
    out = tmp_path / "out"
    out.mkdir()
    convert(GOLDEN, out)
    source = write_checkpoint(tmp_path / "it", tensors)
    convert(source, out, overwrite=True)
    assert_same_model(load_converted(out)[1], load_torch(source)[1])
    assert sorted(os.listdir(tmp_path)) == ["it", "out"]


def test_a_failed_replacement_keeps_the_old(tmp_path, tensors):
    out = tmp_path / "out"
    convert(GOLDEN, out)
    bad = dict(tensors)
    del bad["thinker.model.norm.weight"]
    source = write_checkpoint(tmp_path / "bad", bad)
    assert_untouched(out, CheckpointError, "missing tensor", source=source, overwrite=True)
    assert_same_model(load_converted(out)[1], load_torch(GOLDEN)[1])


@pytest.mark.parametrize("out", ["/proc/nothing/out", "/dev/null/out"])
def test_an_unwritable_target_is_told_before_any_work(monkeypatch, out):
    monkeypatch.setattr(
        "chroma_jax.checkpoint.conversion.open_torch", lambda _: pytest.fail("began to work")
    )
    assert_untouched(out, CheckpointError, f"cannot write to {out}: ")


def test_a_full_disk_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000))
    monkeypatch.setattr(
        "chroma_jax.checkpoint.conversion.read_leaf", lambda *_: pytest.fail("began to work")
    )
    assert_untouched(
        tmp_path / "out",
        CheckpointError,
        r"not enough space in .*: 0\.07 GB are needed, 0\.00 GB are free",
    )


def test_two_writers_do_not_meet(tmp_path):
    with staged(tmp_path / "out", overwrite=False):
        with pytest.raises(CheckpointError, match="another process is writing .*out"):
            convert(GOLDEN, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == [".out.incomplete", ".out.lock"]
    convert(GOLDEN, tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["same", "inside", "around"])
def test_source_and_target_stay_apart(golden, where):
    out = {"same": golden, "inside": golden / "out", "around": golden.parent}[where]
    with pytest.raises(CheckpointError, match="must not contain each other"):
        convert(golden, out, overwrite=True)
    assert (golden / "model.safetensors").exists()


def test_what_is_converted_is_not_converted_again(tmp_path):
    convert(GOLDEN, tmp_path / "out")
    assert_untouched(
        tmp_path / "again",
        CheckpointError,
        "is converted already; --export",
        source=tmp_path / "out",
    )


def test_a_foreign_dtype_is_refused(tmp_path):
    assert_untouched(
        tmp_path / "out",
        CheckpointError,
        "dtype must be one of bfloat16, float16, float32; got 'int8'",
        dtype="int8",
    )


@pytest.mark.parametrize("size", [0, 7, 1000, 30_000, 2_000_000])
def test_a_cut_file_leaves_nothing(tmp_path, golden, size):
    weights = golden / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert_untouched(
        tmp_path / "out", CheckpointError, r"model\.safetensors is truncated", source=golden
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, OSError], ids=lambda e: e.__name__
)
@pytest.mark.parametrize("moment", ["read_leaf", "side_files", "write_manifest"])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, moment, error):
    def interrupt(*_):
        raise error("now")

    if moment == "read_leaf":
        monkeypatch.setattr("chroma_jax.checkpoint.store.GROUP_BYTES", 500_000)
        from chroma_jax.checkpoint.from_torch import read_leaf

        def interrupt(files, leaf, dtype):
            if leaf.path == "reasoner/embedding":
                raise error("now")
            return read_leaf(files, leaf, dtype)

    monkeypatch.setattr(f"chroma_jax.checkpoint.conversion.{moment}", interrupt)
    assert_untouched(tmp_path / "out", error, "now")
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
import jax
jax.config.update("jax_platforms", "cpu")
from chroma_jax.checkpoint import conversion, store

def stop(*_):
    print("here", flush=True)
    time.sleep(60)

moment, source, out, overwrite = sys.argv[1:]
store.GROUP_BYTES = 500_000
if moment == "params":
    finalize = conversion.ocp.partial.finalize
    conversion.ocp.partial.finalize = stop
elif moment == "manifest":
    conversion.write_manifest = stop
else:
    import os
    rename = os.replace
    os.replace = stop  # the old one is aside, the new one is not there yet
conversion.convert(source, out, overwrite=overwrite == "True")
"""


@pytest.mark.parametrize(
    ("moment", "replace"), [("params", False), ("manifest", False), ("rename", True)]
)
def test_a_killed_process_leaves_nothing_that_loads(tmp_path, moment, replace):
    out = tmp_path / "out"
    if replace:
        convert(GOLDEN, out, "bfloat16")
    command = [sys.executable, "-c", KILLED, moment, str(GOLDEN), str(out), str(replace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    left = tmp_path / ".out.incomplete"
    assert left.exists()
    with pytest.raises(CheckpointError, match="no such directory"):
        load(out)
    if moment != "rename":  # there the new checkpoint is whole, if hidden
        with pytest.raises(CheckpointError, match="incomplete checkpoint|no config"):
            load(left)
    if replace:
        # The old one is put back, and needs --overwrite again.
        with pytest.raises(CheckpointError, match="--overwrite"):
            convert(GOLDEN, out)
        assert load(out).config.backbone.llama.dtype == "bfloat16"
        convert(GOLDEN, out, overwrite=True)
    else:
        convert(GOLDEN, out)
    assert os.listdir(tmp_path) == ["out"]
    assert_same_model(load(out).model, load_torch(GOLDEN)[1])


def test_bit_patterns_survive(tmp_path, tensors):
    """Infinities, NaNs with payloads, subnormals and negative zeros are bits like any other."""
    rng = np.random.default_rng(0)
    name = "thinker.model.layers.1.mlp.gate_proj.weight"
    odd = rng.integers(0, 2**16, tensors[name].shape, dtype=np.uint16).view(ml_dtypes.bfloat16)
    tensors = {
        n: x.astype(ml_dtypes.bfloat16) if n.startswith("thinker.") else x
        for n, x in tensors.items()
    }
    source = write_checkpoint(tmp_path / "it", tensors | {name: odd})
    convert(source, tmp_path / "out")
    assert_same_model(load(tmp_path / "out").model, load(source).model)
    gate = np.asarray(load(tmp_path / "out").model.reasoner.llama.layers.gate[...])[1]
    np.testing.assert_array_equal(gate.view(np.uint16), odd.T.view(np.uint16))
