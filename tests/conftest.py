"""Tests run on eight virtual CPU devices, in float32, with matrix products in full precision."""

import gc
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import pytest


def pytest_configure(config):
    """Quick compilation unless XLA_FLAGS says otherwise: tests compile for minutes and run for seconds.

    The programs are the same, less optimised (3 CPU-seconds instead of 20 for those of one reply). The slow tests, which compute
    at real sizes, and `make test-slow`'s second run of the parity tests, take XLA as users have it.
    """
    if "slow" not in (config.option.markexpr or "").replace("not slow", ""):
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        )


jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# Tests compile far more than they run: compilations are kept between tests, workers and runs.
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="module", autouse=True)
def forget_compilations():
    """Lets go of a module's programs: a process that keeps hundreds of them runs out of memory maps, and XLA crashes."""
    yield
    jax.clear_caches()
    gc.collect()


DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """A tiny checkpoint in the Hub's layout."""
    return DATA / "chroma-tiny"


@pytest.fixture(scope="session")
def cases(golden_dir):
    """Numbers that the public PyTorch code produced from it: "case/name" -> array."""
    from safetensors.numpy import load_file

    return load_file(golden_dir / "cases.safetensors")


@pytest.fixture(scope="session")
def golden(golden_dir):
    """The tiny checkpoint, loaded: `chroma_jax.Chroma`."""
    from chroma_jax import Chroma

    return Chroma.from_pretrained(golden_dir, layers="stacked")


@pytest.fixture(scope="session")
def voice_path() -> pathlib.Path:
    """A LibriVox reader (public domain), 16 kHz."""
    return DATA / "voice_librivox_0870.wav"


@pytest.fixture(scope="session")
def voice_text() -> str:
    """What `voice_path` says."""
    return "and mister john dashwood had then leisure to consider how much there might be prudently in his power to do for them"


@pytest.fixture(scope="session")
def voice(voice_path, voice_text):
    """That recording as a `Voice`."""
    from chroma_jax import Voice

    return Voice(voice_path, voice_text)


@pytest.fixture(scope="session")
def question_path() -> pathlib.Path:
    """Three seconds of speech to use as a question."""
    return DATA / "voice_librivox_0920.wav"
