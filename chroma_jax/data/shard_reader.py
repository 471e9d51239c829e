"""The bytes of records by number, from any number of shards, with a few files open at a time."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from chroma_jax.data.metadata import DatasetError

# Reads a record at a time, from anywhere in the file: nothing is read ahead.
_OPTIONS = dict(options="readahead_buffer_size:0", file_reader_buffer_size=32768)
MOST_OPEN = 64


class ShardReader:
    """Random access over ArrayRecord files. Threads may share one; a pickled one opens its files anew.

    A file is opened when a record of it is asked for. Of those that are open the one not asked for the longest is closed for a
    new one, so that a dataset of thousands of shards needs no more descriptors than one of `most_open`.

    Args:
      files: paths of the shards.
      records: how many each holds. A file that holds another number is told when it is opened.
      most_open: files open at a time.
    """

    def __init__(self, files: Sequence[str], records: Sequence[int], most_open: int = MOST_OPEN):
        self._files, self._most_open = list(files), most_open
        self._offsets = np.concatenate([[0], np.cumsum(records, dtype=np.int64)])
        self._start()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, number: int) -> bytes:
        """Record `number`, from 0. Raises DatasetError, or RuntimeError where the file is damaged."""
        shard = int(np.searchsorted(self._offsets, number, side="right")) - 1
        return bytes(self._reader(shard).read([number - int(self._offsets[shard])])[0])

    def _reader(self, shard: int) -> Any:
        with self._lock:
            reader = self._open.get(shard)
            if reader is not None:
                self._open.move_to_end(shard)
                return reader
        reader = self._read(shard)
        with self._lock:
            reader = self._open.setdefault(shard, reader)
            while len(self._open) > self._most_open:
                # Not closed but let go: another thread may still be reading from it.
                self._open.popitem(last=False)
        return reader

    def _read(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(self._files[shard], **_OPTIONS)
        want = int(self._offsets[shard + 1] - self._offsets[shard])
        if reader.num_records() != want:
            raise DatasetError(
                f"{self._files[shard]} is damaged: it has {reader.num_records()} records, it should have {want}"
            )
        return reader

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
