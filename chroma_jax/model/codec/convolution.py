"""Causal 1-D convolutions that run over a whole sequence or over a stream of chunks, with the same result.

A causal convolution of stride s pads kernel - s positions on the left, and on the right what the last output still
needs, so that T positions give ceil(T / s). In a stream the left padding is what came before. The right padding is
real input to the last output: where rows of a batch end at different lengths, each row is padded at its own end.

Axes: B batch, T positions, C channels, P past positions, G groups. Source: Mimi (arXiv 2410.00037, section 3.3) and
transformers' modeling_mimi.py, MimiConv1d and MimiConvTranspose1d.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.config import CodecConfig
from chroma_jax.model.dispatch import by_platform, dispatch
from chroma_jax.model.layers import normal, zeros

PAD_MODES = ("constant", "replicate")


class ConvState(NamedTuple):
    """What a convolution remembers of its input."""

    past: jax.Array  # [B, P, C], the last P = (kernel - 1) * dilation + 1 - stride positions
    started: jax.Array  # [B] bool; before a row's first chunk, replicate padding is not known yet


class StreamingConv1d(nnx.Module):
    """Causal convolution, padded with zeros ("constant") or with its first and last positions ("replicate")."""

    def __init__(
        self,
        cfg: CodecConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        pad_mode: str | None = None,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.dtype = cfg.dtype
        self.stride, self.dilation = stride, dilation
        self.pad_mode = cfg.pad_mode if pad_mode is None else pad_mode
        self.past_size = (kernel_size - 1) * dilation + 1 - stride
        if self.pad_mode not in PAD_MODES:
            raise ValueError(f"codec pad_mode must be one of {PAD_MODES}, got {self.pad_mode!r}")
        if self.past_size < 0:
            raise ValueError(
                f"codec convolution of kernel {kernel_size} skips input at stride {stride}"
            )
        self.kernel = normal(
            rngs,
            kernel_size,
            in_channels,
            out_channels,
            dtype=cfg.param_dtype,
            std=(kernel_size * in_channels) ** -0.5,
        )
        self.bias = zeros(out_channels, dtype=cfg.param_dtype) if bias else None

    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Whole sequences [B, T, C] -> [B, ceil(T / stride), C].

        Of row b, x[b, :lengths[b]] counts (all of it by default): its first ceil(lengths[b] / stride) outputs are those
        of that row alone; the outputs after them mean nothing.
        """
        missing = -x.shape[1] % self.stride
        if missing:
            mode = "edge" if self.pad_mode == "replicate" else "constant"
            x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), mode=mode)
        return self.step(x, self.init_state(x.shape[0]), lengths)[0]

    def init_state(self, batch: int) -> ConvState:
        """The state before the first chunk of `batch` streams."""
        past = jnp.zeros((batch, self.past_size, self.kernel.shape[1]), self.dtype)
        return ConvState(past, jnp.zeros((batch,), bool))

    def step(
        self, x: jax.Array, state: ConvState, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, ConvState]:
        """The next chunk [B, T, C] -> [B, T / stride, C]. `lengths`: for rows that end inside this chunk.

        Raises:
          ValueError: T is no multiple of the stride.
        """
        if x.shape[1] % self.stride:
            raise ValueError(
                f"a chunk of {x.shape[1]} positions is no multiple of the convolution's stride {self.stride}"
            )
        x = self._pad_rows(x.astype(self.dtype), lengths)
        past = state.past
        if self.pad_mode == "replicate":
            past = jnp.where(state.started[:, None, None], past, x[:, :1])
        seen = jnp.concatenate([past, x], axis=1)
        y = self._convolve(seen, self.kernel[...].astype(self.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return y, ConvState(seen[:, x.shape[1] :], jnp.ones_like(state.started))

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        def whole(x, kernel):
            return jax.lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(self.stride,),
                padding="VALID",
                rhs_dilation=(self.dilation,),
                dimension_numbers=("NHC", "HIO", "NHC"),
            )

        if kernel[0].size > dispatch.value.taps_up_to:
            return whole(x, kernel)

        def by_taps(x, kernel):  # 1.3 to 3 times as fast as XLA's convolution on CPUs
            end = x.shape[1] - (len(kernel) - 1) * self.dilation
            starts = (tap * self.dilation for tap in range(len(kernel)))
            return sum(
                x[:, s : s + end : self.stride] @ w for s, w in zip(starts, kernel, strict=True)
            )

        return by_platform(x, kernel, cpu=by_taps, default=whole)

    def _pad_rows(self, x: jax.Array, lengths: jax.Array | None) -> jax.Array:
        """Puts each row's right padding where the row ends. At stride 1 no output looks beyond its own position."""
        if lengths is None or self.stride == 1:
            return x
        inside = jnp.arange(x.shape[1]) < lengths[:, None]
        padding = jnp.zeros((), x.dtype)
        if self.pad_mode == "replicate":
            last = jnp.clip(lengths - 1, 0, x.shape[1] - 1)
            padding = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return jnp.where(inside[..., None], x, padding)


class ConvTransposeState(NamedTuple):
    """What the last input position adds to the output positions still to come."""

    tail: jax.Array  # [B, stride, C], without the bias


class StreamingConvTranspose1d(nnx.Module):
    """Causal transposed convolution with a kernel of 2 * stride, trimmed on the right: T positions -> T * stride.

    An input position then reaches its own `stride` outputs and the following `stride`: one matrix product and one
    shifted sum, and the shift is the only state.
    """

    def __init__(
        self,
        cfg: CodecConfig,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        groups: int = 1,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"codec transposed convolution: groups {groups} must divide the channels "
                f"{in_channels} (in) and {out_channels} (out)"
            )
        self.dtype = cfg.dtype
        self.stride, self.groups, self.out_channels = stride, groups, out_channels
        # [C in, 2 * stride outputs as (own, following), C out / G]: with the inputs first it is one plain matrix.
        self.kernel = normal(
            rngs,
            in_channels,
            2,
            stride,
            out_channels // groups,
            dtype=cfg.param_dtype,
            std=(2 * in_channels // groups) ** -0.5,
        )
        self.bias = zeros(out_channels, dtype=cfg.param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Whole sequences [B, T, C] -> [B, T * stride, C]."""
        return self.step(x, self.init_state(x.shape[0]))[0]

    def init_state(self, batch: int) -> ConvTransposeState:
        """The state before the first chunk of `batch` streams."""
        return ConvTransposeState(jnp.zeros((batch, self.stride, self.out_channels), self.dtype))

    def step(self, x: jax.Array, state: ConvTransposeState) -> tuple[jax.Array, ConvTransposeState]:
        """The next chunk [B, T, C] -> [B, T * stride, C]."""
        B, T, _ = x.shape
        spread = self._spread(x.astype(self.dtype))
        own, following = spread[:, :, 0], spread[:, :, 1]  # [B, T, stride, C]
        tails = jnp.concatenate([state.tail[:, None], following], axis=1)
        y = (own + tails[:, :-1]).reshape(B, T * self.stride, self.out_channels)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return y, ConvTransposeState(tails[:, -1])

    def _spread(self, x: jax.Array) -> jax.Array:
        """What each position adds to its own and the following `stride` outputs: [B, T, C] -> [B, T, 2, stride, C]."""
        kernel = self.kernel[...].astype(self.dtype)
        if self.groups == 1:
            return jnp.einsum("BTI,IKSO->BTKSO", x, kernel)
        B, T, C = x.shape
        x = x.reshape(B, T, self.groups, C // self.groups)
        kernel = kernel.reshape(self.groups, -1, *kernel.shape[1:])
        spread = jnp.einsum("BTGI,GIKSO->BTKSGO", x, kernel)
        return spread.reshape(B, T, 2, self.stride, self.out_channels)
