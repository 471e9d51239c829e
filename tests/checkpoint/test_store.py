"""Our own directories: save, load, shardings, and every kind of damage."""

import dataclasses
import importlib.metadata
import json
import os
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from random_checkpoints import GOLDEN, assert_same_model, random_ours

from chroma_jax.checkpoint import (
    CheckpointError,
    Loaded,
    convert,
    from_torch,
    load,
    load_converted,
    load_torch,
    params,
    save,
    store,
)
from chroma_jax.checkpoint.store import groups, nest, unnest
from chroma_jax.config import tiny


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "golden"
    convert(GOLDEN, directory)
    return directory


@pytest.fixture
def damaged(converted, tmp_path):
    """A copy of the converted checkpoint that a test may change."""
    return shutil.copytree(converted, tmp_path / "copy")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def cut(mesh):
    def one(leaf):
        axes = [None] * leaf.ndim
        for i, axis in zip(range(leaf.ndim - 1, -1, -1), ("fsdp", "tensor"), strict=False):
            axes[i] = axis if leaf.shape[i] % mesh.shape[axis] == 0 else None
        return NamedSharding(mesh, P(*axes))

    return lambda abstract: jax.tree.map(one, abstract)


def test_load_knows_what_it_is_given(converted):
    ours, theirs = load(converted), load(GOLDEN)
    assert isinstance(ours, Loaded)
    assert (ours.directory, theirs.directory) == (str(converted), str(GOLDEN))
    assert ours.config == theirs.config == ours.model.cfg
    assert_same_model(ours.model, theirs.model)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("which", ["converted", "golden"])
def test_loading_into_shardings_changes_no_number(converted, mesh, which, dtype):
    source = converted if which == "converted" else GOLDEN
    cfg, model, _ = load(source, dtype, cut(mesh))
    plain = load_torch(GOLDEN, dtype)
    assert cfg == plain[0]
    assert_same_model(model, plain[1])
    assert model.backbone.llama.layers.up[...].sharding == NamedSharding(
        mesh, P(None, "tensor", "fsdp")
    )


@pytest.mark.parametrize("which", ["converted", "golden"])
def test_of_some_stages_no_other_is_read(converted, mesh, which, monkeypatch):
    source, read = (converted, []) if which == "converted" else (GOLDEN, [])

    def spy(module, name, seen):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (read.extend(seen(*a)), real(*a, **k))[1])

    spy(store, "read_params", lambda directory, wanted: wanted)
    spy(from_torch, "read_leaf", lambda files, leaf, dtype: [leaf.path])
    whole = params.flatten(load(source).model)
    assert set(read) == set(whole)
    read.clear()
    cfg, model, _ = load(source, "bfloat16", cut(mesh), stages=["codec", "decoder"])
    assert {path.split("/")[0] for path in read} == {"codec", "decoder"}
    for path, leaf in params.flatten(model).items():
        if path in read:
            np.testing.assert_array_equal(leaf, whole[path].astype(leaf.dtype), err_msg=path)
        else:
            assert isinstance(leaf, jax.ShapeDtypeStruct)
            assert leaf.shape == whole[path].shape
    assert cfg == load(source, "bfloat16").config
    with pytest.raises(ValueError, match="unknown stage 'coder'; the stages are reasoner, "):
        load(source, stages=["coder"])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_loaded(tmp_path, mesh, tied, sharded):
    cfg = params.with_tied_head(tiny(), tied).with_dtype("bfloat16")
    model = random_ours(cfg, seed=3)
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    if sharded:
        model = jax.device_put(model, cut(mesh)(model))
    save(tmp_path / "out", cfg, model, [extra])
    got_cfg, got, _ = load(tmp_path / "out")
    assert_same_model(got, model)
    assert got_cfg == cfg
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    got = load(tmp_path / "out", shardings=cut(mesh)).model
    assert_same_model(got, model)


def test_mixed_dtypes_are_saved_as_they_are(tmp_path):
    """Trained in float32, frozen in bfloat16: each part keeps its own."""
    cfg = tiny().with_dtype("bfloat16")
    llama = tiny().backbone.llama
    cfg = dataclasses.replace(cfg, backbone=dataclasses.replace(cfg.backbone, llama=llama))
    model = random_ours(cfg)
    save(tmp_path / "out", cfg, model)
    loaded = load(tmp_path / "out")
    assert_same_model(loaded.model, model)
    assert loaded.config == cfg


