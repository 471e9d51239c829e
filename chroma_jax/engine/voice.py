"""Reference voices: the recording, its transcript, and what the model makes of them once."""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from chroma_jax import paths
from chroma_jax.audio.wav import AudioError, AudioSource, load_audio
from chroma_jax.config import ChromaConfig
from chroma_jax.messages import shown
from chroma_jax.model.kv_cache import KVCache

VOICE_RATE = 24000  # what voices are kept at: the rate of every Mimi


class EncodedVoice(NamedTuple):
    """Codes of a voice on the device, which may still be computing them."""

    codes: jax.Array  # [1, F', Q], padded to a static size
    frames: int  # that count

    def fetched(self) -> np.ndarray:
        """The codes [F, Q] on the host, once they are there."""
        return np.asarray(self.codes)[0, : self.frames]


class Voice:
    """A reference voice: a few seconds of someone speaking, and exactly what is said. Use voices only with consent.

    The codes that the Codec makes of it are computed by the first reply and kept, also by `save`.

    Args:
      audio: a path, encoded bytes or (samples, rate); any rate, stereo is mixed down.
      text: the transcript.

    Raises:
      ValueError: audio or transcript is missing, unreadable, too short or not finite.
    """

    def __init__(self, audio: AudioSource, text: str):
        if audio is None:
            raise AudioError(
                "a voice needs its sound as well as its transcript, got a transcript without audio"
            )
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"a voice needs its transcript, what the reference recording says, got {shown(text)}"
            )
        self.wave: np.ndarray = load_audio(audio, VOICE_RATE)  # [N] float32 at 24 kHz
        self.text = text
        self._codes: dict[str, np.ndarray | EncodedVoice] = {}  # by codec: [F, Q] int32

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return len(self.wave) / VOICE_RATE

    @functools.cached_property
    def _wave_id(self) -> bytes:
        return hashlib.blake2b(self.wave.tobytes(), digest_size=16).digest()

    def codes(self, codec: str) -> np.ndarray | None:
        """The codes [F, Q] that this codec made of the voice, if it did."""
        codes = self._codes.get(codec)
        if isinstance(codes, EncodedVoice):
            codes = self._codes[codec] = codes.fetched()
        return codes

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz with recording, transcript and codes, atomically: threads and processes may save to one file."""
        path = paths.expand(path)
        codes = {f"codes_{codec}": self.codes(codec) for codec in list(self._codes)}
        try:
            with paths.replacing(os.path.realpath(path)) as temporary, open(temporary, "wb") as f:
                np.savez(f, format=np.int32(1), wave=self.wave, text=np.array(self.text), **codes)
        except OSError as e:
            raise AudioError(f"{path}: the voice cannot be saved: {e.strerror or e}") from e

    @staticmethod
    def is_saved(path: str | os.PathLike) -> bool:
        """Whether a file is a saved voice rather than a sound, by its first bytes; one that cannot be read, by its name."""
        path = paths.expand(path)
        try:
            with open(path, "rb") as f:
                return f.read(4) == b"PK\3\4"
        except OSError:
            return path.endswith(".npz")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Voice:
        """Reads what `save` wrote.

        Raises ValueError naming the file when it is missing or something else, and when codes in it cannot be those of the
        recording by the codec that they are said to be of.
        """
        path = paths.expand(path)
        try:
            with np.load(path, allow_pickle=False) as saved:
                voice = cls((saved["wave"], VOICE_RATE), str(saved["text"]))
                codes = {
                    k.removeprefix("codes_"): saved[k] for k in saved if k.startswith("codes_")
                }
        except FileNotFoundError as e:
            raise AudioError(f"{path}: no such file") from e
        except Exception as e:  # zipfile, numpy and pickle have many ways to refuse a file
            raise AudioError(f"{path}: not a saved voice: {e}") from e
        for codec, array in codes.items():
            _check_codes(path, codec, array, len(voice.wave))
        # Earlier versions did not say what sort of codes a codec makes: what they saved is made again.
        voice._codes = {codec: array for codec, array in codes.items() if _CODEC.fullmatch(codec)}
        return voice


def codec_name(fingerprint: str, config: ChromaConfig) -> str:
    """What a codec's codes are kept under: its weights' fingerprint, samples per frame, codebooks and their size."""
    codec = config.codec
    return f"{fingerprint}-{codec.frame_samples}x{config.num_codebooks}x{codec.codebook_size}"


_CODEC = re.compile(r"[0-9a-f]+-(\d+)x(\d+)x(\d+)")


def _check_codes(path: str, codec: str, codes: np.ndarray, samples: int) -> None:
    """Raises AudioError for codes that this codec cannot have made of so many samples."""
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise AudioError(f"{path}: not a saved voice: codes_{codec} has shape {list(codes.shape)}")
    match = _CODEC.fullmatch(codec)
    if match is None:
        return
    frame, codebooks, size = map(int, match.groups())
    want = [-(-samples // frame), codebooks]
    if list(codes.shape) != want:
        raise AudioError(
            f"{path}: damaged: the codec's codes of this recording are {want} frames and codebooks, found {list(codes.shape)}"
        )
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise AudioError(
            f"{path}: damaged: codes must be from 0 to {size - 1}, found {codes.min()} to {codes.max()}"
        )


class KeptVoices:
    """What a Backbone made of the voices used last, on its device: keys, values and their number of positions.

    Recordings with equal samples and transcript are one voice. May be used from several threads.
    """

    def __init__(self, most: int = 32):
        self._most = most
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[tuple, tuple[KVCache, int]] = collections.OrderedDict()

    def get(self, voice: Voice, make: Callable[[], tuple[KVCache, int]]) -> tuple[KVCache, int]:
        """What is kept of the voice, or else what `make` gives, which is kept in place of the voice unused for longest."""
        key = (voice._wave_id, voice.text)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()  # outside the lock: two threads may both do it, and get the same
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return made

    def __len__(self) -> int:
        return len(self._kept)
