"""The speaker encoder of Resemblyzer (GE2E, 1.4 M weights, Apache-2.0) in JAX, on the weights of its wheel alone.

Axes: B windows, T frames, D 256 values of a voice, N samples.

Source: Wan et al., "Generalized End-to-End Loss for Speaker Verification", and the wheel's own settings. Its trimming of long
silences (webrtcvad) is left out.
"""

from __future__ import annotations

import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.evaluation.judges import MissingJudge, pickles, sound, weights_digest

_FFT, _HOP, _MELS = 400, 160, 40  # 25 and 10 ms at 16 kHz
_WINDOW = 160  # frames: 1.6 s
_PER_SECOND = 1.3  # windows
_COVERED = 0.75  # the share of the last window that must be sound
_LAYERS = 3
_LOUDNESS = -30.0  # dB of full scale; what is louder stays
_BATCH = 8  # windows in one call: one program for clips of all lengths


class Resemblyzer:
    """Voices as 256 values of length 1. Measured: same speaker 0.88, different 0.54 in the mean, threshold 0.79."""

    name = "Resemblyzer GE2E (JAX)"
    scale = "cosine; the same speaker from about 0.79"

    def __init__(self):
        spec = importlib.util.find_spec("resemblyzer")
        path = spec and pathlib.Path(spec.origin).parent / "pretrained.pt"
        if not path or not path.is_file():
            raise MissingJudge("resemblyzer: pip install --no-deps resemblyzer")
        self.digest = weights_digest([path])
        self._weights = _weights(path)

    def __call__(self, samples: np.ndarray, rate: int) -> np.ndarray | None:
        """Mono samples [N] -> the voice [D], None where there is no speech."""
        if not sound.has_speech(samples, rate):
            return None
        mels = _windows(_louder(sound.soxr(samples, rate)))
        count = len(mels)
        mels = np.pad(mels, ((0, -count % _BATCH), (0, 0), (0, 0)))
        voices = [
            np.asarray(encode(self._weights, mels[i : i + _BATCH]))
            for i in range(0, len(mels), _BATCH)
        ]
        voice = np.concatenate(voices)[:count].mean(0)
        return voice / np.linalg.norm(voice)


@jax.jit
def encode(weights: dict[str, jax.Array], mels: jax.Array) -> jax.Array:
    """Mel windows [B, T, 40] -> unit vectors [B, D]: three LSTM layers, their last state, a linear map, ReLU."""
    highest = jax.lax.Precision.HIGHEST
    h = jnp.swapaxes(mels, 0, 1)
    for layer in range(_LAYERS):
        into, again, bias_in, bias_again = (
            weights[f"lstm.{kind}_l{layer}"]
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )

        def step(state, x, again=again):
            hidden, cell = state
            i, f, g, o = jnp.split(x + jnp.dot(hidden, again.T, precision=highest), 4, axis=-1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (hidden, cell), hidden

        zero = jnp.zeros((mels.shape[0], again.shape[1]))
        x = jnp.dot(h, into.T, precision=highest) + bias_in + bias_again
        _, h = jax.lax.scan(step, (zero, zero), x)
    voice = jnp.dot(h[-1], weights["linear.weight"].T, precision=highest) + weights["linear.bias"]
    voice = jax.nn.relu(voice)
    return voice / jnp.linalg.norm(voice, axis=1, keepdims=True)


def _louder(samples: np.ndarray) -> np.ndarray:
    """A quiet clip is raised to the loudness that the encoder knows."""
    missing = _LOUDNESS - 10 * math.log10(float(np.mean(samples.astype(np.float64) ** 2)))
    return samples * np.float32(10 ** (missing / 20)) if missing > 0 else samples


def _windows(samples: np.ndarray) -> np.ndarray:
    """Mel windows [B, T, 40] that overlap; the last one is dropped where little of it is sound."""
    frames = math.ceil((len(samples) + 1) / _HOP)
    step = round(sound.RATE / _PER_SECOND / _HOP)
    starts = list(range(0, max(1, frames - _WINDOW + step + 1), step))
    covered = (len(samples) - starts[-1] * _HOP) / (_WINDOW * _HOP)
    if covered < _COVERED and len(starts) > 1:
        starts.pop()
    missing = (starts[-1] + _WINDOW) * _HOP - len(samples)
    mel = _mel(np.pad(samples, (0, max(0, missing))))
    return np.stack([mel[start : start + _WINDOW] for start in starts])


def _mel(samples: np.ndarray) -> np.ndarray:
    """Power in 40 Slaney bands [T, 40] of centred frames: no logarithm."""
    padded = np.pad(samples, _FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    return (power @ _filters().T).astype(np.float32)


def _filters() -> np.ndarray:
    """Triangles [40, bins] of equal area, spaced evenly below 1 kHz and by logarithm above."""

    def to_mel(hz):
        return np.where(hz < 1000, 3 * hz / 200, 15 + 27 * np.log(np.maximum(hz, 1) / 1000) / np.log(6.4))  # fmt: skip

    def to_hz(mel):
        return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(np.log(6.4) * (mel - 15) / 27))

    edges = to_hz(np.linspace(0, to_mel(np.array(sound.RATE / 2)), _MELS + 2))
    bins = np.linspace(0, sound.RATE / 2, _FFT // 2 + 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (high - low))


def _weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    tensors = pickles.read(path, "model_state")
    return {k: v for k, v in tensors.items() if k.startswith(("lstm.", "linear."))}
