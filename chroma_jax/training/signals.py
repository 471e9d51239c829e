"""SIGTERM and Ctrl-C, asked for where a run can stop instead of obeyed where they come."""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Signals:
    """SIGTERM and SIGINT are remembered instead of obeyed, once each; a second one does what it always did.

    With several processes jax.distributed watches for SIGTERM, and all processes agree on where they stop.
    """

    def __init__(self):
        self.number: int | None = None  # the one that came to this process
        self._before: dict[int, Any] = {}
        self._asked = 0  # jax counts where a run may stop by ones

    def __enter__(self) -> Signals:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: Any) -> None:
        self.number = number
        signal.signal(number, self._before[number])

    def asked(self) -> int | None:
        """The signal that asks to stop here, on every process alike: all of them ask at the same places."""
        if jax.process_count() > 1:
            self._asked += 1
            stops = multihost_utils.reached_preemption_sync_point(self._asked)
            return signal.SIGTERM if stops else None
        return self.number
