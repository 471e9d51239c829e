"""TensorBoard's files, in tensorboardX's format, written by whoever calls.

tensorboardX's own writer hands everything to a thread, which dies on a full disk, after which its caller waits for ever. Here it is an OSError.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from chroma_jax import paths

_SEND_SECONDS = 60.0


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
        # An object is written as a whole: there the file grows here, and goes there now and then.
        self._there = folder if paths.is_remote(folder) else None
        self._folder = tempfile.mkdtemp() if self._there else folder
        self._sent = time.monotonic()
        os.makedirs(self._folder, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(os.path.join(self._folder, "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._put(step + 1, session_log=start)

    def scalars(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        """Values under "prefix/key"."""
        for key, value in values.items():
            self._put(step, summary=self._summary.scalar(f"{prefix}/{key}", float(value)))
        self._flush()

    def sound(self, tag: str, step: int, wave: np.ndarray, rate: int) -> None:
        """Samples [N], clipped to full scale."""
        self._put(step, summary=self._summary.audio(tag, wave.clip(-1, 1), sample_rate=rate))
        self._flush()

    def text(self, tag: str, step: int, text: str) -> None:
        """A string."""
        self._put(step, summary=self._summary.text(tag, text))
        self._flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
        if self._there:
            self._send()
            shutil.rmtree(self._folder)

    def _flush(self) -> None:
        self._writer.flush()
        if self._there and time.monotonic() - self._sent > _SEND_SECONDS:
            self._send()

    def _send(self) -> None:
        for name in os.listdir(self._folder):
            paths.upload(os.path.join(self._folder, name), os.path.join(self._there, name))
        self._sent = time.monotonic()

    def _put(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))
