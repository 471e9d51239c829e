"""What the answers of a listening test say: shares, preference, exact sign test, intervals over sessions and items both."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from chroma_jax.evaluation import statistics, tables
from chroma_jax.evaluation.listening.sheet import BROKEN, INTACT, KEY_COLUMNS, SAME
from chroma_jax.evaluation.lists import digest
from chroma_jax.evaluation.results import Results

COLUMNS = ("session", "item", "dimension", "side_a", "side_b", "answer", "plays_a", "plays_b", "seconds", "page_version")  # fmt: skip
_PREFERENCE = {"a": -1, "b": 1, "same": 0, "unsure": 0}
_CMOS = {str(i): i for i in range(-3, 4)}
_OUTLIER = 3.29  # standard deviations, ITU-T P.808


class Item(NamedTuple):
    """An item of the key."""

    dimension: str
    kind: str
    systems: dict[str, str]  # by file
    source: str


class Answer(NamedTuple):
    """An answer whose sides are turned back."""

    session: str
    item: str
    dimension: str
    kind: str
    systems: tuple[str, str]  # of side A and B
    value: int  # of B against A


def read_key(path: pathlib.Path) -> tuple[str, str, dict[str, Item]]:
    """(version, scale, items) of a key. Raises ValueError where it is none."""
    rows = _rows(path, KEY_COLUMNS)
    versions, scales = {r["version"] for r in rows}, {r["scale"] for r in rows}
    if len(versions) != 1 or len(scales) != 1:
        raise ValueError(f"{path}: is not the key of one sheet")
    items: dict[str, Item] = {}
    for r in rows:
        item = items.setdefault(r["item"], Item(r["dimension"], r["kind"], {}, r["source"]))
        item.systems[r["file"]] = r["system"]
    return versions.pop(), scales.pop(), items


def read_answers(
    paths: Sequence[pathlib.Path], version: str, scale: str, items: dict[str, Item]
) -> list[Answer]:
    """The answers of all files, each once; a file sent twice counts once.

    Raises ValueError naming file and line: another sheet's answers, foreign columns, items or sounds, a pair answered twice in two ways.
    """
    values = _PREFERENCE if scale == "preference" else _CMOS
    found: dict[tuple[str, str], tuple[Answer, str]] = {}
    for path in paths:
        for number, r in enumerate(_rows(path, COLUMNS), 2):
            where = f"{path}:{number}"
            if r["page_version"] != version:
                raise ValueError(
                    f"{where}: answers sheet {r['page_version']}, but the key is of {version}"
                )
            item, sides = items.get(r["item"]), (r["side_a"], r["side_b"])
            if item is None or r["dimension"] != item.dimension or {*sides} != {*item.systems}:
                raise ValueError(f"{where}: item {r['item']} with these sounds is not in the key")
            if r["answer"] not in values:
                raise ValueError(
                    f"{where}: no answer {r['answer']!r}: there are {', '.join(values)}"
                )
            systems = tuple(item.systems[s] for s in sides)
            answer = Answer(r["session"], r["item"], item.dimension, item.kind, systems, values[r["answer"]])  # fmt: skip
            kept = found.setdefault((answer.session, answer.item), (answer, where))
            if kept[0] != answer:
                raise ValueError(f"{where}: session {answer.session} answered item {answer.item} otherwise in {kept[1]}")  # fmt: skip
    return [answer for answer, _ in found.values()]


def score(
    key: pathlib.Path,
    paths: Sequence[pathlib.Path],
    out: pathlib.Path,
    *,
    system: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores `system` against the other one, for each dimension; returns the summary, as written to `out`.

    A session that did not hear that the spoilt sound is worse is left out, and named. With the scale "cmos", votes beyond 3.29
    standard deviations of their item's are left out and counted.

    Raises ValueError as `read_key` and `read_answers`, for a system that the key does not have, or no answer left.
    """
    version, scale, items = read_key(key)
    systems = {s for item in items.values() for s in item.systems.values()} - {SAME, INTACT, BROKEN}
    if system not in systems:
        raise ValueError(f"{key}: has no system {system!r}: there are {', '.join(sorted(systems))}")
    answers = read_answers(paths, version, scale, items)
    (other,) = systems - {system}
    sessions = sorted({a.session for a in answers})
    failed = sorted({a.session for a in answers if a.kind == "broken" and not _heard(a)})
    identical = [a.value for a in answers if a.kind == "identical" and a.session not in failed]
    trials = [a for a in answers if a.kind == "trial" and a.session not in failed]
    if not trials:
        raise ValueError(
            f"no answers to score: {len(sessions)} sessions, {len(failed)} failed the check"
        )
    setup = {
        "task": "listening", "system": system, "other": other, "scale": scale,
        "list": {"name": f"sheet {version}", "digest": digest(key), "n": len(items)},
    }  # fmt: skip
    rows, table, outliers = [], [], 0
    for dimension in dict.fromkeys(a.dimension for a in trials):
        votes = [_row(a, system, items) for a in trials if a.dimension == dimension]
        kept = _without_outliers(votes) if scale == "cmos" else votes
        outliers += len(votes) - len(kept)
        rows += kept
        table.append(_table_row(dimension, kept, scale, seed))
    notes = [
        f"{system} against {other}, sheet {version}: {len(sessions)} sessions, {len(trials) - outliers} answers.",
        f"Left out: {len(failed)} sessions that did not hear the spoilt sound{' (' + ', '.join(failed) + ')' if failed else ''}",
        f"and {outliers} votes beyond {_OUTLIER} standard deviations.",
        f"Identical pairs called the same: {sum(v == 0 for v in identical)} of {len(identical)}.",
        "Preference: wins less losses, in points of 100. [95 % intervals, sessions and items both resampled], "
        f"seed {seed}. p: exact two-sided sign test without ties.",
    ]
    summary = {
        **setup, "answers": digest(*sorted(paths)), "n": len(rows), "sessions": len(sessions), "failed_sessions": failed, "outliers": outliers,
        "dimensions": {r["dimension"]: _plain(rows, r["dimension"], seed) for r in table},
        "seed": seed, "tables": [{"title": f"Listening: {system} against {other}", "rows": table, "note": " ".join(notes)}],
        "plots": ["value"], "main": "vote",
    }  # fmt: skip
    results = Results(out, setup)
    results.finish(rows, summary, tables.page(summary))
    return summary


