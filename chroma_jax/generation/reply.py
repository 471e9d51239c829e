"""Replies: the pieces in which one is made, the whole, and the stream from one to the other."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import jax
import numpy as np

from chroma_jax.audio.wav import save_wav
from chroma_jax.engine import programs
from chroma_jax.engine.request import Request
from chroma_jax.engine.state import Beat, Finish

if TYPE_CHECKING:
    from chroma_jax.generation.session import Chroma


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a reply as it is made."""

    text: str  # what is new, whole characters
    audio: np.ndarray  # [n * frame_samples] float32, n = 0..2
    tokens: np.ndarray  # [0 or 1] int32
    frames: np.ndarray  # [n, Q] int32


@dataclasses.dataclass(frozen=True)
class Reply:
    """A spoken answer."""

    text: str
    audio: np.ndarray  # [N] float32
    sample_rate: int
    frames: np.ndarray  # [T, Q] int32 codes
    tokens: np.ndarray  # [T'] int32 text tokens, im_end included where it was reached
    finish_reason: (
        str  # "stop": the model ended; "length": max_seconds; "context": the context is full
    )

    @property
    def seconds(self) -> float:
        """Length of the sound."""
        return len(self.audio) / self.sample_rate

    def save(self, path: str | os.PathLike) -> None:
        """Writes a 16-bit WAV, atomically. Raises ValueError when the path cannot be written."""
        save_wav(path, self.audio, self.sample_rate)


class ReplyStream:
    """An iterator over the chunks of one reply. The next beat is already under way while a chunk is handled."""

    def __init__(self, chroma: Chroma, request: Request):
        self._chroma = chroma
        self._text = chroma.processor.tokenizer.stream_decoder()
        self._chunks: list[Chunk] = []
        self._finish = Finish.RUNNING
        self._room = request.room(chroma.config, grow=chroma.grow)
        self._state = request.begin(chroma.flat, self._room.sizes())
        self._next: Beat | None = None
        self._dispatch()

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> Chunk:
        if self._next is None:
            raise StopIteration
        out, self._next = self._next, None
        # JAX runs asynchronously: the device works on the next beat while this one is fetched and played.
        self._dispatch()
        out = jax.device_get(out)
        self._finish = Finish(int(out.finish[0]))
        valid = out.frame_valid[0]
        tokens = out.token[:1] if out.token_valid[0] else out.token[:0]
        self._room.without_text(0, 1 - len(tokens))
        text = self._text.push(tokens)
        if self._finish != Finish.RUNNING:
            text += self._text.finish()
            self._next = self._state = None
        samples = self._chroma.config.codec.frame_samples * int(valid.sum())
        chunk = Chunk(text, out.samples[0, :samples], tokens, out.frames[0][valid])
        self._chunks.append(chunk)
        return chunk

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is not yet made. Chunks already given stay given."""
        if self._finish == Finish.RUNNING:
            self._finish = Finish.CANCELLED
        self._next = self._state = None

    @property
    def finish_reason(self) -> str:
        """Why the reply ended; "running" until it has, "cancelled" after `close`."""
        return programs.finish_name(self._finish)

    def reply(self) -> Reply:
        """What has been given so far, as one reply; after the last chunk, exactly `Chroma.reply`'s."""
        return self._chroma.join(self._chunks, self.finish_reason)

    def _dispatch(self) -> None:
        state = self._room.make(self._state)
        self._state, self._next = programs.beat(self._chroma.flat, state)
