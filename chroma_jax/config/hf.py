"""config.json of a Hub checkpoint <-> `ChromaConfig`.

What transformers' own configuration classes leave out of config.json when it is standard (a head_dim that is
hidden_size / heads, an audio LayerNorm epsilon) is filled in here as those classes do; sizes, rope theta and token ids
are never guessed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from chroma_jax import paths
from chroma_jax.config.types import (
    MAX_INT,
    QUANTIZED,
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

_MAX_FLOAT = sys.float_info.max


def read(config: Mapping[str, Any]) -> ChromaConfig:
    """Reads the dictionary of a Hub checkpoint's config.json, old and new rope spellings.

    Raises ValueError naming the dotted key for an architecture that is not Chroma, a missing or mistyped key, an
    unsupported rope type or activation, and sizes that contradict each other.
    """
    return _read_chroma(_Section(config))


def load(path: str | os.PathLike) -> ChromaConfig:
    """`read` of a config.json file. Raises FileNotFoundError or ValueError naming the file."""
    path = paths.expand(path)
    try:
        with open(path, encoding="utf-8") as f:
            return read(json.load(f))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: {e}") from e


def write(config: ChromaConfig) -> dict[str, Any]:
    """The config.json dictionary that PyTorch's Chroma reads; `read(write(c)) == c` up to dtype."""
    return _write_chroma(config)


def read_codec(config: Mapping[str, Any]) -> CodecConfig:
    """The config.json of a Mimi of its own, outside a Chroma. Raises ValueError naming the key."""
    return _read_codec(_Section(config), None)


def write_codec(codec: CodecConfig) -> dict[str, Any]:
    """The config.json of a Mimi that transformers' MimiModel loads."""
    return {"architectures": ["MimiModel"], **_write_codec(codec)}


_REQUIRED = object()


def _short(value: Any) -> str:
    """A value in an error message: JSON integers and lists may fill pages."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


class _Section:
    """One nested dictionary of config.json that knows its dotted name, for error messages."""

    def __init__(self, values: Any, name: str = ""):
        if not isinstance(values, Mapping):
            raise ValueError(f"{name or 'config'} must be an object, got {type(values).__name__}")
        self.values, self.name = values, name

    def key(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def section(self, key: str) -> _Section:
        if not self.has(key):
            raise ValueError(f"missing key {self.key(key)}")
        return _Section(self.values[key], self.key(key))

    def _number(self, key: str, default: Any, kind: type, what: str):
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"missing key {self.key(key)}")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.key(key)} must be {what}, got {_short(value)}")
        # JSON knows no bounds: NaN, Infinity and integers of any length come through its reader.
        if not abs(value) <= (MAX_INT if kind is int else _MAX_FLOAT) or (
            kind is int and value != int(value)
        ):
            raise ValueError(f"{self.key(key)} must be {what}, got {_short(value)}")
        return kind(value)

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        value = self._number(key, default, int, "a positive integer")
        if value is not default and value <= 0:
            raise ValueError(f"{self.key(key)} must be a positive integer, got {_short(value)}")
        return value

    def id(self, key: str, default: Any = _REQUIRED) -> int:
        return self._number(key, default, int, "an integer")

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        return self._number(key, default, float, "a finite number")

    def positive(self, key: str) -> float:
        value = self.number(key)
        if value <= 0:
            raise ValueError(f"{self.key(key)} must be positive, got {_short(value)}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{self.key(key)} must be true or false, got {_short(value)}")
        return default if value is None else value

    def head_dim(self, hidden: int, heads: int) -> int:
        """Written out, or hidden_size / num_attention_heads where that is whole."""
        if not self.has("head_dim") and hidden % heads:
            raise ValueError(
                f"{self.key('hidden_size')} {hidden} is no multiple of num_attention_heads {heads}, "
                f"and there is no head_dim"
            )
        return self.size("head_dim", hidden // heads)

    def expect(self, key: str, *allowed: Any) -> None:
        """If the key is there, its value is one of `allowed`."""
        if self.has(key) and self.values[key] not in allowed:
            wanted = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"{self.key(key)} must be {wanted}, got {_short(self.values[key])}")

    def sizes(self, key: str) -> tuple[int, ...]:
        if not self.has(key):
            raise ValueError(f"missing key {self.key(key)}")
        value = self.values[key]
        if not isinstance(value, list | tuple) or not all(
            type(v) is int and 0 < v <= MAX_INT for v in value
        ):
            raise ValueError(
                f"{self.key(key)} must be a list of positive integers, got {_short(value)}"
            )
        return tuple(value)


def _read_rope(section: _Section, theta: Any = _REQUIRED) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (before)."""
    key = next((k for k in ("rope_parameters", "rope_scaling") if section.has(k)), None)
    rope = section.section(key) if key else _Section({}, section.key("rope_parameters"))
    theta_at = section if section.has("rope_theta") and not rope.has("rope_theta") else rope
    theta = theta_at.number("rope_theta", theta)
    if theta <= 0:
        raise ValueError(f"{theta_at.key('rope_theta')} must be positive, got {theta}")
    kind_key = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.values.get(kind_key) or "default"
    if kind not in ("default", "mrope", "llama3"):
        raise ValueError(
            f"{rope.key(kind_key)}: unsupported rope type {kind!r}; supported: default, mrope, llama3"
        )
    llama3 = None
    if kind == "llama3":
        llama3 = Llama3Rope(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_positions=rope.size("original_max_position_embeddings"),
        )
        if llama3.factor <= 0 or not 0 < llama3.low_freq_factor < llama3.high_freq_factor:
            raise ValueError(
                f"{rope.name}: llama3 needs factor > 0 and 0 < low_freq_factor < high_freq_factor"
            )
    sections = None
    if rope.has("mrope_section"):
        sections = rope.sizes("mrope_section")
        if len(sections) != 3:
            raise ValueError(
                f"{rope.key('mrope_section')} must have 3 entries, got {list(sections)}"
            )
    return RopeConfig(theta=theta, llama3=llama3, sections=sections)


