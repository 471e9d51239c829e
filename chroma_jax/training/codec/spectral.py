"""Short-time spectra of waveforms, and the distance of two waveforms by their mel spectra at several resolutions.

Axes: B batch, N samples, T frames, F frequency bins, M mel bins. Source: DAC (arXiv 2306.06546, section 3.4): the mean over
resolutions of L1 between log mel magnitudes plus L1 between mel magnitudes.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_FLOOR = 1e-5  # of a mel magnitude before its logarithm
_OVERLAP = 4  # windows that cover a sample


def stft(wave: jax.Array, window: int) -> jax.Array:
    """Waveforms [B, N] -> complex spectra [B, T, F], F = window / 2 + 1, by a Hann window every window / 4 samples.

    The first frame is centred on sample 0: half a window of zeros stands before and behind the waveform. Scaled by the
    window's root of energy, so that noise of unit power has bins of unit power at every resolution.
    """
    hop = window // _OVERLAP
    half = window // 2
    wave = jnp.pad(wave.astype(jnp.float32), ((0, 0), (half, half + -wave.shape[1] % hop)))
    # Frames by shifts of blocks: no gather, and no scatter in the gradient.
    blocks = wave.reshape(wave.shape[0], -1, hop)
    frames = blocks.shape[1] - _OVERLAP + 1
    parts = [blocks[:, i : i + frames] for i in range(_OVERLAP)]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    hann = (hann / np.sqrt((hann**2).sum())).astype(np.float32)
    return jnp.fft.rfft(jnp.concatenate(parts, axis=-1) * hann)


@functools.lru_cache(maxsize=32)
def mel_filters(sampling_rate: int, window: int, num_bins: int) -> np.ndarray:
    """[F, M] triangles, equally wide in mel (2595 log10(1 + f / 700)) from 0 to half the rate, peak 1."""

    def mel(f):
        return 2595 * np.log10(1 + np.asarray(f) / 700)

    edges = np.linspace(0, mel(sampling_rate / 2), num_bins + 2)
    edges = 700 * (10 ** (edges / 2595) - 1)
    f = np.linspace(0, sampling_rate / 2, window // 2 + 1)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (f - low) / (middle - low), (high - f) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def mel_magnitudes(wave: jax.Array, window: int, num_bins: int, sampling_rate: int) -> jax.Array:
    """Waveforms [B, N] -> mel magnitudes [B, T, M]."""
    spectra = stft(wave, window)
    # The root's slope is infinite at 0, which digital silence reaches.
    magnitudes = jnp.sqrt(spectra.real**2 + spectra.imag**2 + 1e-12)
    return magnitudes @ mel_filters(sampling_rate, window, num_bins)


def mel_bins(window: int) -> int:
    """How many mel bins a window gets: fine ones where it resolves them (5 of 32 samples to 160 of 2048)."""
    return max(5, round(5 * 2 ** (5 / 6 * math.log2(window / 32))))


def mel_distance(
    made: jax.Array, wanted: jax.Array, windows: tuple[int, ...], sampling_rate: int
) -> jax.Array:
    """Waveforms [B, N] twice -> [B] float32: L1 of log10 mel magnitudes plus L1 of mel magnitudes, mean over windows."""
    total = jnp.zeros(made.shape[0], jnp.float32)
    for window in windows:
        a, b = (mel_magnitudes(x, window, mel_bins(window), sampling_rate) for x in (made, wanted))
        logs = [jnp.log10(jnp.maximum(x, _FLOOR)) for x in (a, b)]
        total += jnp.abs(logs[0] - logs[1]).mean((1, 2)) + jnp.abs(a - b).mean((1, 2))
    return total / len(windows)
