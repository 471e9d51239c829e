"""Whisper's log-mel features as the Reasoner wants them, and their cut into encoder chunks.

Axes: N samples, M mel frames, F mel bins, C chunks.

Source: the feature extraction of Whisper (arXiv 2212.04356), as transformers' `WhisperFeatureExtractor` with
`padding="max_length"` computes it for Qwen2.5-Omni: the clip is padded with silence to 300 s, transformed, and the frames
that lie in the clip are kept. The loudest bin of the whole clip sets the floor of every frame (8 decades below it), so the features of
a clip are defined only when the clip is complete: features of a part differ where the rest is louder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chroma_jax.audio.wav import AudioError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MelConfig:
    """Settings of the features; the values are Qwen2.5-Omni's, a checkpoint's preprocessor_config.json overrides them."""

    num_mel_bins: int = 128
    sampling_rate: int = 16000
    n_fft: int = 400
    hop_length: int = 160
    max_seconds: int = 300

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value <= 0:
                raise ValueError(f"mel {field.name} must be a positive integer, got {value!r}")
        if self.max_samples % self.hop_length:
            raise ValueError(
                f"mel hop_length {self.hop_length} must divide the {self.max_samples} samples of {self.max_seconds} s"
            )
        if self.sampling_rate < 16000:
            raise ValueError(
                f"mel sampling_rate must be at least 16000 (the bins reach 8 kHz), got {self.sampling_rate}"
            )

    @property
    def max_samples(self) -> int:
        """Longest clip."""
        return self.max_seconds * self.sampling_rate

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> MelConfig:
        """Reads the dictionary of a preprocessor_config.json. Raises ValueError for another kind of features."""
        if not isinstance(values, Mapping):
            raise ValueError(f"preprocessor config must be an object, got {type(values).__name__}")
        kind = values.get("feature_extractor_type")
        if kind not in (None, "WhisperFeatureExtractor"):
            raise ValueError(
                f"feature_extractor_type must be WhisperFeatureExtractor, got {kind!r}"
            )
        for key in ("dither", "padding_value"):
            if values.get(key) not in (None, 0, 0.0):
                raise ValueError(f"{key} must be 0, got {values[key]!r}")
        names = {
            "feature_size": "num_mel_bins",
            "sampling_rate": "sampling_rate",
            "n_fft": "n_fft",
            "hop_length": "hop_length",
            "chunk_length": "max_seconds",
        }
        return cls(
            **{name: values[key] for key, name in names.items() if values.get(key) is not None}
        )

    @classmethod
    def load(cls, directory: str | os.PathLike, default: MelConfig | None = None) -> MelConfig:
        """The settings of a checkpoint directory: preprocessor_config.json, or the `feature_extractor` of
        processor_config.json, or `default` where there is neither. Raises ValueError naming the file."""
        for file, section in (
            ("preprocessor_config.json", None),
            ("processor_config.json", "feature_extractor"),
        ):
            path = os.path.join(directory, file)
            if not os.path.isfile(path):
                continue
            try:
                with open(path, encoding="utf-8") as f:
                    values = json.load(f)
                if section is not None:
                    values = values.get(section) if isinstance(values, Mapping) else None
                if values is not None:
                    return cls.from_hf(values)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path}: {e}") from e
        return default or cls()


def log_mel(
    samples: np.ndarray, config: MelConfig | None = None, *, name: str = "audio"
) -> np.ndarray:
    """Features [M, F] float32 of a whole mono clip [N] at `config.sampling_rate`, M = ceil(N / hop_length).

    Raises AudioError, naming the clip by `name`, when it is empty or longer than `config.max_seconds`.
    """
    config = config or MelConfig()
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or not samples.size:
        raise AudioError(
            f"{name}: samples must be [N] with N at least 1, got shape {list(samples.shape)}"
        )
    if samples.size > config.max_samples:
        seconds = samples.size / config.sampling_rate
        raise AudioError(
            f"{name}: {seconds:.1f} s long, the longest the model hears is {config.max_seconds} s"
        )
    hop, half = config.hop_length, config.n_fft // 2
    # Of the silence up to max_seconds only what a window can reach together with the clip matters: the other frames are
    # at the absolute floor and never the loudest.
    padded = min(config.max_samples, -(-(samples.size + config.n_fft) // hop) * hop)
    wave = np.pad(samples, (0, padded - samples.size)).astype(np.float64)
    wave = np.pad(wave, half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(wave, config.n_fft)[:padded:hop]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.n_fft) / config.n_fft)
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    log = np.log10(np.maximum(power @ _mel_filters(config), 1e-10))
    log = np.maximum(log, log.max() - 8.0)
    num_frames = -(-samples.size // hop)
    return ((log[:num_frames] + 4.0) / 4.0).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _mel_filters(config: MelConfig) -> np.ndarray:
    """Triangular filters [n_fft / 2 + 1, F] on the Slaney mel scale, up to 8 kHz."""
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(
        num_frequency_bins=1 + config.n_fft // 2,
        num_mel_filters=config.num_mel_bins,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=config.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )


def mel_chunks(mels: Sequence[np.ndarray], chunk_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts clips [M_i, F] into the audio encoder's independent chunks, in order.

    Returns chunks [C, chunk_frames, F] float32, zero beyond their lengths, and lengths [C] int32. Only the last chunk of
    each clip can be partial. Without clips both are empty ([0, chunk_frames, 0] and [0]).
    """
    pieces = [mel[i : i + chunk_frames] for mel in mels for i in range(0, len(mel), chunk_frames)]
    num_bins = mels[0].shape[1] if mels else 0
    chunks = np.zeros((len(pieces), chunk_frames, num_bins), np.float32)
    for chunk, piece in zip(chunks, pieces, strict=True):
        chunk[: len(piece)] = piece
    return chunks, np.array([len(piece) for piece in pieces], np.int32)