def _read_llama(section: _Section, *, qkv_bias: bool) -> LlamaConfig:
    section.expect("hidden_act", "silu")
    if not qkv_bias:
        section.expect("attention_bias", False)
    section.expect("mlp_bias", False)
    section.expect("use_sliding_window", False)
    hidden, heads = section.size("hidden_size"), section.size("num_attention_heads")
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=section.size("intermediate_size"),
        num_layers=section.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=section.size("num_key_value_heads", heads),
        head_dim=section.head_dim(hidden, heads),
        max_positions=section.size("max_position_embeddings"),
        norm_eps=section.positive("rms_norm_eps"),
        rope=_read_rope(section),
        qkv_bias=qkv_bias,
    )


def _read_audio_encoder(section: _Section) -> AudioEncoderConfig:
    section.expect("activation_function", "gelu")
    section.expect("scale_embedding", False)
    return AudioEncoderConfig(
        num_mel_bins=section.size("num_mel_bins"),
        hidden_size=section.size("d_model"),
        intermediate_size=section.size("encoder_ffn_dim"),
        num_layers=section.size("encoder_layers"),
        num_heads=section.size("encoder_attention_heads"),
        window=section.size("n_window"),
        output_size=section.size("output_dim"),
    )


def _read_codec(section: _Section, frame_samples: int | None) -> CodecConfig:
    """`frame_samples`: what a Chroma says a frame is, for a codec that does not say its frame rate."""
    section.expect("model_type", "mimi")
    section.expect("hidden_act", "gelu")
    section.expect("use_causal_conv", True)
    section.expect("pad_mode", "constant", "replicate")
    section.expect("attention_bias", False)
    section.expect("trim_right_ratio", 1, 1.0)
    section.expect("audio_channels", 1)
    hidden, heads = section.size("hidden_size"), section.size("num_attention_heads")
    rate = section.size("sampling_rate")
    # transformers leaves it out, or null, where it follows from the sizes.
    key = next((key for key in ("frame_rate", "_frame_rate") if section.has(key)), None)
    return CodecConfig(
        sampling_rate=rate,
        frame_rate=rate / frame_samples
        if key is None and frame_samples is not None
        else section.positive(key or "_frame_rate"),
        audio_channels=section.size("audio_channels", 1),
        hidden_size=hidden,
        num_filters=section.size("num_filters"),
        num_residual_layers=section.size("num_residual_layers"),
        upsampling_ratios=section.sizes("upsampling_ratios"),
        kernel_size=section.size("kernel_size"),
        last_kernel_size=section.size("last_kernel_size"),
        residual_kernel_size=section.size("residual_kernel_size"),
        dilation_growth_rate=section.size("dilation_growth_rate"),
        compress=section.size("compress"),
        pad_mode=section.values.get("pad_mode") or "constant",
        trim_right_ratio=section.number("trim_right_ratio", 1.0),
        use_conv_shortcut=section.flag("use_conv_shortcut"),
        upsample_groups=section.size("upsample_groups"),
        codebook_size=section.size("codebook_size"),
        codebook_dim=section.size(
            "codebook_dim", section.size("vector_quantization_hidden_dimension")
        ),
        quantizer_size=section.size("vector_quantization_hidden_dimension"),
        num_quantizers=section.size("num_quantizers"),
        num_semantic_quantizers=section.size("num_semantic_quantizers"),
        num_layers=section.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=section.size("num_key_value_heads", heads),
        head_dim=section.head_dim(hidden, heads),
        intermediate_size=section.size("intermediate_size"),
        norm_eps=section.positive("norm_eps"),
        rope=_read_rope(section),
        sliding_window=section.size("sliding_window"),
        layer_scale_initial=section.number("layer_scale_initial_scale"),
    )


