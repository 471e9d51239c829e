"""Spectra and mel distances against PyTorch's STFT and loops."""

import functools

import jax
import numpy as np
import pytest
import torch

from chroma_jax.training.codec import spectral

RATE = 24000


@functools.partial(jax.jit, static_argnums=2)
def distance(made, wanted, windows):
    return spectral.mel_distance(made, wanted, windows, RATE)


def waves(rows, size, seed):
    rng = np.random.default_rng(seed)
    return (0.3 * rng.normal(size=(rows, size))).astype(np.float32)


def torch_stft(wave, window):
    """[B, F, T] complex, of the wave filled up to whole hops."""
    hop = window // 4
    wave = torch.nn.functional.pad(torch.as_tensor(wave), (0, -wave.shape[1] % hop))
    hann = torch.hann_window(window, periodic=True)
    spectra = torch.stft(
        wave, window, hop, window=hann, center=True, pad_mode="constant", return_complex=True
    )
    return spectra / torch.sqrt((hann**2).sum())


@pytest.mark.parametrize(("size", "window"), [(960, 64), (1000, 64), (960, 256), (50, 128)])
def test_stft_is_torchs(size, window):
    wave = waves(2, size, 0)
    got = np.asarray(spectral.stft(wave, window))
    want = torch_stft(wave, window).numpy().transpose(0, 2, 1)
    np.testing.assert_allclose(got, want, atol=2e-5)


def mel_by_hand(rate, window, bins):
    """A triangle at a time, a bin at a time."""
    to_hz = lambda m: 700 * (10 ** (m / 2595) - 1)  # noqa: E731
    top = 2595 * np.log10(1 + rate / 2 / 700)
    out = np.zeros((window // 2 + 1, bins))
    for m in range(bins):
        low, middle, high = (to_hz(top * (m + i) / (bins + 1)) for i in range(3))
        for k in range(window // 2 + 1):
            f = k * rate / window
            if low < f <= middle:
                out[k, m] = (f - low) / (middle - low)
            elif middle < f < high:
                out[k, m] = (high - f) / (high - middle)
    return out


def test_mel_filters():
    np.testing.assert_allclose(
        spectral.mel_filters(RATE, 256, 20), mel_by_hand(RATE, 256, 20), atol=1e-5
    )


def test_mel_bins_grow_with_the_window():
    assert [spectral.mel_bins(w) for w in (16, 32, 2048)] == [5, 5, 160]


def test_mel_distance_against_torch():
    """Over two windows, with a silent stretch in both and one in the made sound alone."""
    made, wanted = waves(2, 1200, 1), waves(2, 1200, 2)
    made[0, 300:900] = wanted[0, 300:900] = 0
    made[1, :500] = 0
    windows = (64, 256)
    got = np.asarray(distance(made, wanted, windows))
    want = np.zeros(2)
    for window in windows:
        filters = torch.as_tensor(mel_by_hand(RATE, window, spectral.mel_bins(window))).float()
        a, b = (torch_stft(x, window).abs().transpose(1, 2) @ filters for x in (made, wanted))
        log = lambda x: torch.log10(torch.clamp(x, min=1e-5))  # noqa: E731
        want += ((log(a) - log(b)).abs().mean((1, 2)) + (a - b).abs().mean((1, 2))).numpy()
    np.testing.assert_allclose(got, want / len(windows), rtol=2e-3)
    assert got[0] > 0.1


def test_the_distance_has_a_gradient_in_silence():
    silence = np.zeros((1, 480), np.float32)
    gradient = jax.jit(jax.grad(lambda x: distance(x, waves(1, 480, 3), (64,)).sum()))
    assert np.isfinite(np.asarray(gradient(silence))).all()
    same = waves(1, 480, 4)
    assert float(distance(same, same, (64,))[0]) == 0
