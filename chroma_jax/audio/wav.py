"""Sound files and arrays <-> mono float32 samples.

Axes: N samples, C channels.

Files are read by `audio.decode`.
"""

from __future__ import annotations

import os
import wave
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from chroma_jax import messages, paths
from chroma_jax.audio.decode import (
    MAX_SECONDS,
    AudioError,
    check_rate,
    one_line,
    read_file,
    soundfile,
    soxr,
)

# A path, an encoded file as bytes, an open binary file, or (samples [N], [N, C] or [C, N], sampling rate in Hz).
AudioSource = str | os.PathLike | bytes | BinaryIO | tuple[ArrayLike, int]

# Floats mean full scale 1. Some files overshoot it; only 16-bit integers that were cast to float get this far.
MAX_PEAK = 100.0
MAX_CHANNELS = 64  # more are a spectrogram
# One axis of 1, the other no longer than this: one moment of several channels, such as a stereo pair, not a few samples of one.
_CHANNELS_OF_A_MOMENT = 8
_OTHER_FORMATS = (".aac", ".aiff", ".au", ".flac", ".m4a", ".mp3", ".mp4", ".ogg", ".opus", ".webm")


def load_audio(source: AudioSource, sampling_rate: int, *, name: str | None = None) -> np.ndarray:
    """Reads sound of any rate and channel count as mono float32 [N] at `sampling_rate` Hz, full scale ±1.

    `source` is a path or encoded file of any kind that libsndfile reads (WAV, FLAC, OGG, Opus, MP3, ...), with PyAV also M4A, WebM and
    others, told by its bytes and not by its name; all streams in it are heard, and what cannot be heard is a warning. Or it is a pair
    (samples, rate) of integers (uint8, int8, int16, int32: scaled by their full scale) or floats, of any byte order. Channels are
    mixed down by their mean; in a two-dimensional array the shorter axis is the channels (but [1, 2] is one moment of two, not two
    of one: so up to [1, 8]). Resampling is soxr's high quality.
    `name` is what errors call the sound; a path names itself.

    Raises AudioError, a ValueError, naming the source: no such file, a directory, not sound, no samples, NaN or infinite
    samples, an absurd rate, floats far beyond full scale, more than two hours, an array of the wrong rank or type.
    """
    name = _name(source, name)
    if isinstance(source, tuple):
        samples, rate = _from_array(source, name)
    else:
        samples, rate = read_file(source, name)
    if not samples.size:
        raise AudioError(f"{name}: has no samples")
    _check_samples(samples, name)
    if rate != sampling_rate:
        samples = resample(samples, rate, sampling_rate)
        if not samples.size:
            raise AudioError(f"{name}: too short, it has no samples at {sampling_rate} Hz")
    return np.ascontiguousarray(samples, np.float32)


def resample(samples: np.ndarray, from_rate: float, to_rate: float) -> np.ndarray:
    """Mono samples [N] float32 at another rate; rates need not be whole. soxr's high quality."""
    return soxr().resample(samples, from_rate, to_rate, quality="HQ")


