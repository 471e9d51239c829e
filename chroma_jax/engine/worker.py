"""A thread that steps a running batch, so that others only admit, write, take and cancel.

with Worker(RunningBatch(engine, slots=16)) as worker:
    stream = worker.batch.admit("question.wav", voice=voice)      # from any thread
    for chunk in stream: ...                                      # as they come
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from absl import logging

from chroma_jax.engine.batch import RunningBatch


class Worker:
    """Steps a batch while there is something to do, and sleeps otherwise.

    Args:
      batch: nobody else may step it meanwhile.
    """

    def __init__(self, batch: RunningBatch):
        self.batch = batch
        self._commands: collections.deque[tuple[Future, Callable, tuple]] = collections.deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="chroma", daemon=True)

    def start(self) -> Worker:
        """Begins to step."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends the thread, and with it every stream that is not over, as cancelled."""
        with self.batch.changed:
            self._closing = True
            self.batch.touch()
        if self._thread.is_alive():
            self._thread.join()
        self.batch.cancel_all()
        while self._commands:
            self._commands.popleft()[0].cancel()

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Runs a function in the worker's thread, between two beats: for work on the device that must not meet them."""
        future: Future = Future()
        with self.batch.changed:
            if self._closing:
                raise RuntimeError("the worker is closed")
            self._commands.append((future, function, arguments))
            self.batch.touch()
        return future

    def _run(self) -> None:
        batch = self.batch
        while not self._closing:
            version = batch.version
            while self._commands:
                _do(*self._commands.popleft())
            try:
                batch.step()
            except Exception as error:  # no stream may wait for ever
                logging.exception("a step failed")
                batch.fail(error)
            with batch.changed:
                if batch.idle:
                    batch.changed.wait_for(lambda: batch.version != version)  # noqa: B023


def _do(future: Future, function: Callable, arguments: tuple) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
