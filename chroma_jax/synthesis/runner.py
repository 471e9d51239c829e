"""Runs a synthesis: all shards that are not there yet, in this process or on Apache Beam; then the manifests."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from chroma_jax.synthesis import shards
from chroma_jax.synthesis.clips import Clips
from chroma_jax.synthesis.config import SynthesisConfig
from chroma_jax.synthesis.judging import Judges, open_judges
from chroma_jax.synthesis.rows import make_row
from chroma_jax.synthesis.shards import Shard
from chroma_jax.synthesis.writers import open_writer

_LOOK_EVERY = 2.0  # seconds, for shards that others finish


class Workshop:
    """Everything that makes shards, opened once in a process: writer, voices and judges."""

    def __init__(self, directory: str, config: SynthesisConfig, judges: Judges | None = None):
        self.directory, self.config = directory, config
        self._writer = open_writer(config)
        judges = open_judges(config.filters, config.language) if judges is None else judges
        self._clips = Clips(directory, config, judges)

    def make(self, shard: Shard, made: Callable[[], object] = lambda: None) -> None:
        """Makes a shard, if it is not there. `made` is called after each row."""
        if shards.is_done(self.directory, shard):
            return
        records = []
        for number in range(shard.first, shard.first + shard.count):
            row = make_row(number, shard.split, self.config, self._writer, self._clips)
            records.append(row)
            made()
        shards.write(self.directory, shard, records)


def run(
    directory: str | os.PathLike,
    config: SynthesisConfig,
    *,
    runner: str = "",
    runner_options: Sequence[str] = (),
    judges: Judges | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Makes what is missing in the directory, and its manifests.

    Args:
      directory: of the synthesis; one that an interrupted run left is gone on with.
      config: of it.
      runner: "" for this process; a runner of Apache Beam, such as "DirectRunner".
      runner_options: of Beam, as on its command line.
      judges: in place of those that the configuration names; in this process only.
      say: told, a line each, what happens.

    Returns:
      The report, see `shards`.

    Raises:
      ValueError, OSError: what the caller can mend; finished shards and clips stay.
    """
    directory = os.path.abspath(os.path.expanduser(os.fspath(directory)))
    shards.begin(directory, config)
    todo = [shard for shard in shards.plan(config) if not shards.is_done(directory, shard)]
    total = config.rows.train + config.rows.validation
    left = sum(shard.count for shard in todo)
    if left < total:
        say(f"resuming: {total - left} of {total} rows are done")
    if todo and runner:
        with _Watch(directory, todo, total):
            _run_beam(directory, config, todo, runner, runner_options)
    elif todo:
        workshop = Workshop(directory, config, judges)
        with _bar(total, total - left) as bar:
            for shard in todo:
                workshop.make(shard, bar.update)
    return shards.finish(directory, config)


def describe(report: dict[str, Any]) -> str:
    """A report as lines to read."""
    lines = []
    for split, found in report.items():
        lines.append(f"{split}: {found['kept']} of {found['rows']} rows stay, {found['answer_seconds'] / 60:.1f} minutes of answers")  # fmt: skip
        for reason, count in found["refused"].items():
            lines.append(f"  refused, {reason}: {count}")
        for what in ("voices", "apart"):
            if found[what]:
                listed = ", ".join(f"{name} {count}" for name, count in found[what].items())
                lines.append(f"  {what}: {listed}")
    return "\n".join(lines)


def _bar(total: int, done: int) -> tqdm:
    """A progress bar; in a log file, a line every half minute."""
    seldom = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc="rows", total=total, initial=done, unit="row", mininterval=seldom, delay=seldom
    )


class _Watch:
    """Shows progress while other processes finish shards."""

    def __init__(self, directory: str, todo: Sequence[Shard], total: int):
        self._directory, self._todo = directory, list(todo)
        self._bar = _bar(total, total - sum(shard.count for shard in todo))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._bar.close()

    def _look(self) -> None:
        while True:
            ended = self._end.wait(_LOOK_EVERY)
            done = [shard for shard in self._todo if shards.is_done(self._directory, shard)]
            self._todo = [shard for shard in self._todo if shard not in done]
            self._bar.update(sum(shard.count for shard in done))
            if ended:
                return


def _run_beam(
    directory: str,
    config: SynthesisConfig,
    todo: Sequence[Shard],
    runner: str,
    options: Sequence[str],
) -> None:
    try:
        from chroma_jax.synthesis import on_beam
    except ImportError as e:
        raise ValueError("--runner needs Apache Beam: pip install 'chroma_jax[synthesis]'") from e
    on_beam.run(directory, config, todo, runner, options)
