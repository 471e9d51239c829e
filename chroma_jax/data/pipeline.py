"""Datasets -> batches for the training step, by grain: shuffled, mixed, in few static shapes, read ahead, exactly resumable.

    batches = make_pipeline(config, ["data/train"], batch_size=64, seed=0, process_index=..., process_count=...)
    batch = next(batches)                 # this process's rows
    state = batches.get_state()           # a dictionary of a number and a fingerprint
    batches.set_state(state)              # the next batch is the one that followed

`chroma_jax.data.plan` says which records make which batch. grain is imported where it is used.

Axes: B rows, N prompt tokens, C chunks, L answer tokens, T frames, P transcript tokens, F voice frames, Q codebooks, D width.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from chroma_jax.config import ChromaConfig
from chroma_jax.data import metadata as md
from chroma_jax.data.batch import Batch
from chroma_jax.data.mixture import Mixture, Source
from chroma_jax.data.plan import Limits, Plan, Planned, Shape, in_order
from chroma_jax.messages import shown

_ENDLESS = 1 << 40  # batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How fast batches are read; their content does not depend on it.

    threads: that read and lay out batches. prefetch: batches that are ready before they are asked for. workers: processes instead of
    threads of this one, for pipelines that a process's interpreter cannot keep up with; they need parsed absl flags.
    """

    threads: int = 8
    prefetch: int = 8
    workers: int = 0


class BatchIterator(Iterator[Batch]):
    """An endless (or `epochs` long) iterator of batches with exact state. Made by `make_pipeline`."""

    def __init__(self, batches: _Batches, plan_key: str, batches_per_epoch: int, reading: Reading):
        self._batches, self._reading = batches, reading
        self._plan_key = plan_key
        self.batches_per_epoch = batches_per_epoch
        self.mixture = batches.mixture
        self._position = 0
        self._read: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._read is None:
            self._read = iter(_grain(self._batches, self._position, self._reading))
        batch = next(self._read)
        self._position += 1
        return batch

    def close(self) -> None:
        """Ends threads and worker processes, and frees the memory they share. The next batch starts them again."""
        read, self._read = self._read, None
        if read is not None:
            read.close()

    def batch(self, number: int) -> Batch:
        """This process's rows of batch `number`, wherever the iterator stands."""
        return self._batches.assemble(self._batches[number])

    @property
    def position(self) -> int:
        """Batches given so far, over all epochs."""
        return self._position

    @property
    def epoch(self) -> float:
        """Epochs given so far."""
        return self._position / self.batches_per_epoch

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands; JSON-able, the same on every process, good for another number of processes too."""
        return {"position": self._position, "plan": self._plan_key}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `get_state` was called. Raises ValueError for a state of other data, seed, batch size or shapes."""
        if set(state) != {"position", "plan"} or int(state["position"]) < 0:
            raise ValueError(f"no state of a data pipeline: {shown(dict(state))}")
        if state["plan"] != self._plan_key:
            raise ValueError(
                f"the state belongs to other data, seed, batch size or shapes ({state['plan']}, this pipeline is {self._plan_key})"
            )
        self._position = int(state["position"])
        self.close()


class Evaluation:
    """One pass over all records, in order, each time it is iterated over. Made by `make_evaluation`."""

    def __init__(self, batches: _Batches, reading: Reading):
        self._batches, self._reading = batches, reading
        self.mixture = batches.mixture

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        read = iter(_grain(self._batches, 0, self._reading))
        try:
            yield from read
        finally:  # also of a pass that is left early
            read.close()


