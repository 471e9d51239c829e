"""The multi-scale STFT discriminator: one small convolutional network per resolution, on real and imaginary parts.

Axes: B batch, N samples, T frames, F frequency bins, C channels. Source: EnCodec (arXiv 2210.13438, section 3.4 and figure 2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.model.layers import normal, zeros
from chroma_jax.training.codec.spectral import stft

_SLOPE = 0.2  # of the leaky rectifier
_TIME_DILATIONS = (1, 2, 4)


class Convolution(nnx.Module):
    """2-D convolution over time and frequency, padded so that stride 1 keeps the size."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        *,
        stride: int = 1,
        dilation: int = 1,
        rngs: nnx.Rngs,
    ):
        self.stride, self.dilation = stride, dilation
        fan_in = kernel[0] * kernel[1] * inputs
        self.kernel = normal(
            rngs, *kernel, inputs, outputs, dtype="float32", std=(2 / fan_in) ** 0.5
        )
        self.bias = zeros(outputs, dtype="float32")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, F, C] -> [B, T, ceil(F / stride), C]."""
        time, frequency, *_ = self.kernel.shape
        padding = [((time - 1) * self.dilation // 2,) * 2, (frequency // 2,) * 2]
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(1, self.stride),
            padding=padding,
            rhs_dilation=(self.dilation, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(x.dtype)


class SpectrumDiscriminator(nnx.Module):
    """The network of one resolution."""

    def __init__(self, window: int, channels: int, *, rngs: nnx.Rngs):
        self.window = window
        layers = [Convolution(2, channels, (3, 9), rngs=rngs)]
        layers += [
            Convolution(channels, channels, (3, 9), stride=2, dilation=d, rngs=rngs)
            for d in _TIME_DILATIONS
        ]
        self.layers = nnx.List([*layers, Convolution(channels, channels, (3, 3), rngs=rngs)])
        self.last = Convolution(channels, 1, (3, 3), rngs=rngs)

    def __call__(self, wave: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Waveforms [B, N] -> (scores [B, T, F'], what each inner layer gave)."""
        spectra = stft(wave, self.window)
        x = jnp.stack([spectra.real, spectra.imag], axis=-1)
        features = []
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return self.last(x)[..., 0], features


class Discriminator(nnx.Module):
    """One network per window."""

    def __init__(self, windows: tuple[int, ...], channels: int, *, rngs: nnx.Rngs):
        self.scales = nnx.List([SpectrumDiscriminator(w, channels, rngs=rngs) for w in windows])

    def __call__(self, wave: jax.Array) -> list[tuple[jax.Array, list[jax.Array]]]:
        """Waveforms [B, N] -> scores and features of every scale."""
        return [scale(wave) for scale in self.scales]


def discriminator_loss(real: list, made: list) -> jax.Array:
    """Hinge loss of the discriminator [B], mean over scales: real scores above 1, made ones below -1."""
    losses = [
        jax.nn.relu(1 - r).mean((1, 2)) + jax.nn.relu(1 + m).mean((1, 2))
        for (r, _), (m, _) in zip(real, made, strict=True)
    ]
    return sum(losses) / len(losses)


def adversarial_loss(made: list) -> jax.Array:
    """What the generator wants of the scores [B], mean over scales: made ones above 1."""
    return sum(jax.nn.relu(1 - scores).mean((1, 2)) for scores, _ in made) / len(made)


def feature_loss(real: list, made: list) -> jax.Array:
    """Distance of what inner layers give [B]: L1 relative to the real one's mean magnitude, mean over layers and scales."""
    ratios = [
        jnp.abs(r - m).mean((1, 2, 3)) / (jnp.abs(r).mean((1, 2, 3)) + 1e-6)
        for (_, of_real), (_, of_made) in zip(real, made, strict=True)
        for r, m in zip(of_real, of_made, strict=True)
    ]
    return sum(ratios) / len(ratios)
