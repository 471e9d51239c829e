"""The table of tensors: complete, reversible, and strict."""

import dataclasses
import re

import numpy as np
import pytest
import safetensors.numpy
from random_checkpoints import GOLDEN, random_tensors

from chroma_jax.checkpoint import params
from chroma_jax.checkpoint.torch_table import (
    ROWS,
    CheckpointError,
    leaf_for,
    make_plan,
    under_table_names,
)
from chroma_jax.checkpoint.transforms import TRANSFORMS
from chroma_jax.config import hf, tiny
from chroma_jax.model.chroma import abstract_model


def wanted(cfg=None):
    return params.flatten(abstract_model(cfg or tiny()))


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(tiny())


def test_golden_checkpoint_is_assigned_completely_and_once():
    tensors = safetensors.numpy.load_file(GOLDEN / "model.safetensors")
    plan = make_plan(tensors, wanted(hf.load(GOLDEN / "config.json")))
    used = [name for leaf in plan.leaves for name in leaf.names]
    assert len(used) == len(set(used))
    assert set(used) | set(plan.skipped) == set(tensors)
    assert all(name.startswith("thinker.visual.") for name in plan.skipped)


def test_rows_read_forwards_and_backwards_alike(tensors):
    home = {name: path for path, p in wanted().items() for name in leaf_for(path, p.shape).names}
    assert home.keys() == tensors.keys()
    for name, path in home.items():
        matches = [(row, m) for row in ROWS if (m := re.fullmatch(row.torch, name))]
        assert len(matches) == 1, name
        assert matches[0][1].expand(matches[0][0].path) == path


def test_every_row_is_of_use():
    codec = dataclasses.replace(tiny().codec, use_conv_shortcut=True)
    names = random_tensors(dataclasses.replace(tiny(), codec=codec))
    for row in ROWS:
        assert row.path is None or any(re.fullmatch(row.torch, name) for name in names), row.torch


LAYOUTS = {
    "same": ((2, 3), lambda t, i: t[i]),
    "joined": ((4, 3), lambda t, i: t[i[0] * 3 + i[1]]),
    "table": ((4, 3, 5), lambda t, i: t[i[0] * 3 + i[1], i[2]]),
    "linear": ((6, 4, 3), lambda t, i: t[i[1] * 3 + i[2], i[0]]),
    "linear_in": ((4, 3, 6), lambda t, i: t[i[2], i[0] * 3 + i[1]]),
    "conv": ((3, 4, 5), lambda t, i: t[i[2], i[1], i[0]]),
    "conv_transpose": ((5, 2, 3, 4), lambda t, i: t[i[0], i[3], i[1] * 3 + i[2]]),
    "pointwise": ((4, 5), lambda t, i: t[i[1], i[0], 0]),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((n, n) for n in LAYOUTS), ("conv_either", "conv"), ("conv_either", "conv_transpose")],
)
def test_transform_moves_each_number_where_it_belongs_and_back(name, layout):
    transform, (shape, element) = TRANSFORMS[name], LAYOUTS[layout]
    torch_shape = transform.torch_shape(shape)
    torch = np.arange(np.prod(shape)).reshape(torch_shape)
    ours = transform.to_ours(torch, shape)
    assert ours.shape == shape
    for index in np.ndindex(*shape):
        assert ours[index] == element(torch, index)
    np.testing.assert_array_equal(transform.to_torch(ours, torch_shape), torch)


def test_every_transform_is_tested():
    assert TRANSFORMS.keys() == LAYOUTS.keys() | {"conv_either"}


def drop(tensors):
    del tensors["thinker.model.norm.weight"]


def drop_layer(tensors):
    del tensors["backbone.model.layers.1.mlp.up_proj.weight"]


def add(tensors):
    tensors["thinker.talker.weight"] = np.zeros(3, np.float32)


def deepen(tensors):
    name = "decoder.model.layers.{}.input_layernorm.weight"
    tensors[name.format(2)] = tensors[name.format(1)]


def reshape(tensors):
    tensors["decoder.projection.weight"] = tensors["decoder.projection.weight"].T


def retype(tensors):
    tensors["thinker.model.norm.weight"] = tensors["thinker.model.norm.weight"].astype(np.float64)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, r"^it: missing tensor thinker\.model\.norm\.weight \[64\]$"),
        (
            drop_layer,
            r"^it: missing tensor backbone\.model\.layers\.1\.mlp\.up_proj\.weight \[128, 64\]$",
        ),
        (add, r"^it: unknown tensor thinker\.talker\.weight: no part of Chroma$"),
        (deepen, r"^it: unknown tensor decoder\.model\.layers\.2\..*: not part of the model"),
        (
            reshape,
            r"^it: tensor decoder\.projection\.weight has shape \[64, 32\], .* wants \[32, 64\]$",
        ),
        (retype, r"^it: tensor thinker\.model\.norm\.weight has dtype float64; float32, "),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_one_problem_is_one_line(tensors, spoil, message):
    tensors = dict(tensors)
    spoil(tensors)
    with pytest.raises(CheckpointError) as e:
        make_plan(tensors, wanted(), "it")
    assert re.search(message, str(e.value))
    assert "\n" not in str(e.value)


def test_all_problems_are_told_together(tensors):
    tensors = dict(tensors)
    for spoil in (drop, add, reshape):
        spoil(tensors)
    with pytest.raises(CheckpointError) as e:
        make_plan(tensors, wanted(), "it")
    lines = str(e.value).splitlines()
    assert lines[0] == "it: 3 problems with its tensors:"
    assert len(lines) == 4


def test_a_long_list_is_cut():
    with pytest.raises(CheckpointError) as e:
        make_plan({}, wanted(), "it")
    lines = str(e.value).splitlines()
    assert len(lines) == 7
    count = len(random_tensors(tiny()))
    assert lines[0] == f"it: {count} problems with its tensors:"
    assert lines[-1].strip() == f"... and {count - 5} more"


@pytest.mark.parametrize(
    "name",
    [
        "thinker.visual.blocks.0.attn.q.weight",
        "thinker.model.rotary_emb.inv_freq",
        "backbone.model.rotary_emb.original_inv_freq",
        "thinker.audio_tower.positional_embedding.positional_embedding",
        "codec_model.decoder_transformer.layers.0.self_attn.rotary_emb.inv_freq",
    ],
)
def test_what_is_not_ours_is_left_out(tensors, name):
    plan = make_plan(tensors | {name: np.zeros(2, np.float32)}, wanted())
    assert list(plan.skipped) == [name]


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.{}.{}",
        "module.{}.{}",
        "module._orig_mod.{}.{}",
        "{}._orig_mod.{}",
        "_fsdp_wrapped_module.{}._fsdp_wrapped_module.{}",
    ],
)
def test_wrappers_names_are_taken_off(tensors, wrapped):
    given = {wrapped.format(*name.split(".", 1)): x for name, x in tensors.items()}
    assert under_table_names(given) == tensors


def test_two_tensors_of_one_name_are_refused(tensors):
    with pytest.raises(
        CheckpointError, match=r"^two tensors are thinker\.lm_head\.weight, one of th"
    ):
        under_table_names(tensors | {"module.thinker.lm_head.weight": None})


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="reasoner/novelty matches 0 rows"):
        leaf_for("reasoner/novelty", (3,))