def make_pipeline(
    config: ChromaConfig,
    sources: Sequence[str | os.PathLike | Source],
    *,
    batch_size: int,
    seed: int = 0,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    limits: Limits | None = None,
    num_shapes: int = 4,
    shapes: Sequence[Shape] | None = None,
    reading: Reading | None = None,
    codec: str | None = None,
    tokenizer: str | None = None,
    reasoner: str | None = None,
) -> BatchIterator:
    """Batches to train on: `batch_size / process_count` rows of each, those of this process.

    All processes get the same shape at the same time. All batches are full: at the end of an epoch fewer than `batch_size` records, other ones
    each time, are left out.

    Args:
      config, sources, limits, num_shapes, shapes, codec, tokenizer, reasoner: see `Mixture`.
      batch_size: rows over all processes.
      seed: of shuffling and of the voices' draw.
      epochs: after which the iterator ends; None for never.
      process_index: which process this is.
      process_count: how many there are.
      reading: threads and read-ahead.

    Raises:
      ValueError: as `Mixture`; fewer records than a batch; a batch size that does not divide over the processes.
    """
    check_rows(batch_size, process_index, process_count)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    mixture = Mixture(
        config,
        sources,
        limits=limits,
        num_shapes=num_shapes,
        shapes=shapes,
        codec=codec,
        tokenizer=tokenizer,
        reasoner=reasoner,
    )
    for line in mixture.describe():
        logging.info("%s", line)
    per_source = [
        mixture.records[(mixture.records >= start) & (mixture.records < stop)]
        for start, stop in itertools.pairwise(mixture.offsets)
    ]
    plan = Plan(
        per_source,
        mixture.weights,
        mixture.level,
        len(mixture.shapes),
        batch_size=batch_size,
        seed=seed,
    )
    count = _ENDLESS if epochs is None else epochs * plan.batches
    batches = _Batches(mixture, plan, count, seed, process_index, process_count)
    key = md.fingerprint([mixture.key, batch_size, seed])
    return BatchIterator(batches, key, plan.batches, reading or Reading())


def make_evaluation(
    config: ChromaConfig,
    sources: Sequence[str | os.PathLike | Source],
    *,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    limits: Limits | None = None,
    num_shapes: int = 4,
    shapes: Sequence[Shape] | None = None,
    reading: Reading | None = None,
    codec: str | None = None,
    tokenizer: str | None = None,
    reasoner: str | None = None,
) -> Evaluation:
    """Batches that hold every record once, in the same order and with the same voices each time; arguments as for `make_pipeline`.

    The last batch is filled up with rows without frames (`frame_lengths` and `text_lengths` 0, `record_ids` -1).
    """
    check_rows(batch_size, process_index, process_count)
    mixture = Mixture(
        config,
        sources,
        limits=limits,
        num_shapes=num_shapes,
        shapes=shapes,
        codec=codec,
        tokenizer=tokenizer,
        reasoner=reasoner,
    )
    plan = in_order(mixture.level, mixture.records, len(mixture.shapes), batch_size)
    batches = _Batches(mixture, plan, len(plan), seed, process_index, process_count)
    return Evaluation(batches, reading or Reading())


