"""Clips of one loudness without silence around them; questions that differ."""

import random

import numpy as np
import pyloudnorm
import pytest

from chroma_jax.synthesis import sound
from chroma_jax.synthesis.config import SoundConfig

RATE = 16000


def tone(seconds: float, level: float = 0.1) -> np.ndarray:
    return level * np.sin(2 * np.pi * 300 * np.arange(int(seconds * RATE)) / RATE)


@pytest.mark.parametrize("level", [0.002, 0.1, 0.9])
@pytest.mark.parametrize("rate", [16000, 24000])
def test_tidy(level, rate):
    silence = np.zeros(RATE)
    how = SoundConfig(rate=rate, loudness=-23.0, silence=0.1)
    wave = sound.tidy(np.concatenate([silence, tone(1.5, level), silence]), RATE, how)
    assert wave.dtype == np.float32
    assert len(wave) / rate == pytest.approx(1.7, abs=0.01)
    assert pyloudnorm.Meter(rate).integrated_loudness(wave) == pytest.approx(-23, abs=0.3)


def test_tidy_keeps_off_full_scale():
    click = np.concatenate([tone(1, 0.01), [0.9], tone(1, 0.01)])
    assert np.abs(sound.tidy(click, RATE, SoundConfig(rate=RATE, loudness=-12.0))).max() <= 0.951


@pytest.mark.parametrize("wave", [np.zeros(8000), np.zeros(0), np.full(100, np.nan)], ids=["zeros", "empty", "nan"])  # fmt: skip
def test_tidy_refuses_what_cannot_be_heard(wave):
    with pytest.raises(sound.SoundlessError):
        sound.tidy(wave, RATE, SoundConfig())


def test_vary_is_drawn_by_its_seed():
    how = SoundConfig(rate=RATE, speed=0.1, noise=1.0, gain=12.0)
    wave = tone(1).astype(np.float32)
    first, again, other = (sound.vary(wave, random.Random(seed), how) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert len(first) != len(other)
    assert 0.88 < len(first) / len(wave) < 1.12


def test_noise_is_as_soft_as_asked():
    wave = tone(2).astype(np.float32)
    how = SoundConfig(rate=RATE, noise=1.0, noise_db=10.0)
    for seed in range(5):
        noise = sound.vary(wave, random.Random(seed), how) - wave
        below = 20 * np.log10(np.std(wave) / np.std(noise))
        assert 9.9 < below < 35.1


@pytest.mark.parametrize("gap", [0.0, 0.3, 1.2])
def test_longest_pause(gap):
    wave = np.concatenate([np.zeros(4000), tone(0.5), np.zeros(int(gap * RATE)), tone(0.5)])
    assert sound.longest_pause(wave, RATE) == pytest.approx(gap, abs=0.021)
