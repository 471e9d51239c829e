"""A Codec in Mimi's own layout: there and back, and in transformers' MimiModel."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from model.codec.codec_oracle import small_config
from model.random_weights import randomise
from transformers import MimiModel

from chroma_jax.checkpoint.codec_files import load_codec, read_codec_config, save_codec
from chroma_jax.checkpoint.params import flatten
from chroma_jax.config import mini_codec
from chroma_jax.model.codec import Codec


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    cfg = small_config()
    codec = randomise(Codec(cfg, rngs=nnx.Rngs(0)))
    directory = tmp_path_factory.mktemp("codec") / "mimi"
    save_codec(directory, cfg, codec)
    return cfg, codec, directory


def test_there_and_back(saved):
    cfg, codec, directory = saved
    read, loaded = load_codec(directory)
    assert read == cfg == read_codec_config(directory)
    want, got = flatten(codec), flatten(loaded)
    assert got.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(got[path], array, err_msg=path)


def test_transformers_gives_the_same_codes_and_sound(saved):
    cfg, codec, directory = saved
    model = MimiModel.from_pretrained(directory).eval()
    wave = (0.3 * np.random.default_rng(0).normal(size=(2, 5 * cfg.frame_samples))).astype("f")
    with torch.no_grad():
        theirs = model.encode(torch.as_tensor(wave[:, None])).audio_codes
        sound = model.decode(theirs).audio_values[:, 0].numpy()
    codes = np.asarray(jax.jit(Codec.encode)(codec, wave))
    np.testing.assert_array_equal(codes, theirs.numpy().transpose(0, 2, 1))
    np.testing.assert_allclose(jax.jit(Codec.decode)(codec, codes), sound, atol=1e-4)


def test_what_exists_is_kept(saved):
    cfg, codec, directory = saved
    with pytest.raises(ValueError, match="exists"):
        save_codec(directory, cfg, codec)
    save_codec(directory, cfg, codec, overwrite=True)
    assert load_codec(directory)[0] == cfg


def test_what_is_no_codec(saved, tmp_path, golden_dir):
    with pytest.raises(ValueError, match="model_type"):
        load_codec(golden_dir)
    directory = saved[2]
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.2"):
        load_codec(tmp_path)


def test_the_small_codec_is_small():
    shapes = flatten(nnx.eval_shape(lambda: Codec(mini_codec(), rngs=nnx.Rngs(0))))
    count = sum(a.size for a in shapes.values())
    assert 3.0e6 < count < 3.3e6
    assert mini_codec().frame_samples == 1920
