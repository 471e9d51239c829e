"""The codec against numbers that the PyTorch reference computed from the golden checkpoint."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from codec_oracle import decode, encode, export, load_codec, place
from flax import nnx
from safetensors.numpy import load_file

from chroma_jax.config import hf
from chroma_jax.model.codec import Codec

DATA = Path(__file__).parents[2] / "data" / "chroma-tiny"


@pytest.fixture(scope="module")
def cfg():
    return hf.read(json.loads((DATA / "config.json").read_text())).codec


@pytest.fixture(scope="module")
def tensors():
    everything = load_file(DATA / "model.safetensors")
    return {name: t for name, t in everything.items() if name.startswith("codec_model.")}


@pytest.fixture(scope="module")
def codec(cfg, tensors):
    return load_codec(cfg, tensors)


@pytest.fixture(scope="module")
def case():
    cases = load_file(DATA / "cases.safetensors")
    return {
        name.removeprefix("codec/"): v for name, v in cases.items() if name.startswith("codec/")
    }


def test_encode_gives_the_golden_codes(codec, case):
    got = encode(codec, case["wave"][:, 0])
    np.testing.assert_array_equal(got, case["codes"].transpose(0, 2, 1))


def test_decode_gives_the_golden_wave(codec, case):
    want = case["decoded_wave"][:, 0]
    got = np.asarray(decode(codec, case["decode_codes"].transpose(0, 2, 1)))
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_every_tensor_has_one_place_and_comes_back_bit_identical(cfg, tensors):
    state = nnx.state(nnx.eval_shape(lambda: Codec(cfg, rngs=nnx.Rngs(0))))
    params, empty = place(tensors, {"codec": nnx.to_pure_dict(state)})
    assert not empty
    assert sum(v.size for v in jax.tree.leaves(params)) == sum(t.size for t in tensors.values())
    for name, tensor in export(params, tensors).items():
        np.testing.assert_array_equal(
            tensor.view(np.int32), tensors[name].view(np.int32), err_msg=name
        )
