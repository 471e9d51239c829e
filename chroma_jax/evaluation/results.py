"""A folder of results: each item's as soon as it is there, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

ITEMS, SETUP, SUMMARY, TABLE = "items.jsonl", "setup.json", "summary.json", "table.md"


class Results:
    """`items.jsonl` in a folder, one object a line, with a unique "key"; beside it `setup.json`, what the values depend on.

    Raises ValueError where the folder holds results of another set-up, naming what differs; a full disk is one, too.
    """

    def __init__(self, folder: str | os.PathLike, setup: dict[str, Any]):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / ITEMS
        before = self.folder / SETUP
        setup = json.loads(json.dumps(setup))
        if before.exists():
            _same(self.folder, json.loads(before.read_text()), setup)
        else:
            if self._path.exists():
                raise ValueError(
                    f"{self.folder}: has {ITEMS} without {SETUP}; choose another --out"
                )
            write_json(before, setup)
        self.rows: dict[str, dict] = {row["key"]: row for row in self._read()}

    def _read(self) -> list[dict]:
        """What is there. The last line of a run that was stopped may be a part of one: it is dropped, in the file too."""
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with open(self._path, "r+b") as f:
                f.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.decode().splitlines()]
        except ValueError as e:
            raise ValueError(f"{self._path}: is damaged: {e}") from e

    def fill(
        self,
        keys: Sequence[str],
        work: Callable[[str], dict[str, Any]],
        *,
        workers: int = 1,
        stale: Callable[[dict], bool] = lambda row: False,
        title: str = "",
    ) -> list[dict]:
        """The rows of `keys` in their order: those that are there already and not stale, and `work(key)` for the others.

        Each new row is on the disk before the next is asked for; of `workers` threads that work ahead, at most that many
        rows are lost with a run that is stopped. The values do not depend on `workers`.
        """
        open_keys = [k for k in keys if k not in self.rows or stale(self.rows[k])]
        with (
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
            open(self._path, "ab", buffering=0) as file,
        ):
            pending: list[tuple[str, concurrent.futures.Future]] = []
            waiting = iter(open_keys)
            try:
                for _ in tqdm(open_keys, desc=title, disable=not open_keys):
                    while len(pending) < workers and (key := next(waiting, None)) is not None:
                        pending.append((key, pool.submit(work, key)))
                    key, future = pending.pop(0)
                    row = {"key": key, **future.result()}
                    self._append(file, row)
                    self.rows[key] = row
            finally:
                for _, future in pending:
                    future.cancel()
        return [self.rows[k] for k in keys]

    def _append(self, file: io.FileIO, row: dict) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            while line:  # a disk that fills takes a part first
                line = line[file.write(line) :]
        except OSError as e:
            raise ValueError(
                f"{self._path} cannot be written: {e.strerror}; what is there is kept, run again to go on"
            ) from e

    def finish(self, rows: Iterable[dict], summary: dict[str, Any], table: str) -> None:
        """Writes the rows anew in their order, the summary and the table: the same bytes, however often the run was stopped."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self._path, lines)
        write_json(self.folder / SUMMARY, summary)
        write_text(self.folder / TABLE, table)


def write_text(path: pathlib.Path, text: str) -> None:
    """A file that appears under its name when it is complete."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: pathlib.Path, content: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_rows(folder: pathlib.Path) -> list[dict]:
    """The items of a folder of results."""
    path = folder / ITEMS
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_summary(folder: str | os.PathLike) -> dict[str, Any]:
    """The summary of a folder of results. Raises ValueError where there is none."""
    path = pathlib.Path(folder) / SUMMARY
    if not path.is_file():
        raise ValueError(
            f"{folder}: has no {SUMMARY}; the evaluation that writes it has not finished"
        )
    return json.loads(path.read_text("utf-8"))


def _same(folder: pathlib.Path, before: dict, now: dict) -> None:
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{folder} holds results with another {key} ({_short(before.get(key))}, now "
                f"{_short(now.get(key))}): choose another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 50 else f"{text[:47]}..."
