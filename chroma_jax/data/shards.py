"""Shards of a dataset on disk: written whole or not at all, each with a note of what it was made from.

A shard holds the records of consecutive rows of the manifest. It counts as done when its note (a JSON file, written after the
shard) is there, was made from the same rows, and the shard has the size that the note says. So an interrupted `prepare` goes on where it
was, and processes that share a file system need no other word from each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from chroma_jax import paths
from chroma_jax.checkpoint import locking
from chroma_jax.data import files, records
from chroma_jax.data import metadata as md
from chroma_jax.data.manifest import BadRow
from chroma_jax.data.records import Record

PLAN = "prepare.json"  # settings that all shards of a directory share
_OURS = re.compile(r"records-(\d{5,})\.(array_record|json)")
_FIELDS = ("rows", "records", "bytes", "index", "speakers", "skipped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """What is known of a finished shard.

    rows: hash of the manifest's rows. index: `metadata.INDEX_COLUMNS` as lists, speakers counted within the shard.
    """

    rows: str
    records: int
    bytes: int
    index: Mapping[str, list[int]]
    speakers: list[str]
    skipped: list[BadRow]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"records-{number:05d}.array_record"


def read_note(directory: str, number: int, rows: str) -> Note | None:
    """The note of shard `number`, if it is complete and was made from these rows."""
    path = os.path.join(directory, shard_name(number))
    try:
        content = json.loads(paths.at(_note_path(path)).read_bytes())
        if content["rows"] != rows:
            return None
        if content["records"] and paths.size(path) != content["bytes"]:
            return None
        skipped = [BadRow(*row) for row in content.pop("skipped")]
        return Note(skipped=skipped, **{key: content[key] for key in _FIELDS if key != "skipped"})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_shard(
    directory: str,
    number: int,
    rows: str,
    content: Sequence[Record],
    skipped: Sequence[BadRow],
    config,
) -> Note:
    """Writes a shard and then its note. Raises DatasetError (or OSError) when that fails; nothing then looks complete."""
    path = os.path.join(directory, shard_name(number))
    stem = os.path.splitext(shard_name(number))[0]
    for name in [] if paths.is_remote(directory) else os.listdir(directory):
        if name.startswith(f".{stem}.") and name.endswith(".tmp"):
            os.unlink(os.path.join(directory, name))
    for old in (_note_path(path), path):  # of other rows
        if paths.at(old).exists():
            paths.at(old).unlink()
    size = _write_records(path, [records.encode(r) for r in content]) if content else 0
    speakers = sorted({r.speaker for r in content if r.speaker is not None})
    note = Note(
        rows=rows,
        records=len(content),
        bytes=size,
        index=_index(content, speakers, config),
        speakers=speakers,
        skipped=list(skipped),
    )
    files.write_atomically(_note_path(path), json.dumps(dataclasses.asdict(note)).encode())
    return note


def array_record_module() -> ModuleType:
    """The library that writes shards. Raises DatasetError where it is not installed."""
    try:
        from array_record.python import array_record_module as module
    except ImportError as e:
        raise md.DatasetError(
            "preparing data needs array_record: pip install 'chroma_jax[train]'"
        ) from e
    return module


def _note_path(path: str) -> str:
    return os.path.splitext(path)[0] + ".json"


def _write_records(path: str, rows: list[bytes]) -> int:
    module = array_record_module()
    remote = paths.is_remote(path)  # array_record reads objects, and writes files alone
    folder, name = os.path.split(path)
    folder = tempfile.gettempdir() if remote else folder
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
    try:
        writer = module.ArrayRecordWriter(temporary, "group_size:1")
        for row in rows:
            writer.write(row)
        writer.close()
        # What the disk gives back is what counts.
        reader = module.ArrayRecordReader(temporary)
        intact = reader.num_records() == len(rows) and all(
            bytes(got) == want for got, want in zip(reader.read_all(), rows, strict=True)
        )
        reader.close()
        if not intact:
            raise md.DatasetError(f"{path}: what was written does not read back")
        size = os.path.getsize(temporary)
        if remote:
            paths.upload(temporary, path)
            return size
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        files.sync_directory(folder)
        return size
    except RuntimeError as e:  # array_record tells everything this way
        raise md.DatasetError(f"{path} cannot be written: {e}") from e
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _index(content: Sequence[Record], speakers: list[str], config) -> dict[str, list[int]]:
    chunk_frames = config.reasoner.audio.chunk_frames
    number = {name: i for i, name in enumerate(speakers)}
    rows = [
        {
            "question": len(r.question_ids),
            "chunks": int((-(-r.mel_lengths // chunk_frames)).sum()),
            "text": len(r.text),
            "frames": len(r.codes),
            "reference_ids": len(r.reference_ids),
            "reference_frames": r.reference_frames,
            "voice_ids": len(r.voice_ids),
            "voice_frames": len(r.voice_codes),
            "speaker": number.get(r.speaker, -1),
            "utterance": _hash(r.codes),
        }
        for r in content
    ]
    return {name: [row[name] for row in rows] for name in md.INDEX_COLUMNS}


def _hash(codes: np.ndarray) -> int:
    digest = hashlib.sha256(codes.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def finish(directory: str, plan: Mapping[str, Any], rows: Sequence[str], bad: Sequence[BadRow]):
    """Writes index.npz and dataset.json once every shard is there; several processes may do it, they write the same.

    Args:
      directory: of the shards.
      plan: fingerprints and settings (`PLAN`).
      rows: hash of the manifest's rows of each shard.
      bad: rows that were left out before any shard.

    Returns:
      The metadata; or None while shards are missing.
    """
    notes = [read_note(directory, number, key) for number, key in enumerate(rows)]
    if any(note is None for note in notes):
        return None
    speakers = sorted({name for note in notes for name in note.speakers})
    number = {name: i for i, name in enumerate(speakers)}
    columns = {}
    for name, dtype in md.INDEX_COLUMNS.items():
        columns[name] = np.concatenate([np.array(note.index[name], dtype) for note in notes])
    columns["speaker"] = np.concatenate(
        [np.array([number[note.speakers[s]] if s >= 0 else -1 for s in note.index["speaker"]], np.int32) for note in notes]
    )  # fmt: skip
    total = sum(note.records for note in notes)
    if not total:
        raise md.DatasetError(f"{directory}: not one row of the manifest could be used")
    skipped = sorted({*bad, *(row for note in notes for row in note.skipped)})
    key = plan_key(plan, rows, [row.line for row in skipped])
    metadata = md.Metadata(
        **plan,
        key=key,
        num_records=total,
        shards=tuple(
            {"name": shard_name(i), "records": note.records, "bytes": note.bytes}
            for i, note in enumerate(notes)
            if note.records
        ),
        speakers=tuple(speakers),
        statistics=statistics(columns),
        skipped=tuple(row._asdict() for row in skipped),
    )
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), **columns)
    files.write_atomically(os.path.join(directory, md.INDEX), buffer.getvalue())
    md.write_metadata(directory, metadata)
    for name in paths.names(directory):  # of a longer manifest
        match = _OURS.fullmatch(name)
        if match and int(match.group(1)) >= len(rows):
            paths.at(os.path.join(directory, name)).unlink()
    return metadata


def plan_key(plan: Mapping[str, Any], rows: Sequence[str], skipped: Sequence[int] = ()) -> str:
    """Stands for settings, manifest, and the lines that were left out."""
    return md.fingerprint([plan, list(rows), *([list(skipped)] if skipped else [])])


def statistics(index: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Lengths of the records, and where their voice prompts will come from."""
    lengths = {}
    for name in md.INDEX_COLUMNS:
        if name in ("speaker", "utterance"):
            continue
        column = index[name]
        lengths[name] = {
            "min": int(column.min()),
            "median": float(np.median(column)),
            "max": int(column.max()),
            "sum": int(column.sum(dtype=np.int64)),
        }
    speaker = index["speaker"]
    pairs = np.unique(np.stack([speaker.astype(np.int64), index["utterance"]]), axis=1)[0]
    distinct = np.bincount(pairs[pairs >= 0], minlength=int(speaker.max()) + 1)
    other = np.zeros(len(speaker), bool)
    other[speaker >= 0] = distinct[speaker[speaker >= 0]] > 1
    own = ~other & (index["voice_frames"] > 0)
    return {
        "lengths": lengths,
        "voices": {
            "another utterance of the speaker": int(other.sum()),
            "a recording of the row's own": int(own.sum()),
            "the answer itself": int((~other & ~own).sum()),
        },
        # Answers with more tokens than speech has pairs for (see `schedule`): the rest is not trained on.
        "text_beyond_speech": int((index["text"] > -(-index["frames"] // 2)).sum()),
    }


@contextlib.contextmanager
def exclusive(directory: str, process_id: int, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps a second process of the same number out of a directory. Raises DatasetError."""
    path = os.path.join(directory, f".process-{process_id}.lock")
    busy = f"another process is preparing {directory} with process_id {process_id}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locking.exclusive(path, busy, say))
        except locking.LockedError as e:
            raise md.DatasetError(str(e)) from e
        yield
