"""The directory of a synthesis: shards of rows that are whole or not there, and what is made of them when all are.

plan.json                  what the directory is made with
clips/                     sounds, see `clips`
shards/train-00000.jsonl   `shard_size` records, kept and refused, see `rows`
train.jsonl                manifest for `chroma_jax.prepare`; validation.jsonl likewise
sounds.jsonl               every clip that is in a manifest of training, with its words: what a codec is trained on
records.jsonl              scores, seeds, voices and licences of the rows in the manifests, by id
report.json                counts, by split and reason
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from chroma_jax.data.files import write_atomically
from chroma_jax.synthesis import writers
from chroma_jax.synthesis.config import SPLITS, TRAIN, VALIDATION, SynthesisConfig
from chroma_jax.synthesis.rows import Record

_VERSION = 1


class Shard(NamedTuple):
    """Rows that are finished together."""

    split: str
    index: int
    first: int  # number of its first row
    count: int

    @property
    def file(self) -> str:
        """Relative to the directory."""
        return os.path.join("shards", f"{self.split}-{self.index:05d}.jsonl")


def plan(config: SynthesisConfig) -> list[Shard]:
    """All shards. Those of validation come first: what is made in part can be tested."""
    out = []
    for split in (VALIDATION, TRAIN):
        rows, size = getattr(config.rows, split), config.shard_size
        for index, start in enumerate(range(0, rows, size)):
            out.append(Shard(split, index, config.rows.first + start, min(size, rows - start)))
    return out


def begin(directory: str, config: SynthesisConfig) -> None:
    """Makes the directory, or checks that it was begun with the same configuration. Raises ValueError."""
    values = config.to_dict()
    values["writer"]["questions_digest"] = writers.digest(config.writer.questions)
    path = os.path.join(directory, "plan.json")
    try:
        os.makedirs(os.path.join(directory, "shards"), exist_ok=True)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                begun = json.load(f)
            if begun.get("version") != _VERSION:
                raise ValueError(f"{directory} was made by another version of this program")
            _compare(directory, _flat(begun["config"]), _flat(values))
        else:
            write_atomically(path, json.dumps({"version": _VERSION, "config": values}, indent=1).encode())  # fmt: skip
    except (OSError, json.JSONDecodeError) as e:
        raise ValueError(f"{directory} cannot be used: {e}") from e


def _compare(directory: str, begun: dict[str, Any], now: dict[str, Any]) -> None:
    for key in sorted(set(begun) | set(now)):
        if begun.get(key) != now.get(key):
            raise ValueError(
                f"{directory} was begun with other settings: {key} was {begun.get(key)!r}, now it is {now.get(key)!r}; "
                "choose another --out"
            )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, list):
        tree = {str(i): value for i, value in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return out


def is_done(directory: str, shard: Shard) -> bool:
    """Whether the shard is there."""
    return os.path.isfile(os.path.join(directory, shard.file))


def write(directory: str, shard: Shard, records: list[Record]) -> None:
    """Writes a shard, aside and then under its name."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(os.path.join(directory, shard.file), lines.encode())


def read(directory: str, shard: Shard) -> list[Record]:
    """The records of a shard that is done."""
    with open(os.path.join(directory, shard.file), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def finish(directory: str, config: SynthesisConfig, *, partly: bool = False) -> dict[str, Any]:
    """Makes manifests, sounds, records and the report of the shards; returns the report.

    Args:
      directory: of the synthesis.
      config: of it.
      partly: of those that are done so far.

    Raises:
      ValueError: a shard is missing, or no row stayed.
    """
    missing = [shard for shard in plan(config) if not is_done(directory, shard)]
    if missing and not partly:
        raise ValueError(
            f"{directory}: {len(missing)} shards are missing, the first is {missing[0].file}"
        )
    records = list(_records(directory, config))
    _refuse_across_rows(records)
    kept = [record for record in records if record["reason"] is None]
    if not kept:
        raise ValueError(
            f"{directory}: no row of {len(records)} stays; see the reasons in its shards"
        )
    for split in SPLITS:
        rows = [record["manifest"] for record in kept if record["split"] == split]
        _write_lines(directory, f"{split}.jsonl", rows)
    _write_lines(directory, "sounds.jsonl", _sounds(kept))
    about = ("id", "split", "kind", "apart", "texts", "voices", "scores", "licences")
    _write_lines(directory, "records.jsonl", [{k: r[k] for k in about} for r in kept])
    report = _report(records)
    write_atomically(os.path.join(directory, "report.json"), json.dumps(report, indent=1).encode())
    return report


def _records(directory: str, config: SynthesisConfig) -> Iterator[Record]:
    for shard in plan(config):
        if is_done(directory, shard):
            yield from read(directory, shard)


def _refuse_across_rows(records: list[Record]) -> None:
    """Sets the reasons that one row alone does not show."""

    def kept() -> list[Record]:
        return [record for record in records if record["reason"] is None]

    trained = {_conversation(record) for record in kept() if record["split"] == TRAIN}
    for record in kept():
        if record["split"] == VALIDATION and _conversation(record) in trained:
            record["reason"] = "split"
    seen = set()
    for record in sorted(kept(), key=lambda r: r["split"]):  # training comes first
        row = record["manifest"]
        heard = json.dumps([row.get("turns"), row.get("question"), row.get("question_text"), row["answer_audio"]])  # fmt: skip
        if heard in seen:
            record["reason"] = "twin"
        seen.add(heard)
    answers = collections.defaultdict(set)
    for record in kept():
        row = record["manifest"]
        answers[record["split"], row["speaker"]].add(row["answer_text"])
    for record in kept():
        row = record["manifest"]
        if "voice_audio" not in row and len(answers[record["split"], row["speaker"]]) < 2:
            record["reason"] = "lone"


def _conversation(record: Record) -> str:
    """What is asked, by its words alone, with all that was said before."""
    return "|".join(writers.plain(text) for text in record["texts"][:-1])


def _sounds(kept: list[Record]) -> list[dict[str, str]]:
    """Each clip of training once, in order."""
    found: dict[str, dict[str, str]] = {}
    for record in kept:
        if record["split"] != TRAIN:
            continue
        row, voices, texts = record["manifest"], record["voices"], record["texts"]
        turns = [*row.get("turns", ()), {"audio": row.get("question")}]
        said = [(turn.get("audio"), text, voices["question"]) for turn, text in zip(turns, texts, strict=False)]  # fmt: skip
        for file, text, speaker in [*said, (row["answer_audio"], texts[-1], voices["answer"])]:
            if file:
                name = os.path.splitext(os.path.basename(file))[0]
                found.setdefault(
                    file, {"id": name, "audio": file, "text": text, "speaker": speaker}
                )
    return list(found.values())


def _report(records: list[Record]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for split in SPLITS:
        mine = [record for record in records if record["split"] == split]
        if not mine:
            continue
        kept = [record for record in mine if record["reason"] is None]
        seconds = sum(record["scores"]["answer"]["seconds"] for record in kept)
        report[split] = {
            "rows": len(mine),
            "kept": len(kept),
            "answer_seconds": round(seconds, 1),
            "refused": dict(
                collections.Counter(r["reason"] for r in mine if r["reason"]).most_common()
            ),
            "kinds": dict(collections.Counter(r["kind"] for r in kept).most_common()),
            "voices": dict(
                sorted(collections.Counter(r["voices"]["answer"] for r in kept).items())
            ),
            "apart": dict(collections.Counter(r["apart"] for r in kept if r["apart"])),
        }
    return report


def _write_lines(directory: str, name: str, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(os.path.join(directory, name), lines.encode())
