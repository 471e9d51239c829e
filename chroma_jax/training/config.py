"""What a training run is told: typed, and checked when it is made. Values live in configs/*.py."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from chroma_jax.config.types import REMAT

DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("constant", "cosine")
SPEECH, TEXT, CODEC = "speech", "text", "codec"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, clipping by the global norm, and a learning rate over steps.

    The rate rises linearly over `warmup_steps` to `learning_rate`, then stays ("constant") or falls along a half cosine
    to `final_fraction` of it at `total_steps` ("cosine"). `clip_norm` None: no clipping.
    """

    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float | None
    schedule: str
    warmup_steps: int
    total_steps: int
    final_fraction: float = 0.0

    def __post_init__(self):
        _one_of("optimizer.schedule", self.schedule, SCHEDULES)
        for name, low, high in (
            ("learning_rate", 0.0, math.inf),
            ("weight_decay", 0.0, math.inf),
            ("warmup_steps", 0, math.inf),
            ("total_steps", 1, math.inf),
            ("final_fraction", 0.0, 1.0),
        ):
            _between(f"optimizer.{name}", getattr(self, name), low, high)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"optimizer.eps must be positive, got {self.eps}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(
                f"optimizer.clip_norm must be positive (None: no clipping), got {self.clip_norm}"
            )
        if self.schedule == "cosine" and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.warmup_steps} must be less than total_steps {self.total_steps}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank fine-tuning: kernels under a "lora" rule become W + alpha / rank * A B, and only A and B train."""

    rank: int
    alpha: float

    def __post_init__(self):
        _between("lora.rank", self.rank, 1, math.inf)
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be positive, got {self.alpha}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Networks on spectra of several resolutions that tell made sound from recorded, and their own optimizer.

    start: the step from which the codec listens to them; they learn from the first one on.
    """

    windows: tuple[int, ...]
    channels: int
    start: int
    adversarial_weight: float
    feature_weight: float
    optimizer: OptimizerConfig

    def __post_init__(self):
        _windows("codec.discriminator.windows", self.windows)
        _between("codec.discriminator.channels", self.channels, 1, math.inf)
        _between("codec.discriminator.start", self.start, 0, math.inf)
        for name in ("adversarial_weight", "feature_weight"):
            _between(f"codec.discriminator.{name}", getattr(self, name), 0.0, math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Code 0 learns what an audio encoder hears, so that it says what is spoken before how it sounds.

    checkpoint: a Chroma whose Reasoner's audio encoder is listened to; it stays as it is. weight: of 1 - cosine between a linear map of
    what the semantic codebooks give and the encoder's features, mean over frames.
    """

    checkpoint: str
    weight: float

    def __post_init__(self):
        _between("codec.distillation.weight", self.weight, 0.0, math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecObjectiveConfig:
    """What a Codec is trained by.

    Attributes:
      mel_windows: samples of each resolution of the mel distance.
      mel_weight, wave_weight, commitment_weight: of the mel distance, the L1 of samples, and the distance of latents to their
        codewords.
      quantizer_start: the step from which latents are quantised. Before it the codec learns without; at it codebooks are made
        by k-means.
      k_means_batches, k_means_rounds: on the latents of how many batches, the first ones of training, and how long.
      decay: of the codebooks' moving averages, per step.
      dead_below: a codeword used less than this part of the mean is dead, and moves to a vector of the batch; looked for
        every dead_every steps.
      depth_fraction: the share of a batch's rows that use only the first few acoustic codebooks, as many as are drawn.
      unquantized_fraction: the share of rows whose latents the decoder gets as they are.
      discriminator: adversarial and feature losses; None: none.
      distillation: of the semantic codebooks, from an audio encoder; None: none.
    """

    mel_windows: tuple[int, ...]
    mel_weight: float
    wave_weight: float
    commitment_weight: float
    quantizer_start: int
    k_means_batches: int
    k_means_rounds: int
    decay: float
    dead_below: float
    dead_every: int
    depth_fraction: float = 0.0
    unquantized_fraction: float = 0.0
    discriminator: DiscriminatorConfig | None = None
    distillation: DistillationConfig | None = None

    def __post_init__(self):
        _windows("codec.mel_windows", self.mel_windows)
        for name, low, high in (
            ("mel_weight", 0.0, math.inf),
            ("wave_weight", 0.0, math.inf),
            ("commitment_weight", 0.0, math.inf),
            ("quantizer_start", 0, math.inf),
            ("k_means_batches", 1, math.inf),
            ("k_means_rounds", 1, math.inf),
            ("decay", 0.0, 1.0),
            ("dead_below", 0.0, 1.0),
            ("dead_every", 1, math.inf),
            ("depth_fraction", 0.0, 1.0),
            ("unquantized_fraction", 0.0, 1.0),
        ):
            _between(f"codec.{name}", getattr(self, name), low, high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage of training.

    Attributes:
      trains: (regular expression, "train" | "freeze" | "lora") pairs; the path of every parameter matches exactly one.
      objective: "speech" trains Backbone and Decoder on the answers' codes, over a frozen Reasoner (the paper); "text" trains the
        Reasoner on the answers' tokens and runs nothing else, for a Chroma that is made from random weights; "codec" trains a
        Codec on sound alone, as `codec` says.
      decoder_weight: λ of L = (1 - λ) L_backbone + λ L_decoder (paper section 4: 0.5, then 1); of "speech" only.
      decoder_fraction: the share of frames that the Decoder's loss is computed on, drawn anew for each step; 1.0: all.
      accumulation: microbatches per step; the result is that of the whole batch.
      compute_dtype: what trained and frozen parameters are cast to inside the step. Master weights of Backbone and
        Decoder, and all moments, are float32.
      reasoner_dtype: what the frozen Reasoner is held in; one that trains is float32.
      remat: what a layer of a LLaMA that trains keeps for its gradient, see `LlamaConfig.remat`.
      seed: of the parameters (where none are given), LoRA factors and drawn frames.
      mesh: size per mesh axis, see `chroma_jax.sharding.make_mesh`; None: one device.
      lora: rank and scale, where a rule says "lora".
      codec: losses and codebooks of objective "codec".
    """

    optimizer: OptimizerConfig
    trains: tuple[tuple[str, str], ...]
    objective: str = SPEECH
    decoder_weight: float = 0.5
    decoder_fraction: float = 1.0
    accumulation: int = 1
    compute_dtype: str
    reasoner_dtype: str = "float32"
    remat: str = "none"
    seed: int = 0
    mesh: Mapping[str, int] | None = None
    lora: LoraConfig | None = None
    codec: CodecObjectiveConfig | None = None

    def __post_init__(self):
        _one_of("objective", self.objective, (SPEECH, TEXT, CODEC))
        if (self.codec is not None) != (self.objective == CODEC):
            raise ValueError(f"codec goes with objective {CODEC!r}, got {self.objective!r}")
        _between("decoder_weight", self.decoder_weight, 0.0, 1.0)
        _between("accumulation", self.accumulation, 1, math.inf)
        if not 0 < self.decoder_fraction <= 1:
            raise ValueError(
                f"decoder_fraction must be above 0 and at most 1, got {self.decoder_fraction}"
            )
        _one_of("compute_dtype", self.compute_dtype, DTYPES)
        _one_of("reasoner_dtype", self.reasoner_dtype, DTYPES)
        _one_of("remat", self.remat, REMAT)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From nested mappings and lists, such as an ml_collections ConfigDict. Raises ValueError naming the key."""
        return read(cls, values, "")


def read(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass of this module's kind from nested mappings. `prefix` goes before keys in errors; ValueError names the key."""
    if not isinstance(values, Mapping) and hasattr(values, "to_dict"):
        values = values.to_dict()
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix[:-1]} must be a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{key}; known are {', '.join(hints)}")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"missing key {prefix}{field.name}")
    return cls(**{k: _convert(hints[k], v, prefix + k) for k, v in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the field's type: nested mappings become dataclasses, whole numbers become floats, lists tuples."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if dataclasses.is_dataclass(kind):
        return read(kind, value, f"{name}.")
    if kind in (int, float, str):
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or isinstance(value, bool):
            raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
        return kind(value)
    if kind == tuple[int, ...]:
        if not all(type(x) is int for x in value):
            raise ValueError(f"{name} must be whole numbers, got {value!r}")
        return tuple(value)
    if typing.get_origin(kind) is tuple:
        pairs = tuple(tuple(pair) for pair in value)
        if not all(len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in pairs):
            raise ValueError(f"{name} must be pairs of strings, got {value!r}")
        return pairs
    return dict(value)


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limit}, got {value}")


def _windows(name: str, windows: tuple[int, ...]) -> None:
    if not windows or any(w < 16 or w % 4 for w in windows):
        raise ValueError(f"{name} must be multiples of 4 from 16 on, got {windows}")