def test_save_replaces_only_when_told(tmp_path):
    cfg = tiny()
    save(tmp_path / "out", cfg, random_ours(cfg, 0))
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save(tmp_path / "out", cfg, random_ours(cfg, 1))
    save(tmp_path / "out", cfg, random_ours(cfg, 1), overwrite=True)
    assert_same_model(load(tmp_path / "out").model, random_ours(cfg, 1))


def data_file(directory):
    files = [os.path.join(r, n) for r, _, names in os.walk(directory / "params") for n in names]
    return max(files, key=os.path.getsize)


def no_manifest(d):
    (d / "chroma_jax.json").unlink()
    return r"is an incomplete checkpoint: it has no chroma_jax\.json"


def bad_manifest(d):
    (d / "chroma_jax.json").write_text('{"format": ')
    return r"chroma_jax\.json is not valid JSON"


def foreign_manifest(d):
    (d / "chroma_jax.json").write_text('{"format": "other"}')
    return r"chroma_jax\.json is no manifest"


def poor_manifest(d):
    edit(d / "chroma_jax.json", lambda m: m.pop("tensors"))
    return r"chroma_jax\.json is damaged"


def new_manifest(d):
    edit(d / "chroma_jax.json", lambda m: m.update(version=2))
    return r"chroma_jax\.json has version 2; this program reads 1"


def no_config(d):
    (d / "config.json").unlink()
    return r"is incomplete: config\.json is missing"


def no_data(d):
    os.unlink(data_file(d))
    return r"is incomplete: params/.* is missing"


def cut_data(d):
    path = data_file(d)
    os.truncate(path, os.path.getsize(path) - 1)
    return r"is damaged: params/.* has \d+ bytes, it should have \d+"


def no_params(d):
    shutil.rmtree(d / "params")
    return r"is incomplete: params/.* is missing"


def other_config(d):
    edit(
        d / "config.json", lambda c: c["thinker_config"]["text_config"].update(num_hidden_layers=2)
    )
    size = os.path.getsize(d / "config.json")
    edit(d / "chroma_jax.json", lambda m: m["files"].update({"config.json": size}))
    return r"config\.json and chroma_jax\.json disagree on 12 tensors, the first is thinker\.model\.layers\.2\."


def other_width(d):
    edit(d / "config.json", lambda c: c["decoder_config"].update(intermediate_size=72))
    size = os.path.getsize(d / "config.json")
    edit(d / "chroma_jax.json", lambda m: m["files"].update({"config.json": size}))
    return r"decoder/llama/layers/.* should have shape .*72.*, found .*64"


def scrambled_metadata(d):
    path = next(p for p in (d / "params").rglob("_METADATA"))
    path.write_bytes(b"x" * path.stat().st_size)
    return r"params is damaged: "


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "spoil",
    [
        no_manifest, bad_manifest, foreign_manifest, poor_manifest, new_manifest, no_config, no_data, cut_data, no_params,
        other_config, other_width, scrambled_metadata,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_damage_is_told(damaged, spoil):
    message = spoil(damaged)
    with pytest.raises(CheckpointError, match=message) as e:
        load(damaged)
    assert "\n" not in str(e.value)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        load_converted(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="no such directory"):
        load(tmp_path / "gone")


def test_nesting_is_undone():
    flat = {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nest(flat) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert unnest(nest(flat)) == flat


def test_groups_keep_order_and_size(monkeypatch):
    monkeypatch.setattr("chroma_jax.checkpoint.store.GROUP_BYTES", 10)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 50, "e": 2, "f": 8}
    assert list(groups(sizes)) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert list(groups({})) == []


def test_compiled_by_jit_after_loading(converted):
    model = load(converted).model
    x = np.ones((1, 4, 64), np.float32)
    assert np.isfinite(jax.jit(lambda m, x: m.backbone.llama(x))(model, x)).all()


def test_a_checkout_that_is_not_installed_can_save(tmp_path, monkeypatch):
    """Run by PYTHONPATH, the package has no version."""

    def version(package):
        if package == "chroma_jax":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    manifest = store.Manifest(source="", tied=False, tensors={}, skipped={}, files={})
    store.write_manifest(str(tmp_path), manifest)
    written_by = json.loads((tmp_path / "chroma_jax.json").read_text())["written_by"]
    assert (written_by["chroma_jax"], written_by["jax"]) == ("not installed", "1.2")
