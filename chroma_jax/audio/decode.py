"""Sound files -> mono float32 samples, by libsndfile and, for what phones and browsers record, by PyAV.

Axes: N samples, C channels.

soundfile, soxr and av are imported where they are used: machines that only run the model may lack them.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from chroma_jax import messages, paths
from chroma_jax.audio.containers import FOREIGN, lay_out
from chroma_jax.audio.frames import Data, Layout, Piece

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz: nothing that holds speech lies outside
MAX_SECONDS = 2 * 3600
_BLOCK_VALUES = 1 << 20  # samples decoded at a time, over all channels
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's "length unknown" lies above this
# Bytes of a sample, of what is stored as it is.
_WIDTHS = {"PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}  # fmt: skip


class AudioError(ValueError):
    """Sound that cannot be read, used or written; the message, one line of at most 200 characters, names file or argument."""

    def __init__(self, message: str):
        super().__init__(messages.shorten(message))


def read_file(source: str | os.PathLike | bytes | BinaryIO, name: str) -> tuple[np.ndarray, int]:
    """(samples [N] float32, rate in Hz) of a file, told by its bytes alone.

    All streams of a file are heard, one after the other. What of it cannot be heard is a warning. Raises AudioError.
    """
    data = _data_of(source, name)
    path = paths.expand(source) if isinstance(source, str | os.PathLike) else None
    layout = lay_out(data)
    problems = list(layout.problems)
    waves: list[np.ndarray] = []
    rate = total = 0
    for i, piece in enumerate(layout.pieces):
        try:
            wave, at = _read_piece(data, piece, path, layout, name, problems)
        except _UndecodableError as e:
            if not i:
                raise AudioError(f"{name}: not a sound file that can be read: {e}") from e
            problems.append(f"its stream {i + 1} of {len(layout.pieces)} cannot be read: {e}")
            continue
        total += len(wave)
        rate = rate or at
        waves.append(wave if at == rate else soxr().resample(wave, at, rate, quality="HQ"))
        if sum(map(len, waves)) > MAX_SECONDS * rate:
            raise _too_long(name)
    if not waves:  # tags alone
        raise AudioError(f"{name}: has no samples")
    if total < layout.samples - layout.slack:
        problems.append(f"{(layout.samples - total) / rate:.1f} s of it cannot be decoded")
    for problem in problems:
        logging.warning("%s: %s", name, problem)
    return waves[0] if len(waves) == 1 else np.concatenate(waves), rate


def check_file(path: str | os.PathLike) -> None:
    """The quick check: a file that begins as sound does. Raises AudioError naming it."""
    name = os.fspath(path)
    data = _data_of(path, name)
    layout = lay_out(data, beginning=True)
    try:
        if layout.kind in FOREIGN:
            next(_av_blocks(data, layout.pieces[0], layout.kind, name, []))
            return
        with _opened(data, layout.pieces[0], None) as sound:
            check_rate(sound.samplerate, name)
            if sound.frames < 1:
                raise AudioError(f"{name}: has no samples")
    except StopIteration:
        raise AudioError(f"{name}: has no samples") from None
    except _UndecodableError as e:
        raise AudioError(f"{name}: not a sound file that can be read: {e}") from e


def check_rate(rate: object, name: str) -> int:
    """The sampling rate as an int. Raises AudioError for what is none."""
    is_number = isinstance(rate, int | float | np.integer | np.floating) and not isinstance(
        rate, bool
    )
    if not is_number or not MIN_RATE <= rate <= MAX_RATE or rate != int(rate):
        raise AudioError(
            f"{name}: sampling rate must be a whole number of Hz from {MIN_RATE} to {MAX_RATE}, got {messages.shown(rate)}"
        )
    return int(rate)


def one_line(error: BaseException) -> str:
    """What an error says, without the file's name where the system tells it."""
    if getattr(error, "strerror", None):
        return error.strerror
    return messages.shorten(error, 80) or type(error).__name__


