"""Reference voices: the recording, its transcript, and what the model makes of them once."""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from chroma_jax.audio.wav import AudioError, AudioSource, load_audio
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
                f"a voice needs its transcript, what the reference recording says, got {text!r}"
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
        """Writes an .npz with recording, transcript and codes, atomically."""
        path = os.fspath(path)
        temporary = f"{path}.{os.getpid()}.tmp"
        codes = {f"codes_{codec}": self.codes(codec) for codec in list(self._codes)}
        try:
            with open(temporary, "wb") as f:
                np.savez(f, format=np.int32(1), wave=self.wave, text=np.array(self.text), **codes)
            os.replace(temporary, path)
        except OSError as e:
            raise AudioError(f"{path}: the voice cannot be saved: {e.strerror or e}") from e
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Voice:
        """Reads what `save` wrote. Raises ValueError naming the file when it is missing or something else."""
        path = os.fspath(path)
        try:
            with np.load(path, allow_pickle=False) as saved:
                voice = cls((saved["wave"], VOICE_RATE), str(saved["text"]))
                codes = {
                    k.removeprefix("codes_"): saved[k] for k in saved if k.startswith("codes_")
                }
        except AudioError:
            raise
        except Exception as e:  # zipfile, numpy and pickle have many ways to refuse a file
            raise AudioError(f"{path}: not a saved voice: {e}") from e
        for codec, array in codes.items():
            if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
                raise AudioError(
                    f"{path}: not a saved voice: codes_{codec} has shape {array.shape}"
                )
        voice._codes = codes
        return voice


class KeptVoices:
    """What a Backbone made of the voices used last, on its device: keys, values and their number of positions.

    Recordings with equal samples and transcript are one voice. May be used from several threads.
    """

    def __init__(self, most: int = 32):
        self._most = most
        self._lock = threading.Lock()
        self._heard: collections.OrderedDict[tuple, tuple[KVCache, int]] = collections.OrderedDict()

    def get(self, voice: Voice, hear: Callable[[], tuple[KVCache, int]]) -> tuple[KVCache, int]:
        """What is kept of the voice, or else what `hear` gives, which is kept in place of the voice unused for longest."""
        key = (voice._wave_id, voice.text)
        with self._lock:
            if key in self._heard:
                self._heard.move_to_end(key)
                return self._heard[key]
        heard = hear()  # outside the lock: two threads may both do it, and get the same
        with self._lock:
            self._heard[key] = heard
            while len(self._heard) > self._most:
                self._heard.popitem(last=False)
        return heard

    def __len__(self) -> int:
        return len(self._heard)
