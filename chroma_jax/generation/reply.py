"""One reply alone, whole or as a stream: a running batch of one row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chroma_jax.engine.batch import BEATS_PER_CALL, RunningBatch
from chroma_jax.engine.engine import Engine
from chroma_jax.engine.reply import Chunk, Reply
from chroma_jax.engine.request import Request
from chroma_jax.engine.script import PLACES
from chroma_jax.engine.stream import Stream


def begin_alone(engine: Engine, request: Request) -> tuple[RunningBatch, Stream]:
    """The request as a batch of its own, in caches that grow with it."""
    ledger = request.ledger(engine.config, grow=engine.grow)
    stream = Stream(engine, request)
    forced = PLACES if request.script is not None else 0
    state = request.begin(engine.flat, ledger.sizes(), forced_size=forced)
    return RunningBatch.begun(engine, state, ledger, [stream]), stream


def answer(engine: Engine, request: Request) -> Reply:
    """The whole reply."""
    if request.script is not None:
        request.script.wait()
    batch, stream = begin_alone(engine, request)
    while batch.busy:
        batch.step(BEATS_PER_CALL)
    stream.take()
    return stream.reply()


class ReplyStream:
    """An iterator over the chunks of one reply. The next beat is already under way while a chunk is handled.

    Args:
      engine: the model and its processor.
      request: what to reply to.
      pieces: what is written into the request's script: asked for one when the reply has come so far.

    Raises, while it is iterated, what ended the reply, where that was an error.
    """

    def __init__(self, engine: Engine, request: Request, pieces: Iterable[str] | None = None):
        self._script = request.script
        self._pieces: Iterator[str] | None = None if pieces is None else iter(pieces)
        self._batch, self._stream = begin_alone(engine, request)
        if self._pieces is None:
            self._batch.prepare()

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> Chunk:
        while not self._stream.num_pending:
            if self._stream.done:
                if self._stream.error is not None:
                    raise self._stream.error
                raise StopIteration
            if self._script is not None:
                self._write()
            self._batch.step()
        (chunk,) = self._stream.take()
        return chunk

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is not yet made. Chunks already given stay given."""
        self._batch.cancel(self._stream)

    @property
    def finish_reason(self) -> str:
        """Why the reply ended; "running" until it has, "cancelled" after `close`, "failed" after an error."""
        return self._stream.finish_reason

    def reply(self) -> Reply:
        """What has been given so far, as one reply; after the last chunk, exactly `Chroma.reply`'s."""
        return self._stream.reply()

    def _write(self) -> None:
        """Asks, or waits, for words where the reply cannot go on without them."""
        while self._pieces is not None and self._batch.starved(self._stream):
            try:
                piece = next(self._pieces, None)
                if piece is None:
                    self._pieces = None
                    self._script.close()
                else:
                    self._script.write(piece)
            except Exception as error:
                self._batch.fail(error)
                raise
        with self._batch.changed:  # where another thread writes
            self._batch.changed.wait_for(lambda: not self._batch.starved(self._stream))