def check_rows(batch_size: int, process_index: int, process_count: int) -> None:
    """Raises ValueError for an index out of range, or rows that do not divide over the processes."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide over {process_count} processes")


class _Batches:
    """Random access to one process's part of each batch: what grain reads from."""

    def __init__(
        self,
        mixture: Mixture,
        plan: Plan | Sequence[Planned],
        count: int,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        self.mixture, self._plan, self._count, self._seed = mixture, plan, count, seed
        self._process_index, self._process_count = process_index, process_count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Planned:
        planned = self._plan[number]
        rows = len(planned.records) // self._process_count
        start = self._process_index * rows
        # A row of padding is a copy of the batch's first row, which every process can make, and has no frames.
        records = np.where(planned.records < 0, -1 - planned.records[0], planned.records)
        return planned._replace(records=records[start : start + rows])

    def assemble(self, planned: Planned) -> Batch:
        """Reads and lays out the rows."""
        return read_rows(self.mixture, planned, self._seed)


def read_rows(mixture: Mixture, planned: Planned, seed: int) -> Batch:
    """The records of a planned batch, laid out; voices are drawn by `seed`. A negative number, -1 - n, is padding like record n."""
    config, shape = mixture.config, mixture.shapes[planned.shape]
    batch = empty_batch(config, shape, len(planned.records), mixture.hidden)
    for row, number in enumerate(planned.records.tolist()):
        real = number >= 0
        dataset, local = mixture.find(number if real else -1 - number)
        record = dataset[local]
        voice_ids, voice_codes = dataset.voice(record, local, seed, planned.epoch)
        if mixture.hidden:
            batch.hidden[row, : len(record.text)] = record.hidden.astype(np.float32)
        else:
            ids = np.concatenate([record.question_ids, record.text])
            batch.prompt_ids[row, : len(ids)] = ids
            batch.prompt_lengths[row] = len(record.question_ids)
            chunks, lengths = record.chunks(config.reasoner.audio.chunk_frames)
            if len(lengths):
                batch.chunks[row, : len(chunks)] = chunks
                batch.chunk_lengths[row, : len(lengths)] = lengths
        batch.text[row, : len(record.text)] = record.text
        batch.frames[row, : len(record.codes)] = record.codes
        batch.voice_ids[row, : len(voice_ids)] = voice_ids
        batch.voice_frames[row, : len(voice_codes)] = voice_codes
        batch.voice_id_lengths[row] = len(voice_ids)
        batch.voice_frame_lengths[row] = len(voice_codes)
        if real:
            batch.text_lengths[row] = len(record.text)
            batch.frame_lengths[row] = len(record.codes)
            batch.record_ids[row] = number
    return batch


def empty_batch(config: ChromaConfig, shape: Shape, rows: int, hidden: bool) -> Batch:
    """A batch of padding alone. With `hidden`, prompt and chunks are of size 1."""
    pad, books = config.reasoner.pad_token_id, config.num_codebooks
    audio, width = config.reasoner.audio, config.reasoner.text.hidden_size
    chunk = (1, 1) if hidden else (audio.chunk_frames, audio.num_mel_bins)

    def lengths() -> np.ndarray:
        return np.zeros(rows, np.int32)

    return Batch(
        prompt_ids=np.full((rows, shape.prompt if not hidden else 1), pad, np.int32),
        prompt_lengths=np.ones(rows, np.int32),
        chunks=np.zeros((rows, shape.chunks if not hidden else 1, *chunk), np.float32),
        chunk_lengths=np.zeros((rows, shape.chunks if not hidden else 1), np.int32),
        hidden=np.zeros((rows, shape.text, width), np.float32) if hidden else None,
        text=np.full((rows, shape.text), pad, np.int32),
        text_lengths=lengths(),
        frames=np.full((rows, shape.frames, books), config.codebook_pad_token_id, np.int32),
        frame_lengths=lengths(),
        voice_ids=np.full((rows, shape.voice_ids), pad, np.int32),
        voice_id_lengths=lengths(),
        voice_frames=np.full(
            (rows, shape.voice_frames, books), config.codebook_pad_token_id, np.int32
        ),
        voice_frame_lengths=lengths(),
        record_ids=np.full(rows, -1, np.int64),
    )


def _grain(batches: _Batches, start: int, reading: Reading):
    """grain's dataset over the batches from number `start` on."""
    try:
        import grain
    except ImportError as e:
        raise ValueError(
            "reading training data needs grain: pip install 'chroma_jax[train]'"
        ) from e
    options = grain.ReadOptions(
        num_threads=reading.threads, prefetch_buffer_size=max(reading.prefetch, reading.threads)
    )
    dataset = grain.MapDataset.source(batches)[start:].map(batches.assemble)
    dataset = dataset.to_iter_dataset(options)
    if not reading.workers:
        return dataset
    if not flags.FLAGS.is_parsed():
        raise ValueError("reading with worker processes needs parsed absl flags")
    workers = grain.multiprocessing.MultiprocessingOptions(reading.workers)
    return dataset.mp_prefetch(workers, worker_init_fn=_leave_signals)


def _leave_signals(number: int, count: int) -> None:
    """In a worker process: a signal to the whole process group is for the one that trains, which ends its workers itself."""
    del number, count
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, signal.SIG_IGN)
    parent = os.getppid()

    def leave_with_it() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # it was killed

    threading.Thread(target=leave_with_it, daemon=True).start()