def _read_chroma(top: _Section) -> ChromaConfig:
    architectures = top.values.get("architectures") or []
    if not isinstance(architectures, list | tuple):
        raise ValueError(f"architectures must be a list, got {architectures!r}")
    if top.values.get("model_type") != "chroma":
        raise ValueError(
            f"not a Chroma checkpoint: model_type is {top.values.get('model_type')!r} "
            f"(architectures {architectures}), wanted 'chroma'"
        )
    if architectures and "ChromaForConditionalGeneration" not in architectures:
        raise ValueError(
            f"unknown architecture: architectures is {architectures}, wanted ['ChromaForConditionalGeneration']"
        )
    thinker = top.section("thinker_config")
    text, audio = thinker.section("text_config"), thinker.section("audio_config")
    backbone, decoder = top.section("backbone_config"), top.section("decoder_config")
    frame_samples = top.size("audio_frame_freq")
    codec = _read_codec(top.section("codec_config"), frame_samples)
    if frame_samples != codec.frame_samples:
        raise ValueError(
            f"audio_frame_freq is {frame_samples} but codec_config gives {codec.frame_samples} samples a frame"
        )
    num_codebooks = top.size("audio_num_codebooks")
    for section in (backbone, decoder):
        if section.size("audio_num_codebooks") != num_codebooks:
            raise ValueError(
                f"{section.key('audio_num_codebooks')} is {section.size('audio_num_codebooks')} "
                f"but audio_num_codebooks is {num_codebooks}"
            )
    # The flag stands at either level; the checkpoint's own tensors have the last word (see checkpoint/).
    tied = (thinker if thinker.has("tie_word_embeddings") else text).flag("tie_word_embeddings")
    return ChromaConfig(
        reasoner=ReasonerConfig(
            text=_read_llama(text, qkv_bias=True),
            audio=_read_audio_encoder(audio),
            vocab_size=text.size("vocab_size"),
            tie_embeddings=tied,
            audio_token_id=thinker.id(
                "audio_token_index"
                if thinker.has("audio_token_index") or not thinker.has("audio_token_id")
                else "audio_token_id"
            ),
            audio_start_token_id=thinker.id("audio_start_token_id"),
            audio_end_token_id=thinker.id("audio_end_token_id"),
            # What stands where nothing is read: any token will do.
            pad_token_id=thinker.id("pad_token_id", top.id("im_end_token_id")),
        ),
        backbone=BackboneConfig(
            llama=_read_llama(backbone, qkv_bias=False),
            num_codebooks=num_codebooks,
            vocab_size=backbone.size("vocab_size"),
        ),
        decoder=DecoderConfig(
            llama=_read_llama(decoder, qkv_bias=False),
            num_codebooks=num_codebooks,
            vocab_size=decoder.size("vocab_size"),
            embedding_size=decoder.size("audio_embedding_dim"),
            shared_first_position=decoder.flag("shared_first_position", True),
        ),
        codec=codec,
        text_start_token_id=top.id("text_start_token_id"),
        text_end_token_id=top.id("text_end_token_id"),
        im_end_token_id=top.id("im_end_token_id"),
        codebook_pad_token_id=top.id("codebook_pad_token_id"),
        codebook_eos_token_id=top.id("codebook_eos_token_id"),
        quantized=_read_quantized(top),
    )


# transformers' key for what a checkpoint's weights are held in, and our name in it.
_QUANTIZATION, _QUANT_METHOD = "quantization_config", "chroma_jax"


def _read_quantized(top: _Section) -> str | None:
    if not top.has(_QUANTIZATION):
        return None
    section = top.section(_QUANTIZATION)
    if section.values.get("quant_method") != _QUANT_METHOD:
        method = _short(section.values.get("quant_method"))
        raise ValueError(
            f"{_QUANTIZATION}: weights quantised by {method} cannot be read; the checkpoint that they were made from can"
        )
    section.expect("weights", *QUANTIZED)
    if not section.has("weights"):
        raise ValueError(f"missing key {section.key('weights')}")
    return section.values["weights"]


