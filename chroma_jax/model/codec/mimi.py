"""The codec: 24 kHz waveform <-> Q codes per 80 ms frame, whole or as a stream, with the same result.

    encode: SEANet encoder -> transformer -> downsample -> quantizer
    decode: quantizer -> upsample -> transformer -> SEANet decoder

Every part is causal, so a stream is exact: `encode_step` and `decode_step` give what `encode` and `decode` give on the
whole, frame by frame, for any split into chunks. Memory of a stream is fixed.

Axes: B batch, N samples, T frames, Q codebooks, D width. Source: Mimi (arXiv 2410.00037); transformers' modeling_mimi.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.config import CodecConfig
from chroma_jax.model.codec.convolution import (
    ConvState,
    ConvTransposeState,
    StreamingConv1d,
    StreamingConvTranspose1d,
)
from chroma_jax.model.codec.quantizer import SplitQuantizer
from chroma_jax.model.codec.seanet import LayerState, seanet_decoder, seanet_encoder, shrink
from chroma_jax.model.codec.transformer import SlidingTransformer, TransformerState


class EncodeState(NamedTuple):
    """What encoding remembers of `batch` waveforms. Its size does not depend on how long they are."""

    encoder: tuple[LayerState, ...]
    transformer: TransformerState
    downsample: ConvState


class DecodeState(NamedTuple):
    """What decoding remembers of `batch` code sequences. Its size does not depend on how long they are."""

    upsample: ConvTransposeState
    transformer: TransformerState
    decoder: tuple[LayerState, ...]


class Codec(nnx.Module):
    """Mimi."""

    def __init__(self, cfg: CodecConfig, *, rngs: nnx.Rngs):
        if cfg.downsample < 2:
            raise ValueError(
                f"codec frame_rate {cfg.frame_rate} must be a fraction of the transformer's "
                f"{cfg.sampling_rate / cfg.encoder_hop} positions per second"
            )
        if cfg.trim_right_ratio != 1:
            raise ValueError(
                f"codec trim_right_ratio must be 1 (causal), got {cfg.trim_right_ratio}"
            )
        self.cfg = cfg
        D, stride = cfg.hidden_size, cfg.downsample
        self.encoder = seanet_encoder(cfg, rngs=rngs)
        self.encoder_transformer = SlidingTransformer(cfg, rngs=rngs)
        # The one convolution of Mimi that repeats its edges instead of padding with zeros.
        self.downsample = StreamingConv1d(
            cfg, D, D, 2 * stride, stride=stride, pad_mode="replicate", bias=False, rngs=rngs
        )
        self.quantizer = SplitQuantizer(cfg, rngs=rngs)
        self.upsample = StreamingConvTranspose1d(
            cfg, D, D, stride=stride, groups=cfg.upsample_groups, bias=False, rngs=rngs
        )
        self.decoder_transformer = SlidingTransformer(cfg, rngs=rngs)
        self.decoder = seanet_decoder(cfg, rngs=rngs)

    def encode(
        self, wave: jax.Array, lengths: jax.Array | None = None, num_codebooks: int | None = None
    ) -> jax.Array:
        """Waveforms [B, N] -> codes [B, T, Q] int32, T = ceil(N / frame_samples).

        Args:
          wave: mono, at the codec's sampling rate, in [-1, 1].
          lengths: [B] samples that count in each row, 1 to N (default: all N). The first
            ceil(lengths[b] / frame_samples) frames of row b are the codes of that row alone, whatever its right padding
            contains. The frames after them are valid ids that mean nothing.
          num_codebooks: how many codebooks Q (default: all).

        Raises:
          ValueError: no samples, a shape that is not [B, N], or a num_codebooks the codec does not have.
        """
        if wave.ndim != 2 or wave.shape[1] == 0:
            raise ValueError(
                f"wave must be [B, N] with at least one sample, got shape {wave.shape}"
            )
        x = self.encoder(wave[..., None], lengths)
        x = self.encoder_transformer(x)
        x = self.downsample(x, shrink(lengths, self.cfg.encoder_hop))
        return self.quantizer.encode(x, num_codebooks)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes [B, T, Q] -> waveforms [B, T * frame_samples] float32, at the codec's sampling rate.

        Q may be anything from 1 to num_quantizers. An id outside the codebook is the caller's mistake: it is clamped to
        the nearest id there is, because a jitted function cannot raise on values.

        Raises:
          ValueError: a shape that is not [B, T, Q], or a Q the codec does not have.
        """
        x = self.upsample(self._dequantize(codes))
        x = self.decoder_transformer(x)
        return self.decoder(x)[..., 0].astype(jnp.float32)

    def init_encode_state(self, batch: int) -> EncodeState:
        """The state before the first samples of `batch` waveforms."""
        return EncodeState(
            self.encoder.init_state(batch),
            self.encoder_transformer.init_state(batch),
            self.downsample.init_state(batch),
        )

    def encode_step(
        self,
        wave: jax.Array,
        state: EncodeState,
        lengths: jax.Array | None = None,
        num_codebooks: int | None = None,
    ) -> tuple[jax.Array, EncodeState]:
        """The next t frames of samples [B, t * frame_samples] -> (codes [B, t, Q] int32, state).

        Args:
          wave: as in `encode`, in whole frames. To end on a partial frame, fill it up with anything and give `lengths`.
          state: from `init_encode_state` or the previous chunk.
          lengths: [B] samples of this chunk that count. A row with fewer than all of them ends here: its first
            ceil(lengths[b] / frame_samples) frames are those of `encode` on the whole waveform, and later chunks of
            that row mean nothing. 0 is fine for a row that has ended already.
          num_codebooks: as in `encode`.

        Raises:
          ValueError: the chunk is not [B, t * frame_samples] with t >= 1, or a num_codebooks the codec does not have.
        """
        if wave.ndim != 2 or wave.shape[1] == 0 or wave.shape[1] % self.cfg.frame_samples:
            raise ValueError(
                f"a chunk must be [B, t * {self.cfg.frame_samples}] samples with t >= 1, got shape {wave.shape}"
            )
        x, encoder = self.encoder.step(wave[..., None], state.encoder, lengths)
        x, transformer = self.encoder_transformer.step(x, state.transformer)
        x, downsample = self.downsample.step(
            x, state.downsample, shrink(lengths, self.cfg.encoder_hop)
        )
        return self.quantizer.encode(x, num_codebooks), EncodeState(
            encoder, transformer, downsample
        )

    def init_decode_state(self, batch: int) -> DecodeState:
        """The state before the first frame of `batch` code sequences."""
        return DecodeState(
            self.upsample.init_state(batch),
            self.decoder_transformer.init_state(batch),
            self.decoder.init_state(batch),
        )

    def decode_step(self, codes: jax.Array, state: DecodeState) -> tuple[jax.Array, DecodeState]:
        """The next t >= 1 frames [B, t, Q] -> (samples [B, t * frame_samples] float32, state). Ids as in `decode`.

        Raises:
          ValueError: as `decode`.
        """
        x, upsample = self.upsample.step(self._dequantize(codes), state.upsample)
        x, transformer = self.decoder_transformer.step(x, state.transformer)
        x, decoder = self.decoder.step(x, state.decoder)
        return x[..., 0].astype(jnp.float32), DecodeState(upsample, transformer, decoder)

    def _dequantize(self, codes: jax.Array) -> jax.Array:
        if codes.ndim != 3 or codes.shape[1] == 0:
            raise ValueError(
                f"codes must be [B, T, Q] with at least one frame, got shape {codes.shape}"
            )
        return self.quantizer.decode(codes).astype(self.cfg.dtype)
