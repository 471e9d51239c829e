"""SEANet: the convolutional encoder (waveform -> 25 Hz) and decoder (25 Hz -> waveform) of Mimi.

Both are a plain chain of layers. ELUs have a place of their own in the chain, so that a layer's index is the one it has
in published checkpoints, whatever the number of residual layers.

Axes: B batch, T positions, C channels. Source: arXiv 2009.02095; transformers' modeling_mimi.py, MimiEncoder, MimiDecoder.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from chroma_jax.config import CodecConfig
from chroma_jax.model.codec.convolution import ConvState, StreamingConv1d, StreamingConvTranspose1d

LayerState = Any  # a layer's own NamedTuple, or () of an ELU


class Elu(nnx.Module):
    """The activation between convolutions: stateless, length-preserving."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.elu(x)

    def init_state(self, batch: int) -> tuple[()]:
        return ()

    def step(self, x: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return self(x), state


class ResidualBlock(nnx.Module):
    """x + pointwise(elu(dilated(elu(x)))), with a 1x1 convolution on the skip where the config asks for one."""

    def __init__(self, cfg: CodecConfig, channels: int, dilation: int, *, rngs: nnx.Rngs):
        narrow = channels // cfg.compress
        self.dilated = StreamingConv1d(
            cfg, channels, narrow, cfg.residual_kernel_size, dilation=dilation, rngs=rngs
        )
        self.pointwise = StreamingConv1d(cfg, narrow, channels, 1, rngs=rngs)
        self.shortcut = (
            StreamingConv1d(cfg, channels, channels, 1, rngs=rngs)
            if cfg.use_conv_shortcut
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, C] -> [B, T, C]."""
        return self.step(x, self.init_state(x.shape[0]))[0]

    def init_state(self, batch: int) -> ConvState:
        """Kernels of size 1 look at no past: only the dilated convolution has a state."""
        return self.dilated.init_state(batch)

    def step(self, x: jax.Array, state: ConvState) -> tuple[jax.Array, ConvState]:
        """The next chunk [B, T, C] -> [B, T, C]."""
        h, state = self.dilated.step(jax.nn.elu(x), state)
        h = self.pointwise(jax.nn.elu(h))
        return (x if self.shortcut is None else self.shortcut(x)) + h, state


class SeaNet(nnx.Module):
    """A chain of convolutions, residual blocks and ELUs."""

    def __init__(self, layers: list[nnx.Module]):
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Whole sequences [B, T, C]; `lengths` [B] in input positions, for rows that end before T (encoder only)."""
        for layer in self.layers:
            if isinstance(layer, StreamingConv1d):
                x, lengths = layer(x, lengths), shrink(lengths, layer.stride)
            else:
                x = layer(x)
        return x

    def init_state(self, batch: int) -> tuple[LayerState, ...]:
        """The state before the first chunk of `batch` streams, one entry per layer."""
        return tuple(layer.init_state(batch) for layer in self.layers)

    def step(
        self, x: jax.Array, state: tuple[LayerState, ...], lengths: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[LayerState, ...]]:
        """The next chunk [B, T, C]; `lengths` [B], for rows that end inside it (encoder only)."""
        new_state = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            if isinstance(layer, StreamingConv1d):
                x, layer_state = layer.step(x, layer_state, lengths)
                lengths = shrink(lengths, layer.stride)
            else:
                x, layer_state = layer.step(x, layer_state)
            new_state.append(layer_state)
        return x, tuple(new_state)


def shrink(lengths: jax.Array | None, stride: int) -> jax.Array | None:
    """Lengths after a convolution of that stride: rounded up, None stays None."""
    return None if lengths is None else -(-lengths // stride)


def seanet_encoder(cfg: CodecConfig, *, rngs: nnx.Rngs) -> SeaNet:
    """Waveform [B, N, 1] -> [B, ceil(N / encoder_hop), D]."""
    channels = cfg.num_filters
    layers = [StreamingConv1d(cfg, cfg.audio_channels, channels, cfg.kernel_size, rngs=rngs)]
    for ratio in reversed(cfg.upsampling_ratios):
        for i in range(cfg.num_residual_layers):
            layers.append(ResidualBlock(cfg, channels, cfg.dilation_growth_rate**i, rngs=rngs))
        down = StreamingConv1d(cfg, channels, 2 * channels, 2 * ratio, stride=ratio, rngs=rngs)
        layers += [Elu(), down]
        channels *= 2
    last = StreamingConv1d(cfg, channels, cfg.hidden_size, cfg.last_kernel_size, rngs=rngs)
    return SeaNet([*layers, Elu(), last])


def seanet_decoder(cfg: CodecConfig, *, rngs: nnx.Rngs) -> SeaNet:
    """[B, T, D] -> waveform [B, T * encoder_hop, 1]."""
    channels = cfg.num_filters * 2 ** len(cfg.upsampling_ratios)
    layers = [StreamingConv1d(cfg, cfg.hidden_size, channels, cfg.kernel_size, rngs=rngs)]
    for ratio in cfg.upsampling_ratios:
        up = StreamingConvTranspose1d(cfg, channels, channels // 2, stride=ratio, rngs=rngs)
        layers += [Elu(), up]
        channels //= 2
        for i in range(cfg.num_residual_layers):
            layers.append(ResidualBlock(cfg, channels, cfg.dilation_growth_rate**i, rngs=rngs))
    last = StreamingConv1d(cfg, channels, cfg.audio_channels, cfg.last_kernel_size, rngs=rngs)
    return SeaNet([*layers, Elu(), last])
