"""A dataset of six spoken questions and answers, made with the tiny checkpoint."""

import dataclasses

import jax
import numpy as np
import pytest
from data_pipeline.corpus import OPTIONS, write_corpus

from chroma_jax.audio.wav import load_audio
from chroma_jax.data.prepare import prepare


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, voice_path, golden_dir):
    folder = tmp_path_factory.mktemp("training")
    clip = load_audio(voice_path, 24000)
    heard = {f"row{i}": {"question": "q0.wav"} for i in (1, 4)}  # no row without sound
    manifest = write_corpus(folder / "corpus", np.concatenate([clip, clip]), count=6, **heard)
    options = dataclasses.replace(OPTIONS, shard_size=6)
    prepare(manifest, golden_dir, folder / "set", options, devices=jax.devices()[:1])
    return folder / "set"
