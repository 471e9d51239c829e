"""Figures as tables show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chroma_jax.evaluation.statistics import Estimate


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same keys."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def estimate(found: Estimate | None, digits: int, scale: float = 1.0) -> str:
    """The value and its interval: "4.12 [3.98, 4.25]"; a dash of nothing."""
    if found is None:
        return "–"
    value, low, high = (f"{scale * x:.{digits}f}" for x in found[:3])
    return f"{value} [{low}, {high}]"


def page(summary: dict[str, Any]) -> str:
    """A summary's tables with their titles and notes, as Markdown."""
    parts = [
        f"### {t['title']}\n\n{markdown(t['rows']) if t['rows'] else ''}\n{t['note']}\n"
        for t in summary["tables"]
    ]
    return "\n".join(parts)


def judges_note(judges: dict[str, dict[str, str]]) -> str:
    """Which judge said what: "WER: whisper-base (int8, greedy), weights 905e5bf8336b"."""
    return "; ".join(
        f"{k}: {j['judge']}, weights {j['weights']}, {j['scale']}" for k, j in judges.items()
    )