class AudioStream:
    """`load_audio` of a recording that is still being made: any split gives the same samples.

    Args:
      sampling_rate: Hz of what `push` gives.
      name: what errors call the recording.
    """

    def __init__(self, sampling_rate: int, *, name: str = "audio"):
        self._to, self._name = sampling_rate, name
        self._from: int | None = None
        self._channels: int | None = None  # the axis that they were on so far
        self._resampler = None

    def push(self, samples: ArrayLike, rate: int) -> np.ndarray:
        """The next samples, as `load_audio` takes them, which may be none -> mono float32 [n] as far as they can be told.

        Pieces so short that their shape does not say which axis is the channels' have them where longer ones before had them.

        Raises AudioError as `load_audio`, and when the rate changes; then nothing is taken in.
        """
        samples, rate, channels = self._checked(samples, rate)
        if self._from is None and rate != self._to:
            self._resampler = soxr().ResampleStream(
                rate, self._to, 1, dtype="float32", quality="HQ"
            )
        self._from, self._channels = rate, channels
        return self._resampler.resample_chunk(samples) if self._resampler else samples

    def check(self, samples: ArrayLike, rate: int) -> tuple[int, int]:
        """How many samples these are at their own rate, and that rate, if `push` would take them; it changes nothing.

        Raises AudioError as `push`.
        """
        samples, rate, _ = self._checked(samples, rate)
        return len(samples), rate

    def _checked(self, samples: ArrayLike, rate: int) -> tuple[np.ndarray, int, int | None]:
        samples = _as_array(samples, self._name)
        channels = self._channels
        if samples.size:
            if samples.ndim == 2 and max(samples.shape) > _CHANNELS_OF_A_MOMENT:
                channels = _channels_axis(samples.shape)
            samples, rate = _from_array((samples, rate), self._name, channels)
            _check_samples(samples, self._name)
        else:
            samples, rate = np.zeros(0, np.float32), check_rate(rate, self._name)
        if self._from not in (None, rate):
            raise AudioError(f"{self._name}: the rate was {self._from} Hz, and is now {rate}")
        return samples, rate, channels

    def finish(self) -> np.ndarray:
        """What was held back to be told with what would follow."""
        if not self._resampler:
            return np.zeros(0, np.float32)
        return self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def save_wav(
    path: str | os.PathLike, samples: ArrayLike, sampling_rate: int, *, subtype: str = "PCM_16"
) -> None:
    """Writes mono samples [N], full scale ±1, as a WAV file; what goes beyond full scale is clipped.

    `subtype` is PCM_16 or FLOAT (32 bits, not clipped). The file appears under its name only when it is complete. Raises AudioError for
    samples that are not one-dimensional or not finite, a path of another format, and a path that cannot be written.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise AudioError(
            f"{os.fspath(path)}: samples must be [N], mono, got shape {list(samples.shape)}"
        )
    samples = samples.astype(np.float32)
    if not np.isfinite(samples).all():
        raise AudioError(f"{os.fspath(path)}: samples to write hold NaN or infinite values")
    if subtype not in ("PCM_16", "FLOAT"):
        raise AudioError(f"{os.fspath(path)}: subtype must be PCM_16 or FLOAT, got {subtype!r}")
    target = check_output(path)
    try:
        with paths.replacing(target) as partial:
            if subtype == "FLOAT":
                soundfile().write(partial, samples, sampling_rate, subtype="FLOAT", format="WAV")
                return
            # 32768 on both ways, so that what was read as 16 bits is written back unchanged.
            pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")
            with open(partial, "wb") as f, wave.open(f, "wb") as w:
                w.setnchannels(1)
                w.setsampwidth(2)
                w.setframerate(sampling_rate)
                w.writeframes(pcm.tobytes())
    except (OSError, RuntimeError, wave.Error) as e:
        raise AudioError(f"{os.fspath(path)}: cannot be written: {one_line(e)}") from e


def check_output(path: str | os.PathLike, inputs: Iterable[AudioSource | None] = ()) -> str:
    """The resolved path if a WAV file can be written there, asked before long work.

    `inputs` are what the work reads, and is not to be written over. Raises AudioError if not.
    """
    name = os.fspath(path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise AudioError(f"output path {name!r} is not a file name")
    target = os.path.realpath(paths.expand(name))
    folder = os.path.dirname(target)
    try:
        os.lstat(target)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise AudioError(f"{name}: there is no directory {folder}") from None
    except OSError as e:  # a name too long, for one
        raise AudioError(f"{name}: cannot be written: {one_line(e)}") from e
    for source in inputs:
        if isinstance(source, str | os.PathLike) and paths.same(source, target):
            raise AudioError(f"{name}: is one of the inputs, it will not be replaced")
    if os.path.splitext(target)[1].lower() in _OTHER_FORMATS:
        raise AudioError(f"{name}: only WAV is written, give a name that ends in .wav")
    if os.path.isdir(target):
        raise AudioError(f"{name}: is a directory, wanted a file name")
    if os.path.exists(target) and not os.path.isfile(target):
        raise AudioError(f"{name}: is not an ordinary file, it will not be replaced")
    if not os.path.isdir(folder):
        raise AudioError(f"{name}: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise AudioError(f"{name}: the directory {folder} cannot be written to")
    return target


def _check_samples(samples: np.ndarray, name: str) -> None:
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: has NaN or infinite samples")
    peak = float(np.abs(samples).max())
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name}: float samples reach {peak:g}, but full scale is 1; divide them, or pass integers as integers"
        )


def _as_array(samples: ArrayLike, name: str) -> np.ndarray:
    try:
        return np.asarray(samples)
    except (TypeError, ValueError) as e:
        raise AudioError(f"{name}: samples are not an array: {one_line(e)}") from e


def _channels_axis(shape: tuple[int, int]) -> int:
    """Which axis of [N, C] or [C, N] is the channels'."""
    first, second = shape
    if first == 1 and second <= _CHANNELS_OF_A_MOMENT:
        return 1
    return 0 if first < second else 1


