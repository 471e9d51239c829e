"""Sound files and arrays <-> mono float32 samples.

Axes: N samples, C channels.

soundfile and soxr are imported where they are used: machines that only run the model may lack them.
"""

from __future__ import annotations

import io
import os
import wave
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from chroma_jax import messages, paths

# A path, an encoded file as bytes, an open binary file, or (samples [N], [N, C] or [C, N], sampling rate in Hz).
AudioSource = str | os.PathLike | bytes | BinaryIO | tuple[ArrayLike, int]

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz: nothing that holds speech lies outside
MAX_SECONDS = 2 * 3600
# Floats mean full scale 1. Some files overshoot it; only 16-bit integers that were cast to float get this far.
MAX_PEAK = 100.0
MAX_CHANNELS = 64  # more are a spectrogram
# One axis of 1, the other no longer than this: one moment of several channels, such as a stereo pair, not a few samples of one.
_CHANNELS_OF_A_MOMENT = 8
_BLOCK_VALUES = 1 << 20  # samples decoded at a time, over all channels
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's "length unknown" lies above this
_OTHER_FORMATS = (".aac", ".aiff", ".au", ".flac", ".m4a", ".mp3", ".mp4", ".ogg", ".opus", ".webm")


class AudioError(ValueError):
    """Sound that cannot be read, used or written; the message, one line of at most 200 characters, names file or argument."""

    def __init__(self, message: str):
        super().__init__(messages.shorten(message))


def load_audio(source: AudioSource, sampling_rate: int, *, name: str | None = None) -> np.ndarray:
    """Reads sound of any rate and channel count as mono float32 [N] at `sampling_rate` Hz, full scale ±1.

    `source` is a path or encoded file of any kind that libsndfile reads (WAV, FLAC, OGG, Opus, MP3, ...), or a pair
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
        samples, rate = _from_file(source, name)
    if not samples.size:
        raise AudioError(f"{name}: has no samples")
    _check_samples(samples, name)
    if rate != sampling_rate:
        samples = _soxr().resample(samples, rate, sampling_rate, quality="HQ")
        if not samples.size:
            raise AudioError(f"{name}: too short, it has no samples at {sampling_rate} Hz")
    return np.ascontiguousarray(samples, np.float32)


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
        samples = _as_array(samples, self._name)
        channels = self._channels
        if samples.size:
            if samples.ndim == 2 and max(samples.shape) > _CHANNELS_OF_A_MOMENT:
                channels = _channels_axis(samples.shape)
            samples, rate = _from_array((samples, rate), self._name, channels)
            _check_samples(samples, self._name)
        else:
            samples, rate = np.zeros(0, np.float32), _check_rate(rate, self._name)
        if self._from not in (None, rate):
            raise AudioError(f"{self._name}: the rate was {self._from} Hz, and is now {rate}")
        if self._from is None and rate != self._to:
            self._resampler = _soxr().ResampleStream(
                rate, self._to, 1, dtype="float32", quality="HQ"
            )
        self._from, self._channels = rate, channels
        return self._resampler.resample_chunk(samples) if self._resampler else samples

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
                _soundfile().write(partial, samples, sampling_rate, subtype="FLOAT", format="WAV")
                return
            # 32768 on both ways, so that what was read as 16 bits is written back unchanged.
            pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")
            with open(partial, "wb") as f, wave.open(f, "wb") as w:
                w.setnchannels(1)
                w.setsampwidth(2)
                w.setframerate(sampling_rate)
                w.writeframes(pcm.tobytes())
    except (OSError, RuntimeError, wave.Error) as e:
        raise AudioError(f"{os.fspath(path)}: cannot be written: {_one_line(e)}") from e


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
        raise AudioError(f"{name}: cannot be written: {_one_line(e)}") from e
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
        raise AudioError(f"{name}: samples are not an array: {_one_line(e)}") from e


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
    rate = _check_rate(rate, name)
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


def _from_file(source: AudioSource, name: str) -> tuple[np.ndarray, int]:
    """(samples [N] float32, rate) of a path, bytes or an open file."""
    soundfile = _soundfile()
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            file = _Encoded(source)
        elif hasattr(source, "read"):
            # Read whole: decoders seek, and not every open file can.
            file = _Encoded(source.read())
        else:
            file = paths.expand(source)
            if file.startswith("data:"):
                raise AudioError(f"{name}: is a data: URL, not a path; pass the bytes in it")
            if "://" in file and not os.path.exists(file):
                raise AudioError(f"{name}: is a URL, which is not fetched; pass a path or bytes")
            if os.path.isdir(file):
                raise AudioError(f"{name}: is a directory, wanted a sound file")
            if not os.path.exists(file):
                raise AudioError(f"{name}: no such file")
            if not os.path.isfile(file):
                raise AudioError(f"{name}: is not an ordinary file")
            open(file, "rb").close()  # says why, where libsndfile says "System error"
    except AudioError:
        raise
    except (OSError, TypeError, ValueError) as e:
        raise AudioError(f"{name}: cannot be read: {_one_line(e)}") from e
    try:
        with soundfile.SoundFile(file) as sound:
            return _read_blocks(sound, name)
    except AudioError:
        raise
    except (
        soundfile.SoundFileError,
        RuntimeError,
        OSError,
        TypeError,
        ValueError,
        MemoryError,
    ) as e:
        detail = getattr(e, "error_string", None) or _one_line(e)
        raise AudioError(f"{name}: not a sound file that can be read: {detail}") from e


class _Encoded(io.BytesIO):
    """An encoded file in memory. Broken ones make libsndfile seek before the start, from where no exception can reach us."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except (OverflowError, ValueError):
            return self.tell()


def _read_blocks(sound, name: str) -> tuple[np.ndarray, int]:
    """Decodes an open SoundFile. A header may lie about the length, so memory follows what is really there."""
    rate = _check_rate(sound.samplerate, name)
    limit = MAX_SECONDS * rate
    too_long = AudioError(f"{name}: longer than {MAX_SECONDS // 3600} hours")
    if limit < sound.frames < _UNKNOWN_FRAMES:
        raise too_long
    blocks, total = [], 0
    while True:
        block = sound.read(max(1, _BLOCK_VALUES // sound.channels), dtype="float32", always_2d=True)
        if not len(block):
            break
        total += len(block)
        if total > limit:
            raise too_long
        with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
            blocks.append(block.mean(axis=1))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate


def _check_rate(rate: object, name: str) -> int:
    is_number = isinstance(rate, int | float | np.integer | np.floating) and not isinstance(
        rate, bool
    )
    if not is_number or not MIN_RATE <= rate <= MAX_RATE or rate != int(rate):
        raise AudioError(
            f"{name}: sampling rate must be a whole number of Hz from {MIN_RATE} to {MAX_RATE}, got {rate!r}"
        )
    return int(rate)


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


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _soundfile():
    try:
        import soundfile
    except (ImportError, OSError) as e:  # OSError: the wheel without its libsndfile
        raise AudioError("reading sound files needs soundfile: pip install soundfile soxr") from e
    return soundfile


def _soxr():
    try:
        import soxr
    except ImportError as e:
        raise AudioError("changing the sampling rate needs soxr: pip install soundfile soxr") from e
    return soxr
