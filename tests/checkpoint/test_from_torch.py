"""Loading a PyTorch checkpoint: every number in its place, dtypes, tying, shardings."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from random_checkpoints import (
    GOLDEN,
    assert_same_model,
    mixed_dtype,
    random_tensors,
    read_checkpoint,
    write_checkpoint,
)

from chroma_jax.checkpoint import CheckpointError, convert, export, load_torch, params
from chroma_jax.config import hf, tiny
from chroma_jax.model.chroma import abstract_model

TABLE = "backbone.audio_embedding.embed_audio_tokens.weight"
COPY = "decoder.audio_embedding.embed_audio_tokens.weight"


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(tiny())


def test_numbers_are_where_pytorch_has_them():
    cfg, model = load_torch(GOLDEN)
    t = read_checkpoint(GOLDEN)
    assert cfg == model.cfg
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)

    layer = jax.tree.map(lambda p: p[1], model.reasoner.llama.layers)
    name = "thinker.model.layers.1.self_attn."
    query = jnp.einsum("D,DNH->NH", x, layer.attention.q[...]) + layer.attention.q_bias[...]
    want = t[name + "q_proj.weight"] @ x + t[name + "q_proj.bias"]
    np.testing.assert_allclose(query.reshape(-1), want, rtol=1e-5, atol=1e-5)
    out = jnp.einsum("NH,NHD->D", x.reshape(4, 16), layer.attention.o[...])
    np.testing.assert_allclose(out, t[name + "o_proj.weight"] @ x, rtol=1e-5, atol=1e-5)
    down = t["thinker.model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(layer.down[...], down.T)

    np.testing.assert_array_equal(model.reasoner.head[...], t["thinker.lm_head.weight"].T)
    np.testing.assert_array_equal(model.backbone.audio_embedding[3, 5], t[TABLE][3 * 67 + 5])
    np.testing.assert_array_equal(model.decoder.heads[...], t["decoder.codebook_head.weight"])
    conv = t["thinker.audio_tower.conv1.weight"]
    np.testing.assert_array_equal(model.reasoner.audio_encoder.conv1[...], conv.transpose(2, 1, 0))


def test_none_keeps_what_is_stored_per_part(tmp_path):
    directory = write_checkpoint(tmp_path / "it", random_tensors(tiny(), mixed_dtype), shards=3)
    cfg, model = load_torch(directory)
    assert cfg.reasoner.audio.dtype == cfg.reasoner.audio.param_dtype == "float16"
    assert cfg.reasoner.text.dtype == cfg.reasoner.text.param_dtype == "bfloat16"
    assert cfg.backbone.llama.dtype == cfg.backbone.llama.param_dtype == "float32"
    assert model.cfg == cfg
    t = read_checkpoint(directory)
    declared = params.flatten(abstract_model(cfg))
    for path, leaf in params.flatten(model).items():
        assert leaf.dtype == declared[path].dtype, path
    up = model.backbone.llama.layers.up[...]
    for i in (0, 1):
        want = t[f"backbone.model.layers.{i}.mlp.up_proj.weight"].T.astype(np.float32)
        np.testing.assert_array_equal(up[i], want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_dtype_is_for_all_but_the_codec(tmp_path, dtype):
    directory = write_checkpoint(tmp_path / "it", random_tensors(tiny(), mixed_dtype))
    cfg, model = load_torch(directory, dtype)
    assert cfg.reasoner.text.dtype == cfg.decoder.llama.param_dtype == dtype
    for path, leaf in params.flatten(model).items():
        assert leaf.dtype == ("float32" if path.startswith("codec/") else dtype), path
    head = read_checkpoint(directory)["decoder.codebook_head.weight"]
    want = np.asarray(jnp.asarray(head).astype(dtype))
    np.testing.assert_array_equal(np.asarray(model.decoder.heads[...]), want)


def test_float16_refuses_what_it_cannot_hold(tmp_path, tensors):
    name = "backbone.codebook0_head.weight"
    big = tensors[name].copy()
    big[3, 4] = 1e5
    directory = write_checkpoint(tmp_path / "it", tensors | {name: big})
    with pytest.raises(CheckpointError, match=rf"{name} has values beyond the range of float16"):
        load_torch(directory, "float16")


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_tensors_say_whether_the_head_is_tied(tmp_path, tensors, tied, flag):
    tensors = dict(tensors)
    if tied:
        del tensors["thinker.lm_head.weight"]
    config = hf.write(tiny())
    config["thinker_config"]["tie_word_embeddings"] = flag
    cfg, model = load_torch(write_checkpoint(tmp_path / "it", tensors, config))
    assert cfg.reasoner.tie_embeddings == tied
    assert ("reasoner/head" in params.flatten(model)) != tied
    hidden = jnp.ones(64)
    name = "thinker.model.embed_tokens.weight" if tied else "thinker.lm_head.weight"
    np.testing.assert_allclose(model.reasoner.logits(hidden), tensors[name].sum(1), atol=1e-4)


def test_what_the_public_code_saves_itself(tmp_path):
    """Its `save_pretrained` (transformers 5.0.0rc0) writes the names that the Hub has, but of the two tied tables the Decoder's."""
    tensors = read_checkpoint(GOLDEN)
    assert TABLE in tensors and COPY not in tensors
    tensors[COPY] = tensors.pop(TABLE)
    config = json.loads((GOLDEN / "config.json").read_text())
    directory = write_checkpoint(tmp_path / "it", tensors, config, shards=2)
    assert_same_model(load_torch(directory)[1], load_torch(GOLDEN)[1])
    # Converted and exported it is what the Hub has, which the public code reads and ties.
    convert(directory, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "exported")
    names = {name for name in read_checkpoint(GOLDEN) if not name.startswith("thinker.visual.")}
    assert read_checkpoint(tmp_path / "exported").keys() == names