def write_quantized(kind: str | None) -> dict[str, Any]:
    """What config.json says of quantised weights; nothing for None."""
    if kind is None:
        return {}
    return {_QUANTIZATION: {"quant_method": _QUANT_METHOD, "weights": kind}}


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.llama3 is not None:
        out |= {
            "rope_type": "llama3",
            "factor": rope.llama3.factor,
            "low_freq_factor": rope.llama3.low_freq_factor,
            "high_freq_factor": rope.llama3.high_freq_factor,
            "original_max_position_embeddings": rope.llama3.original_max_positions,
        }
    if rope.sections is not None:
        out["mrope_section"] = list(rope.sections)
    return out


def _write_llama(c: LlamaConfig) -> dict[str, Any]:
    return {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": _write_rope(c.rope),
        "hidden_act": "silu",
    }


def _write_codec(codec: CodecConfig) -> dict[str, Any]:
    return {
        "model_type": "mimi",
        "sampling_rate": codec.sampling_rate,
        "_frame_rate": codec.frame_rate,
        "audio_channels": codec.audio_channels,
        "hidden_size": codec.hidden_size,
        "num_filters": codec.num_filters,
        "num_residual_layers": codec.num_residual_layers,
        "upsampling_ratios": list(codec.upsampling_ratios),
        "kernel_size": codec.kernel_size,
        "last_kernel_size": codec.last_kernel_size,
        "residual_kernel_size": codec.residual_kernel_size,
        "dilation_growth_rate": codec.dilation_growth_rate,
        "compress": codec.compress,
        "pad_mode": codec.pad_mode,
        "trim_right_ratio": codec.trim_right_ratio,
        "use_causal_conv": True,
        "use_conv_shortcut": codec.use_conv_shortcut,
        "upsample_groups": codec.upsample_groups,
        "codebook_size": codec.codebook_size,
        "codebook_dim": codec.codebook_dim,
        "vector_quantization_hidden_dimension": codec.quantizer_size,
        "num_quantizers": codec.num_quantizers,
        "num_semantic_quantizers": codec.num_semantic_quantizers,
        "num_hidden_layers": codec.num_layers,
        "num_attention_heads": codec.num_heads,
        "num_key_value_heads": codec.num_kv_heads,
        "head_dim": codec.head_dim,
        "intermediate_size": codec.intermediate_size,
        "norm_eps": codec.norm_eps,
        "rope_parameters": _write_rope(codec.rope),
        "sliding_window": codec.sliding_window,
        "layer_scale_initial_scale": codec.layer_scale_initial,
        "hidden_act": "gelu",
    }


def _write_chroma(c: ChromaConfig) -> dict[str, Any]:
    audio, codec = c.reasoner.audio, c.codec
    audio_stack = {"audio_num_codebooks": c.num_codebooks, "vocab_size": c.backbone.vocab_size}
    return {
        "architectures": ["ChromaForConditionalGeneration"],
        "model_type": "chroma",
        "audio_frame_freq": codec.frame_samples,
        "audio_num_codebooks": c.num_codebooks,
        "text_start_token_id": c.text_start_token_id,
        "text_end_token_id": c.text_end_token_id,
        "im_end_token_id": c.im_end_token_id,
        "codebook_pad_token_id": c.codebook_pad_token_id,
        "codebook_eos_token_id": c.codebook_eos_token_id,
        "thinker_config": {
            "model_type": "qwen2_5_omni_thinker",
            "tie_word_embeddings": c.reasoner.tie_embeddings,
            "audio_token_index": c.reasoner.audio_token_id,
            "audio_start_token_id": c.reasoner.audio_start_token_id,
            "audio_end_token_id": c.reasoner.audio_end_token_id,
            "pad_token_id": c.reasoner.pad_token_id,
            "text_config": _write_llama(c.reasoner.text)
            | {"model_type": "qwen2_5_omni_text", "vocab_size": c.reasoner.vocab_size},
            "audio_config": {
                "model_type": "qwen2_5_omni_audio_encoder",
                "num_mel_bins": audio.num_mel_bins,
                "d_model": audio.hidden_size,
                "encoder_ffn_dim": audio.intermediate_size,
                "encoder_layers": audio.num_layers,
                "encoder_attention_heads": audio.num_heads,
                "n_window": audio.window,
                "output_dim": audio.output_size,
                "activation_function": "gelu",
            },
        },
        "backbone_config": _write_llama(c.backbone.llama)
        | audio_stack
        | {"model_type": "chroma_backbone"},
        "decoder_config": _write_llama(c.decoder.llama)
        | audio_stack
        | {
            "model_type": "chroma_decoder",
            "audio_embedding_dim": c.decoder.embedding_size,
            "shared_first_position": c.decoder.shared_first_position,
        },
        "codec_config": _write_codec(codec),
    } | write_quantized(c.quantized)
