"""Quantised while loading, while converting or in memory: the same bits, in any sharding, and refused where it must be."""

import jax
import pytest
from jax.sharding import PartitionSpec as P
from random_checkpoints import GOLDEN, assert_same_model, random_ours
from training import small_training

from chroma_jax import sharding
from chroma_jax.checkpoint import CheckpointError, convert, export, load, params, save
from chroma_jax.config import tiny
from chroma_jax.model.quantized import quantize

KINDS = ["int8", "fp8"]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = tmp_path_factory.mktemp("full") / "converted"
    convert(GOLDEN, directory)
    return directory


@pytest.fixture(scope="module", params=KINDS)
def stored(request, tmp_path_factory):
    """(kind, the directory that convert made)."""
    directory = tmp_path_factory.mktemp("quantised") / request.param
    convert(GOLDEN, directory, quantize=request.param)
    return request.param, directory


def test_every_way_gives_the_same(stored, full, tmp_path):
    kind, directory = stored
    want = quantize(load(GOLDEN).model, kind)
    ways = {
        "converted so": load(directory),
        "quantised while loading ours": load(full, quantize=kind),
        "quantised while loading PyTorch's": load(GOLDEN, quantize=kind),
        "asked for what it is": load(directory, quantize=kind),
    }
    save(tmp_path / "saved", want.cfg, want)
    ways["saved"] = load(tmp_path / "saved")
    for way in ways.values():
        assert way.config == way.model.cfg == want.cfg
        assert way.config.quantized == kind
        assert_same_model(way.model, want)


def test_arithmetic_in_bfloat16_changes_no_quantised_weight(stored):
    kind, directory = stored
    one, other = load(directory, "bfloat16"), load(GOLDEN, "bfloat16", quantize=kind)
    assert one.config == other.config == tiny().with_dtype("bfloat16").with_quantized(kind)
    assert_same_model(one.model, other.model)
    values = "backbone/llama/layers/gate/values"
    assert (
        params.flatten(one.model)[values] == params.flatten(load(directory).model)[values]
    ).all()


@pytest.mark.parametrize("source", ["stored", "full", "torch"])
def test_into_shards(stored, full, source):
    kind, directory = stored
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    path = {"stored": directory, "full": full, "torch": GOLDEN}[source]
    got = load(path, shardings=sharding.param_shardings(mesh), quantize=kind).model
    assert_same_model(got, load(directory).model)
    kernel = got.backbone.llama.layers.attention.o
    assert kernel.values[...].sharding.spec == P(None, "tensor", None, "fsdp")
    assert kernel.scales[...].sharding.spec == P(None, None, None, "fsdp")


def test_one_stage_alone(stored):
    kind, directory = stored
    for path in (directory, GOLDEN):
        model = load(path, stages=("backbone",), quantize=kind).model
        arrays = params.flatten(model)
        assert isinstance(arrays["backbone/head/values"], jax.Array)
        assert isinstance(arrays["decoder/heads/values"], jax.ShapeDtypeStruct)


def test_tied_and_mixed(tmp_path):
    """A tied head is the embedding's eight bits; each part keeps its own dtype."""
    cfg = params.with_tied_head(tiny(), True).with_dtype("bfloat16").with_quantized("int8")
    model = random_ours(cfg.with_quantized(None))
    save(tmp_path / "out", cfg, quantize(model, "int8"))
    got = load(tmp_path / "out")
    assert got.config == cfg
    assert_same_model(got.model, quantize(model, "int8"))


def test_it_is_not_for_training():
    from chroma_jax.training.step import build

    with pytest.raises(ValueError, match="quantised to fp8 cannot be trained"):
        build(tiny().with_quantized("fp8"), small_training.train_config())


def test_refused(stored, full, tmp_path):
    kind, directory = stored
    other = next(k for k in KINDS if k != kind)
    with pytest.raises(CheckpointError, match=f"is quantised to {kind}, which PyTorch"):
        export(directory, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"is quantised to {kind} already; {other} can"):
        load(directory, quantize=other)
    for path in (GOLDEN, full):
        with pytest.raises(ValueError, match="quantize must be int8 or fp8, got 'int4'"):
            load(path, quantize="int4")
    with pytest.raises(CheckpointError, match="quantize must be int8 or fp8; got 'int4'"):
        convert(GOLDEN, tmp_path / "out", quantize="int4")
    assert not (tmp_path / "out").exists()
