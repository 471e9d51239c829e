"""Mimi, the neural codec between waveforms and residual-quantized codes: offline and streaming, exact both ways."""

from chroma_jax.model.codec.mimi import Codec, DecodeState, EncodeState

__all__ = ["Codec", "DecodeState", "EncodeState"]
