"""Results as one HTML page that needs nothing else: tables, plots, and the items that were worst."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from chroma_jax.evaluation.results import read_rows, read_summary, write_text

_NAMES = {
    "wer": "WER",
    "sim": "SIM",
    "mos": "MOS",
    "seconds": "Seconds of sound",
    "asr_wer": "WER of the ASR against the model's own text",
    "first_sound": "Seconds to the first sound",
    "rtf": "Real-time factor",
    "score": "Score",
    "value": "Answer (1 for the system)",
}
_WORST = 20
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #fff; --line: #c9d2dc; --bar: #2f6f9f; --soft: #f2f5f8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --paper: #14191f; --line: #3b4652; --bar: #7db7e0; --soft: #1c232b } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 70rem; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
figure { margin: 0; background: var(--soft); padding: .7rem; border-radius: .4rem } figcaption { font-size: .9rem }
svg { width: 100%; height: auto } svg rect { fill: var(--bar) } svg text { fill: var(--ink); font: 11px system-ui, sans-serif }
svg line { stroke: var(--line) } .note { font-size: .9rem; max-width: 60rem }
"""


def write(folders: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """The page of one or several folders of results, beside each other where their judges are the same.

    Raises ValueError where a folder has no finished results, or the page cannot be written.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path}: wanted the name of a file in a folder that is there")
    parts = [(folder, read_summary(folder), read_rows(folder)) for folder in folders]
    title = "Evaluation: " + ", ".join(s.get("system") or s["task"] for _, s, _ in parts)
    body = [f"<h1>{_e(title)}</h1>"]
    if len(parts) > 1:
        body.append(_side_by_side([s for _, s, _ in parts]))
    for folder, summary, rows in parts:
        body += _section(folder, summary, rows)
    write_text(path, "<!doctype html>\n<html lang=en><meta charset=utf-8>\n"
               '<meta name=viewport content="width=device-width, initial-scale=1">\n'
               f"<title>{_e(title)}</title>\n<style>{_STYLE}</style>\n<main>{''.join(body)}</main></html>\n")  # fmt: skip


def _section(folder: pathlib.Path, summary: dict[str, Any], rows: list[dict]) -> list[str]:
    body = []
    for table in summary["tables"]:
        body.append(f"<h2>{_e(table['title'])}</h2>")
        if table["rows"]:
            body.append(_table(table["rows"]))
        body.append(f"<p class=note>{_e(table['note'])}</p>")
    own = [r for r in rows if r["key"].startswith(summary.get("main", "system"))]
    plots = [
        (field, [r[field] for r in own if r.get(field) is not None])
        for field in summary.get("plots", ())
    ]
    figures = [histogram(_NAMES.get(field, field), values) for field, values in plots if values]
    body.append(f"<div class=plots>{''.join(figures)}</div>")
    if any("wer" in r for r in own):
        worst = sorted(own, key=lambda r: (-(r["wer"] or 0), r["key"]))[:_WORST]
        shown = [
            {"item": r["key"].partition("/")[2], "WER": r["wer"], "SIM": r["sim"], "MOS": r["mos"],
             "heard": r["missing"] or r["heard"]} for r in worst if r["wer"]
        ]  # fmt: skip
        if shown:
            body += [f"<h2>Most word errors in {_e(folder.name)}</h2>", _table(shown)]
    return body


def _side_by_side(summaries: list[dict]) -> str:
    """One table; a column holds the values of one judge alone."""
    rows = []
    for s in summaries:
        row = {"system": s.get("system") or s["task"], "n": s.get("n", "")}
        for measure, key in (("WER", "wer"), ("SIM", "sim"), ("MOS", "mos")):
            judge = s.get("judges", {}).get(measure)
            if judge and s.get(key) is not None:
                low, high = s["intervals"][key]
                column = f"{measure} ({judge['judge']}, {judge['weights']}, {s['list']['name']} {s['list']['digest']})"
                row[column] = f"{s[key]:.3f} [{low:.3f}, {high:.3f}]"
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    return "<h2>Side by side</h2>" + _table([{c: row.get(c, "–") for c in columns} for row in rows])


def histogram(title: str, values: Sequence[float], bins: int = 20) -> str:
    """A figure of how values lie, with their mean."""
    counts, edges = np.histogram(np.asarray(values, float), bins=bins)
    width, height, foot = 320, 130, 18
    step, most = width / bins, max(counts.max(), 1)
    bars = [
        f'<rect x="{i * step + 1:.1f}" y="{height - height * c / most:.1f}" width="{step - 2:.1f}" '
        f'height="{height * c / most:.1f}"><title>{edges[i]:.3g} to {edges[i + 1]:.3g}: {c}</title></rect>'
        for i, c in enumerate(counts)
    ]
    marks = [
        f'<text x="{x}" y="{height + foot - 4}" text-anchor="{anchor}">{value:.3g}</text>'
        for x, anchor, value in ((0, "start", edges[0]), (width, "end", edges[-1]))
    ]
    caption = f"{title}: mean {np.mean(values):.3f}, n {len(values)}"
    return (
        f'<figure><svg viewBox="0 0 {width} {height + foot}" role="img" aria-label="{_e(caption)}">'
        f'<line x1="0" y1="{height}" x2="{width}" y2="{height}"/>{"".join(bars)}{"".join(marks)}</svg>'
        f"<figcaption>{_e(caption)}</figcaption></figure>"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{_e(k)}</th>" for k in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{_e(_shown(v))}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "–" if value is None else value


def _e(value: Any) -> str:
    return html.escape(str(value))
