"""A small corpus, and datasets made of it with the tiny checkpoint."""

import dataclasses

import jax
import numpy as np
import pytest
from corpus import OPTIONS, write_corpus

from chroma_jax.audio.wav import load_audio
from chroma_jax.data.prepare import prepare


@pytest.fixture(scope="session")
def clip(voice_path, question_path):
    """Thirteen seconds of speech at 24 kHz."""
    return np.concatenate([load_audio(voice_path, 24000), load_audio(question_path, 24000)])


@pytest.fixture(scope="session")
def manifest(tmp_path_factory, clip):
    """Ten rows of three speakers and a nameless one."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), clip)


@pytest.fixture(scope="session")
def one_device():
    """Batches on one device: eight virtual ones would share two cores."""
    return jax.devices()[:1]


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory, manifest, golden_dir, one_device):
    """The corpus, prepared."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    prepare(manifest, golden_dir, out, OPTIONS, devices=one_device)
    return out


@pytest.fixture(scope="session")
def hidden_dir(tmp_path_factory, manifest, golden_dir, one_device):
    """The corpus, prepared with Reasoner states."""
    out = tmp_path_factory.mktemp("prepared") / "hidden"
    options = dataclasses.replace(OPTIONS, precompute_hidden=True, hidden_dtype="float32")
    prepare(manifest, golden_dir, out, options, devices=one_device)
    return out