class _UndecodableError(Exception):
    """What a decoder says of a file."""


def _too_long(name: str) -> AudioError:
    return AudioError(f"{name}: longer than {MAX_SECONDS // 3600} hours")


def _data_of(source: str | os.PathLike | bytes | BinaryIO, name: str) -> Data:
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            return bytes(source)
        if hasattr(source, "read"):
            # Read whole: decoders seek, and not every open file can.
            return bytes(memoryview(source.read()))
        path = paths.expand(source)
        if path.startswith("data:"):
            raise AudioError(f"{name}: is a data: URL, not a path; pass the bytes in it")
        if "://" in path and not os.path.exists(path):
            raise AudioError(f"{name}: is a URL, which is not fetched; pass a path or bytes")
        if os.path.isdir(path):
            raise AudioError(f"{name}: is a directory, wanted a sound file")
        if not os.path.exists(path):
            raise AudioError(f"{name}: no such file")
        if not os.path.isfile(path):
            raise AudioError(f"{name}: is not an ordinary file")
        with open(path, "rb") as f:
            try:
                return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # file systems that cannot; an empty file
                return f.read()
    except AudioError:
        raise
    except (OSError, TypeError, ValueError) as e:
        raise AudioError(f"{name}: cannot be read: {one_line(e)}") from e


class _File(io.RawIOBase):
    """A piece as an open file without a name, by which decoders would judge it."""

    def __init__(self, data: Data, piece: Piece):
        super().__init__()
        self._data, self._piece, self._at = data, piece, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start, stop, head = self._piece
        at = offset + (0, self._at, len(head) + stop - start)[whence]
        # Broken files make libsndfile seek before the start, from where no exception can reach us.
        if 0 <= at < 1 << 62:
            self._at = at
        return self._at

    def readinto(self, buffer: Any) -> int:
        start, stop, head = self._piece
        view = memoryview(buffer).cast("B")
        if self._at < len(head):
            got = head[self._at : self._at + len(view)]
        else:
            at = start + self._at - len(head)
            got = self._data[at : max(at, min(stop, at + len(view)))]
        view[: len(got)] = got
        self._at += len(got)
        return len(got)


def _read_piece(
    data: Data, piece: Piece, path: str | None, layout: Layout, name: str, problems: list[str]
) -> tuple[np.ndarray, int]:
    if layout.kind in FOREIGN:
        return _joined(_av_blocks(data, piece, layout.kind, name, problems), name)
    try:
        return _joined(_sndfile_blocks(data, piece, path, layout.kind, name, problems), name)
    except _UndecodableError as e:
        if layout.kind != "Ogg":  # which may hold anything, Speex for one
            raise
        with contextlib.suppress(_UndecodableError):
            return _joined(_av_blocks(data, piece, "such Ogg", name, problems), name)
        raise e


def _joined(blocks: Iterator[tuple[np.ndarray, int]], name: str) -> tuple[np.ndarray, int]:
    """All blocks as one. Raises AudioError when they are too long."""
    waves, rate, total = [], 0, 0
    for wave, rate in blocks:
        total += len(wave)
        if total > MAX_SECONDS * rate:
            raise _too_long(name)
        waves.append(wave)
    if not waves:
        return np.zeros(0, np.float32), rate or MIN_RATE
    return np.concatenate(waves), rate


# --- libsndfile ---------------------------------------------------------------------------------------------------------------


def _opened(data: Data, piece: Piece, path: str | None):
    library = soundfile()
    try:
        if path and piece == Piece(0, len(data)):
            # Faster, and out of the way of other threads. A descriptor has no name, either.
            return library.SoundFile(os.open(path, os.O_RDONLY))
        return library.SoundFile(_File(data, piece))
    except (RuntimeError, OSError, TypeError, ValueError, MemoryError) as e:
        raise _UndecodableError(getattr(e, "error_string", None) or one_line(e)) from e


