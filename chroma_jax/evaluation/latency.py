"""How long Chroma lets one wait: clocks of real replies, the paper's table of stages, several streams at once."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from chroma_jax.audio.batch import normalize_inputs, pack
from chroma_jax.audio.wav import load_audio
from chroma_jax.engine import caches, programs
from chroma_jax.engine.request import check_request
from chroma_jax.engine.sampling import Sampling
from chroma_jax.evaluation import clock, stages, tables
from chroma_jax.evaluation.clock import Arrivals
from chroma_jax.evaluation.dialogue import Question
from chroma_jax.evaluation.results import Results

if TYPE_CHECKING:
    from chroma_jax import Chroma, Voice

_RATE, _PACKET = 16_000, 320  # a question comes in packets of 20 ms
WAYS = {"whole": "whole question at once", "spoken": "taken in while it is spoken"}
_FIRSTS = {
    "first_text": "first text token, ms",
    "first_frame": "first frame (the paper's TTFT), ms",
    "first_sound": "first sound, ms",
}


def run(
    questions: Sequence[Question],
    out: pathlib.Path,
    chroma: Chroma,
    voice: Voice,
    *,
    system: str,
    how: dict[str, Any],
    max_seconds: float = 10.0,
    sampling: Sampling | None = None,
    seed: int = 0,
    repeats: int = 5,
    drop: int = 3,
    streams: Sequence[int] = (),
    stage_seconds: float = 0.0,
) -> dict[str, Any]:
    """Measures replies to spoken questions; returns the summary, as written to `out`.

    Args:
      questions: each with one turn and a sound.
      out: the folder of the results.
      chroma: the model.
      voice: the voice to answer in; taken in before the clocks start.
      system: what the tables call it.
      how: what goes beside the figures: checkpoint, dtype and so on.
      max_seconds: longest reply.
      sampling: of the replies.
      seed: of them.
      repeats: runs of each question and way that count.
      drop: runs before them that do not: they compile, too.
      streams: numbers of streams that answer the first question at once.
      stage_seconds: length of the reply for the table of stages, whose text goes on to its end; 0 for no such table.

    Raises ValueError for a question without a sound or with several turns, and as `Chroma.stream`.
    """
    for q in questions:
        if len(q.turns) != 1 or q.turns[0][0] is None:
            raise ValueError(f"latency wants spoken questions of one turn, and {q.name} is none")
    setup = {"task": "latency", "system": system, "made": how | environment(), "drop": drop}
    waves = {q.name: load_audio(q.turns[0][0], _RATE) for q in questions}
    wanted = dict(max_seconds=max_seconds, sampling=sampling, seed=seed)

    def reply(way: str, wave: np.ndarray) -> tuple[Arrivals, Any]:
        if way == "whole":
            start = time.perf_counter()
            stream = chroma.stream((wave, _RATE), voice=voice, **wanted)
        else:
            listening = chroma.listen(voice=voice)
            *packets, last = np.split(wave, range(_PACKET, len(wave), _PACKET))
            for packet in packets:
                listening.push(packet, _RATE)
            start = time.perf_counter()
            listening.push(last, _RATE)
            stream = listening.stream(**wanted)
        with stream:
            return clock.follow(stream, start, chroma.sample_rate), stream.reply()

    warm: set[tuple[str, str]] = set()

    def work(key: str) -> dict[str, Any]:
        _, way, name, number = key.split("/")
        if (way, name) not in warm:
            warm.add((way, name))
            for _ in range(drop):
                reply(way, waves[name])
        arrivals, whole = reply(way, waves[name])
        row = _row(arrivals) | {"finish_reason": whole.finish_reason}
        if number == "0" and arrivals.sounds:
            row["codec"] = round(programs.time_codec(chroma.model, whole.frames), 5)
        return row

    results = Results(out, setup)
    keys = [f"run/{way}/{q.name}/{i}" for way in WAYS for q in questions for i in range(repeats)]
    rows = results.fill(keys, work, title="replies")
    at_once = []
    for count in streams:
        keys = [f"streams/{count}/{i}" for i in range(repeats)]
        at_once += results.fill(
            keys,
            lambda key, count=count: _together(
                chroma, waves[questions[0].name], voice, count, wanted
            ),
            title=f"{count} streams",
        )
    parts = [_single(rows, waves, voice)]
    if streams:
        parts.append(_several(at_once))
    if stage_seconds:
        parts.append(_stages(chroma, questions[0], voice, stage_seconds, repeats))
    firsts = [r["first_sound"] for r in rows if r["first_sound"] is not None]
    summary = {
        **setup, "n": len(rows), "first_sound": round(float(np.median(firsts)), 5) if firsts else None,
        "rtf": round(float(np.median([r["rtf"] for r in rows if r["rtf"]])), 4) if firsts else None,
        "tables": parts, "plots": ["first_sound", "rtf", "seconds"], "main": "run/whole",
    }  # fmt: skip
    results.finish([*rows, *at_once], summary, tables.page(summary))
    return summary


def environment() -> dict[str, str]:
    """What a time means nothing without."""
    devices = jax.devices()
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "flax")]
    return {
        "device": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}), {os.cpu_count()} CPU cores",
        "versions": ", ".join(versions),
    }


def _row(arrivals: Arrivals) -> dict[str, Any]:
    waits = arrivals.stalls
    values = {
        **{k: getattr(arrivals, k) for k in _FIRSTS},
        "rtf": arrivals.rtf,
        "end": arrivals.end,
        "seconds": arrivals.seconds,
        "gap": max(arrivals.gaps, default=None),
        "stall": max(waits, default=None),
        "underrun": sum(waits) if waits else None,
    }
    gaps = [round(g, 5) for g in arrivals.gaps]
    return {k: v if v is None else round(v, 5) for k, v in values.items()} | {"gaps": gaps}


def _together(
    chroma: Chroma, wave: np.ndarray, voice: Voice, count: int, wanted: dict[str, Any]
) -> dict[str, Any]:
    """As many streams, handed over at the same moment, once to compile and once with the clock."""
    for _ in range(2):
        batch = chroma.batch(count)
        start = time.perf_counter()
        streams = [batch.admit((wave, _RATE), voice=voice, **wanted) for _ in range(count)]
        clocks = [Arrivals(start, chroma.sample_rate) for _ in streams]
        while not all(s.done for s in streams):
            batch.step()
            for stream, arrivals in zip(streams, clocks, strict=True):
                for chunk in stream.take():
                    arrivals.add(chunk)
    each = [_row(a) for a in clocks]
    return {"count": count, "streams": [{k: r[k] for k in ("first_sound", "rtf", "stall", "seconds")} for r in each]}  # fmt: skip


def _percentiles(values: Sequence[float | None], scale: float = 1e3, digits: int = 1) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    return " / ".join(f"{scale * float(np.percentile(known, p)):.{digits}f}" for p in (50, 95, 99))


def _single(rows: list[dict], waves: dict[str, np.ndarray], voice: Voice) -> dict[str, Any]:
    table = []
    for way, title in WAYS.items():
        own = [r for r in rows if r["key"].startswith(f"run/{way}/")]
        calm = [r["stall"] <= clock.LONGEST_STALL for r in own if r["stall"] is not None]
        without = [r["rtf"] - r["codec"] / r["seconds"] for r in own if r.get("codec")]
        table.append(
            {
                "how": title,
                "n": str(len(own)),
                **{label: _percentiles([r[k] for r in own]) for k, label in _FIRSTS.items()},
                "gap between pieces, ms": _percentiles([g for r in own for g in r["gaps"]]),
                "RTF": _percentiles([r["rtf"] for r in own], 1, 3),
                "RTF without the Codec, p50": f"{np.median(without):.3f}" if without else "–",
                "continuous, %": f"{100 * np.mean(calm):.0f}" if calm else "–",
                "reply, s": f"{np.mean([r['seconds'] for r in own]):.2f}" if own else "–",
            }
        )
    seconds = [len(w) / _RATE for w in waves.values()]
    note = (
        f"p50 / p95 / p99 where there are three. One stream; {len(waves)} questions of {min(seconds):.1f} to {max(seconds):.1f} s, a voice of "
        f"{voice.seconds:.1f} s taken in before. The clock starts as the last sample of the question is handed over, and stops as values "
        "are in the caller's memory; no microphone, network or loudspeaker. Taken in while it is spoken: all packets of 20 ms but the last "
        "are pushed before it starts. RTF: time to the last samples over seconds of sound. Continuous: playing from the first piece on, no "
        f"stall is longer than {clock.LONGEST_STALL} s. The first runs of each question are dropped, so nothing is compiled within the clocks."
    )  # fmt: skip
    return {"title": "Latency", "rows": table, "note": note}


def _several(rows: list[dict]) -> dict[str, Any]:
    table = []
    for count in dict.fromkeys(r["count"] for r in rows):
        own = [s for r in rows if r["count"] == count for s in r["streams"]]
        calm = [s["stall"] <= clock.LONGEST_STALL for s in own if s["stall"] is not None]
        table.append(
            {
                "streams": str(count),
                "n": str(len(own)),
                "first sound, ms": _percentiles([s["first_sound"] for s in own]),
                "RTF": _percentiles([s["rtf"] for s in own], 1, 3),
                "continuous, %": f"{100 * np.mean(calm):.0f}" if calm else "–",
            }
        )
    note = "p50 / p95 / p99 over streams. All are handed the same question at the same moment; each has its own clock."
    return {"title": "Several streams at once", "rows": table, "note": note}


def _stages(
    chroma: Chroma, question: Question, voice: Voice, seconds: float, repeats: int
) -> dict[str, Any]:
    config = chroma.config
    sound = question.turns[0][0]
    asked, arrays, _ = check_request(chroma.processor, os.fspath(sound), voice, None, None)
    batch = normalize_inputs(config, pack([(asked, arrays)]))
    codes = chroma.encode_voice(voice)
    frames = np.zeros((1, batch.voice_wave.shape[1] // config.codec.frame_samples, codes.shape[1]), np.int32)  # fmt: skip
    frames[0, : len(codes)] = codes
    prompt = programs.as_prompt(batch, frames, np.array([len(codes)]))
    beats = max(1, round(seconds * config.codec.frame_rate / 2))
    ledger = caches.ledger_of(config, prompt, 2 * beats, grow=False)
    state = programs.begin(chroma.engine.flat, prompt, 2 * beats, [Sampling()], [0], ledger.sizes())
    rows, together = stages.table(
        chroma.model, prompt, state, ledger.limits, beats=beats, repeats=max(3, repeats)
    )
    shown = [{k: f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in r.items()} for r in rows]  # fmt: skip
    note = (
        f"The layout of the paper's table 4, for a reply of {seconds:g} s with text to its end. Each stage is a program of its own, at the "
        f"middle of the reply, ended by a device sync; together they would take {together:.3g} s. The whole, without syncs, is the table of "
        "replies above."
    )  # fmt: skip
    return {"title": "Stages", "rows": shown, "note": note}
