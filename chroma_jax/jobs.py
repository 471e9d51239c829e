"""Several processes that do one piece of work: when one fails all end, within seconds, with its message and exit code.

Left alone, the others would wait for the one that failed, in a collective or in JAX's own barrier at the end, for minutes, and then be
aborted. Here the one that fails says so through the service that the processes met by, and each listens.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from chroma_jax import cli

_KEY = "chroma_jax/failed"
_LISTEN_MS = 500
# The service lives in process 0, which must not be gone before the others have heard.
_HEARD_SECONDS, _PARTING_SECONDS = 5.0, 1.0
_LONGEST = 4000  # characters of a message


def join(asked: dict[str, Any], *, saves_on_sigterm: bool) -> tuple[int, int]:
    """Joins the job: (number of this process, how many there are).

    Args:
      asked: arguments of `jax.distributed.initialize`; none where it finds out by itself.
      saves_on_sigterm: JAX then takes SIGTERM, for `multihost_utils.reached_preemption_sync_point`; otherwise it ends a process as ever.
    """
    import jax

    if not saves_on_sigterm:
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**asked)
    return jax.process_index(), jax.process_count()


def client() -> Any:
    """The service that the processes of this job met by: words under keys, and barriers."""
    # JAX's public barriers are collectives, which do not wait for long on every platform.
    from jax._src import distributed

    return distributed.global_state.client


@contextlib.contextmanager
def together(end: Callable[[int], NoReturn] = os._exit) -> Iterator[None]:
    """While the block runs: an error in it ends all processes of the job, and one in theirs ends this one. Nothing with one process.

    Every process tells the first error that any of them met, in one line, and exits with its code. `end` is how a process exits: at
    once, because an orderly end would wait for processes that are gone.
    """
    import jax

    if jax.process_count() == 1:
        yield
        return
    job = _Job(client(), jax.process_index(), jax.process_count(), end)
    job.start()
    try:
        yield
    except SystemExit:
        raise
    except BaseException as e:
        job.fail(e)
    finally:
        job.stop()


class _Job:
    def __init__(self, service: Any, number: int, count: int, end: Callable[[int], NoReturn]):
        self._service, self._number, self._count, self._end = service, number, count, end
        self._over = threading.Event()
        self._telling = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="failures", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def fail(self, error: BaseException) -> None:
        """Tells the others, waits until they have heard, and ends."""
        code, text = cli.told(error)
        said = json.dumps([self._number, code, text[-_LONGEST:]])
        with self._telling:
            try:
                self._service.key_value_set(_KEY, said)
            except RuntimeError:  # another process was first
                with contextlib.suppress(RuntimeError):
                    said = self._service.blocking_key_value_get(_KEY, _LISTEN_MS)
            self._leave(said)

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                said = self._service.blocking_key_value_get(_KEY, _LISTEN_MS)
            except RuntimeError:  # nothing yet
                time.sleep(0.05)
                continue
            with self._telling:
                if not self._over.is_set():
                    self._leave(said)
            return

    def _leave(self, said: str) -> None:
        self._over.set()
        first, code, text = json.loads(said)
        whose = "" if first == self._number else f"process {first} failed: "
        print(text if not whose else _with(text, whose), file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        with contextlib.suppress(RuntimeError):
            self._service.key_value_set(f"{_KEY}/heard/{self._number}", "yes")
        if self._number == 0:
            deadline = time.monotonic() + _HEARD_SECONDS
            for other in range(1, self._count):
                left = max(1, int(1000 * (deadline - time.monotonic())))
                with contextlib.suppress(RuntimeError):
                    self._service.blocking_key_value_get(f"{_KEY}/heard/{other}", left)
            time.sleep(_PARTING_SECONDS)  # whoever is still there when the service goes is aborted
        self._end(code)


def _with(text: str, whose: str) -> str:
    """The text of another process's error, and whose it is; of one that is no user's, the last line."""
    last = text.strip().splitlines()[-1]
    return f"error: {whose}{last.removeprefix('error: ')}"