def _from_array(source: tuple, name: str, channels: int | None = None) -> tuple[np.ndarray, int]:
    """(samples [N] float32, rate) of a pair; `channels` is the axis on which they are, where that is known."""
    if len(source) != 2:
        raise AudioError(f"{name}: wanted (samples, sampling rate), got a tuple of {len(source)}")
    samples, rate = source
    if isinstance(samples, int | float | np.number) and not isinstance(
        rate, int | float | np.number
    ):
        raise AudioError(f"{name}: wanted (samples, sampling rate), got them the other way round")
    rate = check_rate(rate, name)
    samples = _as_array(samples, name)
    if samples.ndim not in (1, 2):
        raise AudioError(
            f"{name}: samples must be [N], [N, C] or [C, N], got shape {list(samples.shape)}"
        )
    if not samples.size:
        raise AudioError(f"{name}: has no samples")
    if samples.ndim == 2 and min(samples.shape) > MAX_CHANNELS:
        raise AudioError(
            f"{name}: samples must be [N], [N, C] or [C, N], got shape {list(samples.shape)}: no sound has so many channels"
        )
    if max(samples.shape) > MAX_SECONDS * rate:
        raise AudioError(f"{name}: longer than {MAX_SECONDS // 3600} hours")
    if not samples.dtype.isnative:
        samples = samples.astype(samples.dtype.newbyteorder("="))
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128.0) / 128.0
    elif samples.dtype in (np.int8, np.int16, np.int32):
        full_scale = -float(np.iinfo(samples.dtype).min)
        samples = (samples / full_scale).astype(np.float32)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(
            f"{name}: samples must be floats, uint8, int8, int16 or int32, got {samples.dtype}"
        )
    if samples.ndim == 2:
        samples = samples.mean(axis=_channels_axis(samples.shape) if channels is None else channels)
    with np.errstate(
        over="ignore"
    ):  # a float64 too large for float32 becomes infinite, and is refused as such
        return samples.astype(np.float32), rate


def _name(source: object, name: str | None) -> str:
    """What errors call the source: the name given, or else its own."""
    if isinstance(source, tuple):
        own = "audio array"
    elif isinstance(source, str | os.PathLike):
        own = str(source) or "audio path ''"
    elif isinstance(source, bytes | bytearray | memoryview):
        own = "audio bytes"
    elif hasattr(source, "read"):
        own = getattr(source, "name", None)
        own = own if isinstance(own, str) else "audio file"
    else:
        raise AudioError(
            f"{name or 'audio'} must be a path, bytes, an open file or (samples, rate), got {type(source).__name__}"
        )
    return messages.shorten(name or own, 100)