def _sndfile_blocks(
    data: Data, piece: Piece, path: str | None, kind: str | None, name: str, problems: list[str]
) -> Iterator[tuple[np.ndarray, int]]:
    """Decodes block by block: a header may lie about the length, so memory follows what is really there."""
    with _opened(data, piece, path) as sound:
        rate, told, total = check_rate(sound.samplerate, name), sound.frames, 0
        if MAX_SECONDS * rate < told < _UNKNOWN_FRAMES:
            raise _too_long(name)
        size = max(1, _BLOCK_VALUES // sound.channels)
        while True:
            try:
                block = sound.read(size, dtype="float32", always_2d=True)
            except (RuntimeError, OSError, ValueError) as e:
                detail = getattr(e, "error_string", None) or one_line(e)
                if not total:
                    raise _UndecodableError(detail) from e
                problems.append(f"cannot be decoded beyond {total / rate:.1f} s: {detail}")
                return
            if not len(block):
                break
            total += len(block)
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # what is not finite is refused later
                yield block[:, 0] if sound.channels == 1 else block.mean(axis=1), rate
        # MP3's length is a guess of the decoder's.
        if kind != "MP3" and total < told < _UNKNOWN_FRAMES:
            problems.append(f"cut off: {total / rate:.1f} of {told / rate:.1f} s are there")
        stored = total * sound.channels * _WIDTHS.get(sound.subtype, 0)
        left = len(piece.head) + piece.stop - piece.start - stored
        if kind is None and stored and left > max(stored // 4, 1 << 16):
            problems.append(f"{left / 1e6:.1f} MB of it are no sound by its header")


# --- PyAV -----------------------------------------------------------------------------------------------------------------


def _av_blocks(
    data: Data, piece: Piece, kind: str, name: str, problems: list[str]
) -> Iterator[tuple[np.ndarray, int]]:
    try:
        import av
    except (ImportError, OSError) as e:
        raise AudioError(
            f"{name}: {kind} needs PyAV: pip install 'chroma_jax[media]', or convert it: ffmpeg -i FILE sound.wav"
        ) from e
    try:
        with av.open(_File(data, piece), mode="r") as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: {kind} without sound in it")
            stream = container.streams.audio[0]
            total, damaged, rate = 0, 0, 0
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    damaged += 1
                    continue
                for frame in frames:
                    rate = rate or check_rate(frame.sample_rate, name)
                    wave = _av_wave(frame)
                    if frame.sample_rate != rate:
                        wave = soxr().resample(wave, frame.sample_rate, rate, quality="HQ")
                    total += len(wave)
                    yield wave, rate
            seconds = float(container.duration or 0) / 1e6
    except AudioError:
        raise
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError) as e:
        raise _UndecodableError(one_line(e)) from e
    if damaged and not total:
        raise _UndecodableError("all of it is damaged")
    if damaged:
        problems.append(f"damaged packets left out: {damaged}")
    if rate and seconds - total / rate > max(0.5, 0.02 * seconds):
        problems.append(f"cut off: {total / rate:.1f} of {seconds:.1f} s are there")


def _av_wave(frame: Any) -> np.ndarray:
    """[N] float32 of a decoded frame."""
    array = frame.to_ndarray()  # [C, N], or [1, N C]
    if not frame.format.is_planar:
        array = array.reshape(-1, frame.layout.nb_channels).T
    if array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128
    elif np.issubdtype(array.dtype, np.integer):
        array = array / -float(np.iinfo(array.dtype).min)
    return array.mean(axis=0, dtype=np.float32)


def soundfile():
    """The library. Raises AudioError where it is not installed."""
    try:
        import soundfile
    except (ImportError, OSError) as e:  # OSError: the wheel without its libsndfile
        raise AudioError("reading sound files needs soundfile: pip install soundfile soxr") from e
    return soundfile


def soxr():
    """The library. Raises AudioError where it is not installed."""
    try:
        import soxr
    except ImportError as e:
        raise AudioError("changing the sampling rate needs soxr: pip install soundfile soxr") from e
    return soxr
