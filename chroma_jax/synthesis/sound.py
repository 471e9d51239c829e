"""Clips: trimmed, of one loudness; questions made to differ from each other.

Axes: N samples.
"""

from __future__ import annotations

import functools
import random

import numpy as np
import soxr

from chroma_jax.synthesis.config import SoundConfig

_PEAK = 0.95  # full scale stays out of reach of resampling and coding
_QUIET = 0.01  # of the peak: what is softer at the ends is silence
_STEP = 0.01  # seconds, in which pauses are looked for
_PAUSE = 0.02  # of the loudest step: what is softer is a pause
_LEAST = 0.4  # seconds that a measurement of loudness wants


class SoundlessError(ValueError):
    """A clip with nothing in it."""


def tidy(wave: np.ndarray, rate: int, to: SoundConfig) -> np.ndarray:
    """Samples [N] at `rate` -> float32 at `to.rate`, without silence beyond `to.silence` at its ends, at `to.loudness`.

    Raises SoundlessError where there is nothing to hear.
    """
    wave = np.asarray(wave, np.float32).reshape(-1)
    if not len(wave) or not np.isfinite(wave).all() or np.abs(wave).max() < 1e-4:
        raise SoundlessError("silent")
    if rate != to.rate:
        wave = soxr.resample(wave, rate, to.rate)
    loud = np.flatnonzero(np.abs(wave) > _QUIET * np.abs(wave).max())
    margin = int(to.silence * to.rate)
    wave = wave[max(0, loud[0] - margin) : loud[-1] + 1 + margin]
    measured = _meter(to.rate).integrated_loudness(
        np.pad(wave, (0, max(0, int(_LEAST * to.rate) + 1 - len(wave))))
    )
    if not np.isfinite(measured):
        raise SoundlessError("silent")
    wave = wave * 10 ** ((to.loudness - measured) / 20)
    return (wave * min(1.0, _PEAK / float(np.abs(wave).max()))).astype(np.float32)


def vary(wave: np.ndarray, rng: random.Random, how: SoundConfig) -> np.ndarray:
    """A question [N] as another throat, place or microphone might give it."""
    if how.speed:
        factor = 1 + rng.uniform(-how.speed, how.speed)
        wave = soxr.resample(wave, how.rate * factor, how.rate)
    if how.noise and rng.random() < how.noise:
        noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(len(wave))
        # Between white and brown, as rooms and machines are.
        tilt = rng.random()
        spectrum = np.fft.rfft(noise) / np.maximum(np.arange(len(wave) // 2 + 1), 1) ** tilt
        noise = np.fft.irfft(spectrum, len(wave))
        below = how.noise_db + rng.uniform(0, 25)
        noise *= np.std(wave) / max(float(np.std(noise)), 1e-9) * 10 ** (-below / 20)
        wave = wave + noise
    if how.gain:
        wave = wave * 10 ** (-rng.uniform(0, how.gain) / 20)
    peak = float(np.abs(wave).max())
    return (wave * min(1.0, _PEAK / peak)).astype(np.float32)


def longest_pause(wave: np.ndarray, rate: int) -> float:
    """Seconds of the longest silence between sounds."""
    step = int(_STEP * rate)
    count = len(wave) // step
    if count < 2:
        return 0.0
    level = np.sqrt(np.mean(wave[: count * step].reshape(count, step) ** 2, axis=1))
    loud = np.flatnonzero(level > _PAUSE * level.max())
    return float((np.diff(loud) - 1).max(initial=0) * _STEP)


@functools.cache
def _meter(rate: int):
    try:
        import pyloudnorm
    except ImportError as e:
        raise ValueError("synthesis needs pyloudnorm: pip install 'chroma_jax[synthesis]'") from e
    return pyloudnorm.Meter(rate)
