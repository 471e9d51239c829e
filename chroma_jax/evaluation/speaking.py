"""Chroma at work for the tasks: a text said, a question answered, with what the caller's clock saw of it."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from chroma_jax.evaluation.clock import follow

if TYPE_CHECKING:
    import pathlib

    from chroma_jax import Chroma, Sampling, Voice


@dataclasses.dataclass(frozen=True)
class Spoken:
    """What was said."""

    audio: np.ndarray  # [N] float32
    rate: int
    text: str  # the model's own, or the one it was given
    finish_reason: str
    first_sound: (
        float | None
    )  # seconds from the whole question to the first samples in the caller's memory
    elapsed: float  # seconds to the last ones

    def described(self) -> dict[str, Any]:
        """As the results have it."""
        seconds = len(self.audio) / self.rate
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "spoken_seconds": round(seconds, 3),
            "first_sound": self.first_sound and round(self.first_sound, 4),
            "rtf": round(self.elapsed / seconds, 4) if seconds else None,
        }


class Speaker:
    """A Chroma with the settings of a run.

    Args:
      chroma: the model.
      max_seconds: longest speech; None for as long as the context allows.
      sampling: how codes (and text) are chosen; default greedy.
      seed: of the run; every item draws from its own, made of this one and its name, so that order changes nothing.
      system_prompt: replaces the default one.
    """

    def __init__(
        self,
        chroma: Chroma,
        *,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        system_prompt: str | None = None,
    ):
        self.chroma, self.sampling, self.seed = chroma, sampling, seed
        self._wanted = dict(max_seconds=max_seconds, sampling=sampling, system_prompt=system_prompt)

    def say(self, text: str, voice: Voice, name: str) -> Spoken:
        """The text in that voice: the Reasoner's text is forced to it."""
        start = time.perf_counter()
        reply = self.chroma.say(text, voice=voice, seed=self._seed(name), **self._wanted)
        elapsed = time.perf_counter() - start
        return Spoken(
            reply.audio, reply.sample_rate, reply.text, reply.finish_reason, None, elapsed
        )

    def answer(self, conversation: Sequence[Any], voice: Voice, name: str) -> Spoken:
        """The answer to the last turn, streamed as a live one is."""
        start = time.perf_counter()
        with self.chroma.stream(
            list(conversation), voice=voice, seed=self._seed(name), **self._wanted
        ) as stream:
            heard = follow(stream, start, self.chroma.sample_rate)
        reply = stream.reply()
        return Spoken(reply.audio, reply.sample_rate, reply.text, reply.finish_reason, heard.first_sound, heard.end)  # fmt: skip

    def through_codec(self, path: pathlib.Path) -> tuple[np.ndarray, int]:
        """What the Codec leaves of a recording: (samples, rate)."""
        from chroma_jax import Voice

        voice = Voice(path, "as it is")  # the codes do not depend on the transcript
        codes = np.asarray(self.chroma.encode_voice(voice))
        samples = np.asarray(self.chroma.model.codec.decode(codes[None]))[0]
        return samples[: len(voice.wave)], self.chroma.sample_rate

    def _seed(self, name: str) -> int:
        return (self.seed + zlib.crc32(name.encode())) % 2**32
