"""TensorBoard's files, in tensorboardX's format, written by whoever calls.

tensorboardX's own writer hands everything to a thread, which dies on a full disk, after which its caller waits for ever. Here it is an OSError.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np


class Board:
    """Appends to a folder. Raises ImportError without tensorboardX; it and its methods raise OSError where nothing can be written.

    Args:
      folder: made if it is not there.
      step: steps done before; what is there beyond it is hidden.
    """

    def __init__(self, folder: str, step: int = 0):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._summary, self._event = summary, event_pb2.Event
        os.makedirs(folder, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(os.path.join(folder, "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._put(step + 1, session_log=start)

    def scalars(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        """Values under "prefix/key"."""
        for key, value in values.items():
            self._put(step, summary=self._summary.scalar(f"{prefix}/{key}", float(value)))
        self._writer.flush()

    def sound(self, tag: str, step: int, wave: np.ndarray, rate: int) -> None:
        """Samples [N], clipped to full scale."""
        self._put(step, summary=self._summary.audio(tag, wave.clip(-1, 1), sample_rate=rate))
        self._writer.flush()

    def text(self, tag: str, step: int, text: str) -> None:
        """A string."""
        self._put(step, summary=self._summary.text(tag, text))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _put(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))