def test_a_true_copy_of_the_audio_table_is_left_out(tmp_path, tensors):
    directory = write_checkpoint(tmp_path / "it", tensors | {COPY: tensors[TABLE]})
    plain = write_checkpoint(tmp_path / "plain", tensors)
    assert_same_model(load_torch(directory)[1], load_torch(plain)[1])


@pytest.mark.parametrize("change", ["value", "sign_of_zero", "dtype"])
def test_a_false_copy_of_the_audio_table_is_refused(tmp_path, tensors, change):
    table, copy = tensors[TABLE].copy(), tensors[TABLE].copy()
    if change == "value":
        copy[-1, -1] += 1
    elif change == "sign_of_zero":
        table[0, 0], copy[0, 0] = 0.0, -0.0
    else:
        copy = copy.astype(ml_dtypes.bfloat16)
    directory = write_checkpoint(tmp_path / "it", tensors | {TABLE: table, COPY: copy})
    with pytest.raises(CheckpointError, match=f"{COPY} differs from {TABLE}, which it must"):
        load_torch(directory)


def test_a_config_of_other_sizes_is_refused(tmp_path, tensors):
    config = hf.write(tiny())
    config["decoder_config"]["intermediate_size"] = 72
    with pytest.raises(CheckpointError, match="6 problems with its tensors") as e:
        load_torch(write_checkpoint(tmp_path / "it", tensors, config))
    assert (
        "decoder.model.layers.0.mlp.up_proj.weight has shape [64, 32], but the config wants [72, 32]"
        in str(e.value)
    )


def test_nothing_is_read_before_everything_is_checked(tmp_path, tensors, monkeypatch):
    tensors = dict(tensors)
    del tensors["decoder.projection.weight"]
    directory = write_checkpoint(tmp_path / "it", tensors)
    monkeypatch.setattr(
        "chroma_jax.checkpoint.torch_files.read_tensor", lambda _: pytest.fail("read a tensor")
    )
    with pytest.raises(CheckpointError, match=r"missing tensor decoder\.projection\.weight"):
        load_torch(directory)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def by_width(mesh):
    """A function from the abstract model to shardings that cut whatever can be cut."""

    def one(leaf):
        axes = [None] * leaf.ndim
        for i, axis in zip(range(leaf.ndim - 1, -1, -1), ("fsdp", "tensor"), strict=False):
            axes[i] = axis if leaf.shape[i] % mesh.shape[axis] == 0 else None
        return NamedSharding(mesh, P(*axes))

    return lambda abstract: jax.tree.map(one, abstract)


@pytest.mark.parametrize("form", ["function", "tree", "pure_dict", "one"])
def test_parameters_go_where_they_are_told(mesh, form):
    from flax import nnx

    cfg, plain = load_torch(GOLDEN)
    function = by_width(mesh)
    shardings = {
        "function": function,
        "tree": function(abstract_model(cfg)),
        "pure_dict": nnx.to_pure_dict(nnx.split(function(abstract_model(cfg)))[1]),
        "one": NamedSharding(mesh, P()),
    }[form]
    _, model = load_torch(GOLDEN, shardings=shardings)
    assert_same_model(model, plain)
    want = (
        NamedSharding(mesh, P())
        if form == "one"
        else NamedSharding(mesh, P(None, "tensor", "fsdp"))
    )
    assert model.backbone.llama.layers.up[...].sharding == want


def test_a_forgotten_sharding_is_named(mesh):
    from flax import nnx

    tree = nnx.to_pure_dict(nnx.split(by_width(mesh)(abstract_model(tiny())))[1])
    del tree["decoder"]["heads"]
    with pytest.raises(
        ValueError, match="no sharding for 1 parameters, the first is decoder/heads"
    ):
        load_torch(GOLDEN, shardings=tree)


def test_loaded_model_runs_under_jit():
    _, model = load_torch(GOLDEN, "bfloat16")
    frames = jnp.zeros((1, 3, 8), jnp.int32)
    run = jax.jit(lambda m, f: m.backbone.logits(m.backbone.llama(m.backbone.embed_frames(f))))
    assert np.isfinite(run(model, frames)).all()


def test_golden_config_is_what_the_file_says():
    cfg, _ = load_torch(GOLDEN)
    said = json.loads((GOLDEN / "config.json").read_text())
    assert cfg.im_end_token_id == said["im_end_token_id"]
