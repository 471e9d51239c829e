"""After warm-up a live reply compiles nothing, and compiled programs are found again."""

import os
import subprocess
import sys

import jax
import pytest

from chroma_jax import Sampling, compilation_cache
from chroma_jax.engine import caches, programs

PROGRAMS = {
    "prefill": programs.prefill,
    "extend": programs.extend,
    "start": programs.start,
    "beat": programs.beat,
    "grow": caches._grow,
    "cache": programs.empty_reasoner_cache,
}


@pytest.mark.slow
def test_nothing_is_compiled_after_warmup(golden, voice, voice_path):
    sampling = Sampling(temperature=0.7)
    limits = dict(max_seconds=15.0, sampling=sampling)
    seconds = golden.warmup(voice=voice, question_seconds=4.5, **limits)
    assert seconds > 0
    compiled = {name: f._cache_size() for name, f in PROGRAMS.items()}
    wave = voice.wave
    for length in (24000, 24000 * 3, 24000 * 4):
        with golden.stream((wave[:length], 24000), voice=voice, **limits) as stream:
            assert sum(len(chunk.frames) for chunk in stream) > 180
        heard = golden.listen(voice=voice)
        heard.push(wave[:length], 24000)
        assert len(heard.stream(**limits).__next__().frames)
    assert {name: f._cache_size() for name, f in PROGRAMS.items()} == compiled
    with pytest.raises(ValueError, match="question_seconds"):
        golden.warmup(voice=voice, question_seconds=0)


def test_compiled_programs_are_kept(tmp_path):
    program = """
import sys, jax
from chroma_jax import compilation_cache
print(compilation_cache(*sys.argv[1:]))
jax.jit(lambda x: x * 3 + 1)(2.0)
"""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "JAX_PLATFORMS": "cpu"}

    def run(*args, **extra):
        done = subprocess.run(
            [sys.executable, "-c", program, *args],
            env=environment | extra,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert run() == str(tmp_path / "xdg" / "chroma_jax")
    assert any((tmp_path / "xdg" / "chroma_jax").iterdir())
    named = str(tmp_path / "named")
    assert run(JAX_COMPILATION_CACHE_DIR=named) == named
    assert run(str(tmp_path / "given"), JAX_COMPILATION_CACHE_DIR=named) == str(tmp_path / "given")


def test_what_the_program_told_jax_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert compilation_cache() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: no directory"):
        compilation_cache(tmp_path / "file")
    assert jax.config.jax_compilation_cache_dir == before
