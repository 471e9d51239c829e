"""Typed configuration of the four stages, the reader of a Hub checkpoint's config.json, and the published sizes.

Sizes never have defaults: they come from a checkpoint (`hf.load`), from the published model (`chroma_4b`)
or from something small to try (`tiny`, `debug`).
"""

from chroma_jax.config.presets import chroma_4b, chroma_100m, debug, mini, mini_codec, tiny
from chroma_jax.config.types import (
    AudioEncoderConfig,
    BackboneConfig,
    ChromaConfig,
    CodecConfig,
    DecoderConfig,
    Llama3Rope,
    LlamaConfig,
    ReasonerConfig,
    RopeConfig,
)

__all__ = [
    "AudioEncoderConfig",
    "BackboneConfig",
    "ChromaConfig",
    "CodecConfig",
    "DecoderConfig",
    "Llama3Rope",
    "LlamaConfig",
    "ReasonerConfig",
    "RopeConfig",
    "chroma_4b",
    "chroma_100m",
    "debug",
    "mini",
    "mini_codec",
    "tiny",
]
