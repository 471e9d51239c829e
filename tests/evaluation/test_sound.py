"""How judges read and resample: the first channel, and tones that keep their size."""

import numpy as np
import pytest
import soundfile

from chroma_jax.audio.wav import AudioError
from chroma_jax.evaluation.judges import sound


def tone(rate, seconds=0.5, hertz=440.0):
    return np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100, 48000])
@pytest.mark.parametrize("resample", [sound.sinc, sound.fourier, sound.soxr])
def test_a_tone_stays_a_tone(resample, rate):
    found = resample(tone(rate), rate)
    assert abs(len(found) - 8000) <= 1
    middle = slice(2000, 6000)
    np.testing.assert_allclose(found[middle], tone(16000)[middle], atol=0.012)


def test_sinc_is_torchaudios_kernel():
    """Numbers of torchaudio's `_get_sinc_resample_kernel(24000, 16000, 8000)`: written out from its formula in float64."""
    kernel, reach = sound._sinc_kernel(3, 2)
    t = np.clip((np.arange(-reach, reach + 3) / 3) * 2 * 0.99, -6, 6) * np.pi
    with np.errstate(invalid="ignore"):
        want = np.where(t == 0, 1, np.sin(t) / t) * np.cos(t / 12) ** 2 * 2 * 0.99 / 3
    assert kernel.shape == (2, 2 * reach + 3)
    assert reach == 10
    np.testing.assert_allclose(kernel[0], want, atol=1e-7)
    np.testing.assert_allclose(kernel.sum(1), 1, atol=5e-3)


def test_the_first_channel_is_read(tmp_path):
    left, right = tone(24000), tone(24000, hertz=1000.0)
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], 1), 24000, subtype="FLOAT")
    samples, rate = sound.read(tmp_path / "two.wav")
    assert rate == 24000
    np.testing.assert_array_equal(samples, left)


@pytest.mark.parametrize("make", [None, b"", b"no sound at all" * 99], ids=["absent", "empty", "text"])  # fmt: skip
def test_files_that_cannot_be_read_are_named(tmp_path, make):
    path = tmp_path / "some.wav"
    if make is not None:
        path.write_bytes(make)
    with pytest.raises(AudioError, match="some.wav"):
        sound.read(path)