def _heard(answer: Answer) -> bool:
    """Whether the intact sound was called the better one."""
    return (answer.value > 0) if answer.systems[1] == INTACT else (answer.value < 0)


def _row(answer: Answer, system: str, items: dict[str, Item]) -> dict[str, Any]:
    value = answer.value if answer.systems[1] == system else -answer.value
    return {
        "key": f"vote/{answer.dimension}/{answer.session}/{answer.item}",
        "dimension": answer.dimension,
        "session": answer.session,
        "item": answer.item,
        "source": items[answer.item].source,
        "value": value,
    }


def _without_outliers(votes: list[dict]) -> list[dict]:
    kept = []
    for vote in votes:
        others = np.array([v["value"] for v in votes if v["item"] == vote["item"]], float)
        if abs(vote["value"] - others.mean()) <= _OUTLIER * others.std() or others.std() == 0:
            kept.append(vote)
    return kept


def _counts(votes: list[dict]) -> tuple[int, int, int]:
    signs = [np.sign(v["value"]) for v in votes]
    return signs.count(1), signs.count(-1), signs.count(0)


def _estimates(votes: list[dict], seed: int) -> tuple[statistics.Estimate, statistics.Estimate]:
    """Preference in points, and the mean value."""
    sessions, items = [v["session"] for v in votes], [v["item"] for v in votes]
    signs = [100.0 * np.sign(v["value"]) for v in votes]
    return (
        statistics.crossed_mean(signs, sessions, items, seed),
        statistics.crossed_mean([v["value"] for v in votes], sessions, items, seed),
    )


def _table_row(dimension: str, votes: list[dict], scale: str, seed: int) -> dict[str, str]:
    wins, losses, ties = _counts(votes)
    preference, value = _estimates(votes, seed)
    row = {
        "dimension": dimension,
        "n": str(len(votes)),
        "wins, %": f"{100 * wins / len(votes):.1f}",
        "losses, %": f"{100 * losses / len(votes):.1f}",
        "ties, %": f"{100 * ties / len(votes):.1f}",
        "preference, points": tables.estimate(preference, 1),
        "p": f"{statistics.sign_test(wins, losses):.2g}",
    }
    return row | ({"CMOS": tables.estimate(value, 2)} if scale == "cmos" else {})


def _plain(rows: list[dict], dimension: str, seed: int) -> dict[str, Any]:
    votes = [r for r in rows if r["dimension"] == dimension]
    wins, losses, ties = _counts(votes)
    preference, value = _estimates(votes, seed)
    return {
        "n": len(votes), "wins": wins, "losses": losses, "ties": ties,
        "preference": round(preference.value, 3), "interval": [round(preference.low, 3), round(preference.high, 3)],
        "mean": round(value.value, 4), "p": statistics.sign_test(wins, losses),
    }  # fmt: skip


def _rows(path: pathlib.Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f)
            names, rows = tuple(reader.fieldnames or ()), list(reader)
    except FileNotFoundError as e:
        raise ValueError(f"no such file: {path}") from e
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as e:
        raise ValueError(f"{path}: is no CSV: {e}") from e
    if names != tuple(columns):
        raise ValueError(f"{path}: wanted the columns {', '.join(columns)}")
    short = next((i for i, r in enumerate(rows, 2) if None in r or None in r.values()), None)
    if short:
        raise ValueError(f"{path}:{short}: has not {len(columns)} fields")
    if not rows:
        raise ValueError(f"{path}: has no rows")
    return rows
