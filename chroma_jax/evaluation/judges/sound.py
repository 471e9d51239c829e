"""Recordings as judges hear them: the first channel at its own rate, resampled as each judge's protocol says.

Axes: N samples.
"""

from __future__ import annotations

import functools
import math
import os

import numpy as np

from chroma_jax.audio.wav import AudioError, load_audio

RATE = 16_000  # Hz, of every judge here
_VOICED_SECONDS = 0.1  # less speech than this is none


def read(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """The first channel [N] float32 of a sound file and its rate. Raises AudioError naming a file that cannot be used."""
    import soundfile

    name = os.fspath(path)
    try:
        info = soundfile.info(name)
    except (soundfile.SoundFileError, RuntimeError, OSError, TypeError):
        load_audio(path, RATE)  # says what is wrong with it
        raise
    if info.channels == 1:
        return load_audio(path, info.samplerate), info.samplerate
    samples = soundfile.read(name, dtype="float32", always_2d=True)[0][:, 0]
    return load_audio((samples, info.samplerate), info.samplerate, name=name), info.samplerate


def soxr(samples: np.ndarray, rate: int) -> np.ndarray:
    """To 16 kHz in soxr's high quality."""
    return load_audio((samples, rate), RATE)


def fourier(samples: np.ndarray, rate: int) -> np.ndarray:
    """To 16 kHz through the Fourier transform of the whole clip, as Seed-TTS-eval does before its ASR."""
    if rate == RATE:
        return np.asarray(samples, np.float32)
    from scipy.signal import resample

    return resample(samples, int(len(samples) * RATE / rate)).astype(np.float32)


@functools.cache
def _sinc_kernel(old: int, new: int) -> tuple[np.ndarray, int]:
    """[new, K]: a windowed sinc for each phase, and its reach to the left. Six zero crossings, Hann, cut at 0.99 of Nyquist."""
    crossings = 6
    cut = min(old, new) * 0.99
    reach = math.ceil(crossings * old / cut)
    t = np.arange(0, -new, -1)[:, None] / new + np.arange(-reach, reach + old) / old
    t = np.clip(t * cut, -crossings, crossings)
    return (np.sinc(t) * np.cos(t * np.pi / crossings / 2) ** 2 * cut / old).astype(
        np.float32
    ), reach


def sinc(samples: np.ndarray, rate: int) -> np.ndarray:
    """To 16 kHz by torchaudio's `Resample` with its defaults, as Seed-TTS-eval does before its speaker model."""
    if rate == RATE:
        return np.asarray(samples, np.float32)
    common = math.gcd(rate, RATE)
    old, new = rate // common, RATE // common
    kernel, reach = _sinc_kernel(old, new)
    padded = np.pad(np.asarray(samples, np.float32), (reach, reach + old))
    frames = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[1])[::old]
    return (frames @ kernel.T).reshape(-1)[: math.ceil(new * len(samples) / old)]


def speech_seconds(samples: np.ndarray, rate: int) -> float:
    """Seconds of speech that Silero's detector (which comes with faster-whisper) finds. Raises ValueError without it."""
    try:
        from faster_whisper.vad import VadOptions, get_speech_timestamps
    except ImportError as e:
        raise ValueError(
            "telling speech from noise needs faster-whisper's detector: pip install faster-whisper"
        ) from e
    options = VadOptions(min_silence_duration_ms=100, speech_pad_ms=0)
    # A clip that is silent throughout need not be asked.
    x = soxr(samples, rate)
    if not np.abs(x).max() > 1e-4:
        return 0.0
    found = get_speech_timestamps(x, options)
    return sum(part["end"] - part["start"] for part in found) / RATE


def has_speech(samples: np.ndarray, rate: int) -> bool:
    """Whether there is speech enough to be judged."""
    try:
        return speech_seconds(samples, rate) >= _VOICED_SECONDS
    except AudioError:  # too short to have a sample at 16 kHz
        return False
