"""Whisper's log-mel features as the Reasoner wants them, and their cut into encoder chunks.

Axes: N samples, M mel frames, F mel bins, C chunks.

Source: the feature extraction of Whisper (arXiv 2212.04356), as transformers' `WhisperFeatureExtractor` with
`padding="max_length"` computes it for Qwen2.5-Omni: the clip is padded with silence to 300 s, transformed, and the frames
that lie in the clip are kept. The loudest bin of the whole clip sets the floor of every frame (8 decades below it), so the features of
a clip are defined only when the clip is complete: features of a part differ where the rest is louder (`MelStream` tells where).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chroma_jax import paths
from chroma_jax.audio.wav import AudioError
from chroma_jax.messages import shown


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
                raise ValueError(f"mel {field.name} must be a positive integer, got {shown(value)}")
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
                f"feature_extractor_type must be WhisperFeatureExtractor, got {shown(kind)}"
            )
        for key in ("dither", "padding_value"):
            if values.get(key) not in (None, 0, 0.0):
                raise ValueError(f"{key} must be 0, got {shown(values[key])}")
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
        directory = paths.expand(directory)
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
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or not samples.size:
        raise AudioError(
            f"{name}: samples must be [N] with N at least 1, got shape {list(samples.shape)}"
        )
    stream = MelStream(config, name=name)
    stream.push(samples)
    stream.finish()
    return stream.features(0, stream.num_frames)


class MelStream:
    """`log_mel` of a clip that is still being spoken.

    The floor of all frames follows from the loudest bin of the whole clip, so it rises while the clip grows: what `features`
    gives of a frame is final when `finish` has been called, and before that as long as `floor` stays where `lowest` of the frame is not
    below it.

    Args:
      config: settings of the features.
      name: what errors call the clip.
    """

    def __init__(self, config: MelConfig | None = None, *, name: str = "audio"):
        self.config = config or MelConfig()
        self._name = name
        self.num_samples = 0
        self._finished = False
        # Samples from where the next frame's window begins; the window of frame 0 is centred on sample 0.
        self._wave = np.zeros(0)
        self._blocks: list[np.ndarray] = []  # [m, F] log10 of the power, unclamped
        self._computed = 0
        self._loudest = -np.inf

    @property
    def num_frames(self) -> int:
        """Frames that `features` can give; after `finish` all of the clip."""
        if self._finished:
            return -(-self.num_samples // self.config.hop_length)
        return self._computed

    @property
    def floor(self) -> float:
        """The smallest log10 that a frame can have, as far as is known."""
        return self._loudest - 8.0

    def push(self, samples: np.ndarray) -> None:
        """The next samples [n]. Raises AudioError when the clip becomes longer than `config.max_seconds`; then nothing is taken in."""
        half = self.config.n_fft // 2
        total = self.num_samples + len(samples)
        self.check_length(total)
        self._wave = np.concatenate([self._wave, np.asarray(samples, np.float64)])
        begins = self.num_samples <= half < total
        self.num_samples = total
        if begins:  # before its start the clip is mirrored
            self._wave = np.concatenate([self._wave[half:0:-1], self._wave])
        if total > half:
            self._transform()

    def check_length(self, num_samples: int) -> None:
        """Raises AudioError where a clip of so many samples is longer than `config.max_seconds`."""
        config = self.config
        if num_samples > config.max_samples:
            raise AudioError(
                f"{self._name}: {num_samples / config.sampling_rate:.1f} s long, the longest the model hears is {config.max_seconds} s"
            )

    def finish(self) -> None:
        """Nothing follows but the silence up to `config.max_seconds`."""
        hop, size, half = self.config.hop_length, self.config.n_fft, self.config.n_fft // 2
        # Of that silence only what a window can reach together with the clip matters: the other frames are at the absolute
        # floor and never the loudest.
        padded = min(self.config.max_samples, -(-(self.num_samples + size) // hop) * hop)
        wave = np.concatenate([self._wave, np.zeros(padded - self.num_samples)])
        if self.num_samples <= half:
            wave = np.concatenate([wave[half:0:-1], wave])
        self._wave = np.concatenate([wave, wave[-2 : -2 - half : -1]])
        self._transform(padded // hop)
        self._finished = True

    def features(self, start: int, stop: int) -> np.ndarray:
        """Frames start..stop-1 [M, F] float32, with the floor that is known so far."""
        log = np.maximum(self._log()[start:stop], self.floor)
        return ((log + 4.0) / 4.0).astype(np.float32)

    def lowest(self, start: int, stop: int) -> float:
        """The smallest log10 in frames start..stop-1: a floor that rises above it changes them."""
        return float(self._log()[start:stop].min())

    def _log(self) -> np.ndarray:
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0]

    def _transform(self, most: int | None = None) -> None:
        """All frames, up to number `most`, whose windows lie in what there is."""
        config, size, hop = self.config, self.config.n_fft, self.config.hop_length
        count = max(0, (len(self._wave) - size) // hop + 1)
        if most is not None:
            count = min(count, most - self._computed)
        if not count:
            return
        frames = np.lib.stride_tricks.sliding_window_view(self._wave, size)[: count * hop : hop]
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
        power = np.abs(np.fft.rfft(frames * window)) ** 2
        log = np.log10(np.maximum(power @ _mel_filters(config), 1e-10))
        self._loudest = max(self._loudest, float(log.max()))
        self._blocks.append(log)
        self._computed += count
        self._wave = self._wave[count * hop :]


@functools.lru_cache(maxsize=4)
def _mel_filters(config: MelConfig) -> np.ndarray:
    """Triangular filters [n_fft / 2 + 1, F] of equal area, their corners evenly spaced on the Slaney mel scale up to 8 kHz."""
    # The scale is linear up to 1 kHz, at mel 15, and logarithmic beyond: 27 mel make a factor of 6.4.
    knee_hz, knee, rate = 1000.0, 15.0, np.log(6.4) / 27.0
    top = knee + np.log(8000.0 / knee_hz) / rate
    mels = np.linspace(0.0, top, config.num_mel_bins + 2)
    beyond = knee_hz * np.exp(rate * (mels - knee))
    corners = np.where(mels < knee, mels * (knee_hz / knee), beyond)  # [F + 2], Hz
    bins = np.linspace(0, config.sampling_rate // 2, 1 + config.n_fft // 2)
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins[:, None] - low) / (centre - low)
    falling = (high - bins[:, None]) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))


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
