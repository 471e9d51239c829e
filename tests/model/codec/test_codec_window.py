"""Beyond the window of 250 positions (10 s): numbers of transformers with it and without it, as tests/data/make_mimi_window.py made them.

Kyutai's code, transformers up to 4.49 and from 5.2 on keep the window; transformers 4.57 to 5.0, with which the public code of
Chroma is pinned, drop it. We keep it, as the codec was trained. Over a whole sequence, a window that is wide enough is none.
"""

import dataclasses
import runpy

import numpy as np
import pytest
from codec_oracle import decode, encode
from conftest import DATA
from flax import nnx
from safetensors.numpy import load_file

from chroma_jax.checkpoint import load_torch
from chroma_jax.model.codec import Codec

MADE = runpy.run_path(str(DATA / "make_mimi_window.py"), run_name="inputs")
BORDER = 125  # frames in 250 positions


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "mimi_window.safetensors")


@pytest.fixture(scope="module")
def codec(golden_dir):
    return load_torch(golden_dir, stages=["codec"])[1].codec


def with_window(codec, window):
    """The same parameters under another window."""
    cfg = dataclasses.replace(codec.cfg, sliding_window=window)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Codec(cfg, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.state(codec))


@pytest.mark.parametrize("which", ["on", "off"])
def test_equals_transformers(codec, golden, which):
    assert codec.cfg.sliding_window == 2 * BORDER
    wave, codes = MADE["inputs"]()
    codec = codec if which == "on" else with_window(codec, 1 << 20)
    np.testing.assert_array_equal(encode(codec, wave), golden[f"{which}/codes"])
    want = golden[f"{which}/wave"]
    got = np.asarray(decode(codec, codes.astype(np.int32)))[:, :: MADE["EVERY"]]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_the_two_part_where_the_window_ends(golden):
    """So that the test above can tell them apart."""
    differ = (golden["on/codes"] != golden["off/codes"])[0].any(axis=-1)
    assert not differ[:BORDER].any() and differ[BORDER:].sum() > 5
    border = BORDER * 1920 // MADE["EVERY"]
    off_by = np.abs(golden["on/wave"] - golden["off/wave"])[0] / np.abs(golden["on/wave"]).max()
    assert off_by[:border].max() < 2e-6 and off_by[border:].max() > 0.05
