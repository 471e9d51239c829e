"""The rule table over the whole model, meshes, and loading straight into shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax import checkpoint, sharding
from chroma_jax.checkpoint.params import flatten
from chroma_jax.config import chroma_4b, tiny
from chroma_jax.model.chroma import abstract_model
from chroma_jax.model.kv_cache import init_cache

SPECS = {
    "backbone/llama/layers/attention/q": P(None, "fsdp", "tensor", None),
    "backbone/llama/layers/attention/k": P(None, "fsdp", "tensor", None),
    "backbone/llama/layers/attention/o": P(None, "tensor", None, "fsdp"),
    "backbone/llama/layers/gate": P(None, "fsdp", "tensor"),
    "backbone/llama/layers/down": P(None, "tensor", "fsdp"),
    "backbone/llama/layers/mlp_norm/scale": P(),
    "backbone/llama/norm/scale": P(),
    "backbone/audio_embedding": P(None, None, "fsdp"),
    "backbone/head": P("fsdp", None),
    "decoder/heads": P(None, "fsdp", None),
    "decoder/projection": P("fsdp", None),
    "decoder/llama/layers/up": P(None, "fsdp", "tensor"),
    "reasoner/embedding": P("tensor", "fsdp"),
    "reasoner/head": P("fsdp", "tensor"),
    "reasoner/llama/layers/attention/q_bias": P(),
    "reasoner/audio_encoder/layers/v": P(None, "fsdp", "tensor", None),
    "reasoner/audio_encoder/layers/o": P(None, "tensor", None, "fsdp"),
    "reasoner/audio_encoder/layers/up": P(None, "fsdp", "tensor"),
    "reasoner/audio_encoder/conv1": P(None, None, "fsdp"),
    "codec/decoder/layers/0/kernel": P(),
    "codec/encoder_transformer/layers/q": P(),
}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize("config", [tiny(), chroma_4b()], ids=["tiny", "chroma_4b"])
def test_every_parameter_has_a_rule_and_the_expected_spec(config, mesh):
    model = abstract_model(config)
    specs = {path: s.spec for path, s in flatten(sharding.param_shardings(mesh)(model)).items()}
    assert set(specs) == set(flatten(model))
    assert {path: specs[path] for path in SPECS} == SPECS


def test_no_large_parameter_of_the_published_model_is_whole_on_a_device(mesh):
    """All but the Codec: anything beyond a million weights is split."""
    model = abstract_model(chroma_4b())
    for path, leaf in flatten(model).items():
        if leaf.size > 2**20 and not path.startswith("codec/"):
            assert "fsdp" in sharding.spec_of(path, leaf.shape, mesh), path


def test_rules_are_all_used(mesh):
    used = {sharding._rule_for(path) for path in flatten(abstract_model(tiny()))}
    assert used == set(sharding.RULES)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("opt_state/1/0/mu/backbone/llama/layers/gate", (2, 64, 128), P(None, "fsdp", "tensor")),
        ("params/decoder/projection", (64, 32), P("fsdp", None)),
        ("opt_state/1/0/count", (), P()),
        ("backbone/llama/layers/attention/q/lora_a", (2, 64, 4), P(None, "fsdp", None)),
        ("backbone/llama/layers/attention/q/lora_b", (2, 4, 4, 16), P(None, None, "tensor", None)),
        ("backbone/llama/layers/attention/o/lora_a", (2, 4, 16, 4), P(None, "tensor", None, None)),
        ("backbone/llama/layers/attention/o/lora_b", (2, 4, 64), P(None, None, "fsdp")),
        ("decoder/llama/layers/down/lora_b", (2, 4, 32), P(None, None, "fsdp")),
    ],
)
def test_spec_of(path, shape, spec, mesh):
    assert sharding.spec_of(path, shape, mesh) == spec


def test_no_rule():
    with pytest.raises(ValueError, match="no sharding rule for parameter backbone/gates"):
        sharding.spec_of("backbone/gates", (2, 3), sharding.make_mesh({"data": 8}))


def test_kv_heads_repeat_and_others_are_an_error():
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    spec = sharding.spec_of("decoder/llama/layers/attention/k", (2, 32, 2, 8), mesh)
    assert spec == P(None, "fsdp", None, None)
    with pytest.raises(
        ValueError, match=r"attention/q \(2, 32, 6, 8\): mesh axis tensor of size 4"
    ):
        sharding.spec_of("decoder/llama/layers/attention/q", (2, 32, 6, 8), mesh)
    with pytest.raises(ValueError, match="mesh axis fsdp of size 8 does not divide 60"):
        sharding.spec_of("backbone/head", (60, 67), sharding.make_mesh({"fsdp": 8}))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({"data": 8}, (8, 1, 1)),
        ({"data": -1, "tensor": 2}, (4, 1, 2)),
        ({"fsdp": 4, "tensor": -1}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_make_mesh(shape, sizes):
    mesh = sharding.make_mesh(shape)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == sizes
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "data 3 x fsdp 1 x tensor 1 has 3 places for 8 devices"),
        ({"data": 16}, "16 places for 8 devices"),
        ({"data": -1, "tensor": 3}, "3 does not divide the 8 devices"),
        ({"model": 8}, "unknown mesh axis 'model'; the axes are data, fsdp, tensor"),
        ({"data": -1, "fsdp": -1}, "only one mesh axis may be -1, got data and fsdp"),
        ({"data": 0}, "mesh axis data must have size 1 or more"),
        ({"data": -2}, "mesh axis data must have size 1 or more"),
    ],
)
def test_make_mesh_refuses(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape)


def test_loading_into_shards(golden_dir, mesh):
    model = checkpoint.load(golden_dir, shardings=sharding.param_shardings(mesh)).model
    whole = flatten(checkpoint.load(golden_dir).model)
    for path, leaf in flatten(model).items():
        assert leaf.sharding == NamedSharding(mesh, sharding.spec_of(path, leaf.shape, mesh)), path
        np.testing.assert_array_equal(leaf, whole[path])
    q = model.backbone.llama.layers.attention.q[...]
    assert q.addressable_shards[0].data.shape == (2, 32, 2, 16)


def test_constrain(mesh):
    x = jnp.zeros((4, 6))
    assert sharding.constrain(x, sharding.ROWS) is x
    pin = jax.jit(lambda x: sharding.constrain(x + 1, sharding.ROWS))
    assert len(pin(x).sharding.device_set) == 1
    with jax.set_mesh(mesh):
        assert pin(x).sharding.spec == sharding.ROWS
        assert pin(jnp.zeros((3, 6))).sharding.is_fully_replicated  # 4 parts do not divide 3 rows


def test_cache_shardings(mesh):
    cache = nnx.eval_shape(lambda: init_cache(tiny().backbone.llama, 4, 16))
    got = sharding.cache_shardings(cache, mesh)
    assert got.k.spec == got.v.spec == P(None, ("data", "fsdp"), None, "tensor")
    assert got.length.spec == P(("data", "fsdp"))
