"""One reply of a running batch: first in the queue, then in a slot, then over."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from chroma_jax import schedule
from chroma_jax.engine.engine import Engine
from chroma_jax.engine.prefill import Kept, Prefill
from chroma_jax.engine.reply import Chunk, Reply, finish_name
from chroma_jax.engine.request import Request
from chroma_jax.engine.state import Finish

if TYPE_CHECKING:
    from chroma_jax.engine.batch import RunningBatch


class Stream:
    """One reply as it is made. Reading it is safe from any thread.

    Attributes:
      finish: why it ended, or RUNNING.
      error: what ended it, where it failed.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request | None = None,
        *,
        max_frames: int | None = None,
        batch: RunningBatch | None = None,
        text: bool = True,
        on_news: Callable[[Stream], None] | None = None,
    ):
        frames = request.max_frames if request else max_frames
        self.batch, self.request = batch, request
        self.finish, self.error = Finish.RUNNING, None
        # Even a reply of no frames takes a beat to say so.
        self.beats_left = max(1, -(-frames // schedule.FRAMES_PER_TEXT))
        self.in_flight = 0  # chunks that are being made
        self.seated = False
        self.shape: tuple | None = None  # of the program that begins it, where it is in a queue
        self._engine, self._on_news = engine, on_news
        self._decoder = engine.processor.tokenizer.stream_decoder() if text else None
        self._asked = request.asked if request and request.keep else None
        self._pending: collections.deque[Chunk] = collections.deque()
        self._taken: list[Chunk] = []
        self._spoken: list[np.ndarray] = []
        self._kept: Kept | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come (what is pending can still be taken)."""
        return self.finish != Finish.RUNNING

    @property
    def finish_reason(self) -> str:
        """ "running", "stop", "length", "context", "cancelled" or "failed"."""
        return finish_name(self.finish)

    @property
    def status(self) -> str:
        """ "queued", "prefilling" (its question is being taken in), "running", "paused" (it waits for its listener, or for
        words), "done" or "failed"."""
        if self.done:
            return "failed" if self.finish == Finish.FAILED else "done"
        if self.seated:
            return "paused" if self.batch.rests(self) else "running"
        request = self.request  # another thread may be taking it
        question = request.question if request else None
        waits = question is None or (isinstance(question, Prefill) and question.waits)
        return "prefilling" if waits else "queued"

    @property
    def num_pending(self) -> int:
        """Chunks made and not taken."""
        return len(self._pending)

    @property
    def keeps(self) -> bool:
        """Whether the turn is to be kept when it is over."""
        return self._asked is not None

    def take(self) -> list[Chunk]:
        """The chunks made since the last call."""
        with self.batch.changed:
            chunks = list(self._pending)
            self._pending.clear()
            self._taken += chunks
            if chunks and not self.done and self.batch.pausing:
                self.batch.touch()  # its row may go on
        return chunks

    def reply(self) -> Reply:
        """All that has been taken, as one reply. Raises the error of a stream that failed."""
        if self.error is not None:
            raise self.error
        return self._engine.join(self._taken, self.finish_reason)

    def result(self, timeout: float | None = None) -> Reply:
        """Waits until the stream is over, for whoever does not step the batch, and gives the whole reply.

        Raises:
          TimeoutError: it took longer than so many seconds.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            left = None if until is None else max(0.0, until - time.monotonic())
            self._wait(lambda: self._pending or self.done, left)
            self.take()  # a row that nobody takes from rests
        self.take()
        return self.reply()

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks as they come, for whoever does not step the batch. Raises the error of a stream that failed."""
        while True:
            self._wait(lambda: self._pending or self.done, None)
            over = self.done
            yield from self.take()
            if over:
                if self.error is not None:
                    raise self.error
                return

    def kept(self) -> Kept | None:
        """What the Reasoner keeps of the turn, once it is over, if the request said so and it has not failed."""
        if self.done and self.keeps:
            self.batch.settle()
        return self._kept

    def _wait(self, ready: Callable[[], object], timeout: float | None) -> None:
        with self.batch.changed:
            if not self.batch.changed.wait_for(ready, timeout):
                raise TimeoutError("the reply was not over in time")

    # For the batch, which holds its lock.

    def deliver(
        self, tokens: np.ndarray, frames: np.ndarray, audio: np.ndarray, finish: Finish
    ) -> bool:
        """Adds what a call of the device made. Returns whether that is anything, or the end."""
        over = finish != Finish.RUNNING
        text = ""
        if self._decoder is not None:
            text = self._decoder.push(tokens) + (self._decoder.finish() if over else "")
        if len(frames) or len(tokens) or text:
            self._pending.append(Chunk(text, audio, tokens, frames))
            if self.keeps:
                self._spoken.append(tokens)
        return over or len(frames) > 0 or len(tokens) > 0

    def keep(self, cache, length: int) -> None:
        """The turn is over: the Reasoner's cache of its row, and the positions in it."""
        spoken = np.concatenate([np.zeros(0, np.int32), *self._spoken])
        spoken = spoken[: max(0, length - len(self._asked.ids))]
        ids = np.concatenate([self._asked.ids, spoken]).astype(np.int32)
        self._kept = Kept(cache, ids, self._asked.mels, len(spoken))

    def tell(self) -> None:
        """Tells the listener, outside of the lock."""
        if self._on_news is None:
            return
        try:
            self._on_news(self)
        except Exception:  # a listener's mistake is not the batch's
            logging.exception("a listener of a stream failed")
