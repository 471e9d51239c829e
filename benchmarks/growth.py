"""Parts of `latency`: what grows with the reply, with the question and with the number of streams, and what does not."""

from __future__ import annotations

import argparse
import gc
import itertools
from typing import Any

import common
import jax
import numpy as np
from common import Live, Report, Subject, Times, milliseconds

from chroma_jax.engine import programs


def replies(subject: Subject, report: Report, args: argparse.Namespace) -> None:
    """Replies of 5 to 80 s: what a beat costs along them."""
    config = subject.config
    prompt = common.make_prompt(config, 1, 2.0, 2.0)
    rows, by_size = [], []
    for seconds in args.replies or ([0.5, 8] if args.quick else [5, 10, 20, 40, 80]):
        if report.out_of_time():
            break
        beats = common.count_beats(config, seconds)
        room = config.backbone.llama.max_positions - int(prompt.voice_id_lengths[0] + prompt.voice_frame_lengths[0]) - 8  # fmt: skip
        text_beats = min(beats, (room - 2 * beats) // 2)  # pairs of text that the context holds
        Live(subject, prompt, 2 * beats).run(beats, text_beats)
        live = Live(subject, prompt, 2 * beats)
        jax.block_until_ready(live.state)
        sizes: list[tuple[int, int]] = []
        times = live.run(beats, text_beats, sizes)
        rows.append(
            {
                "reply, s": seconds,
                "beats": beats,
                "with text": text_beats,
                "per frame, median ms": milliseconds(times.median / 2),
                "beat, p95 ms": milliseconds(times.p95),
                "real-time factor": sum(times) / seconds,
                "caches at the end": f"{live.state.reasoner.size} and {live.state.backbone.size}",
            }
        )
        by_size = _by_size(times[:text_beats], sizes)
        report.keep("Longer replies, one stream", rows)
    report.table(
        "Longer replies, one stream", rows,
        "A second run of each, so that the programs of all cache sizes are there. A context of 2048 positions does not hold 80 s with "
        "text in every beat.",
    )  # fmt: skip
    report.table(
        "A beat along the longest of these replies, by the size of its caches",
        by_size,
        "Beats with text. A beat reads its caches whole, so its time depends on their sizes and not on the reply's length: the first and the last third of "
        "the beats in caches of one size should take the same. The first beat in each size, which makes the new caches, is left out.",
    )


def _by_size(times: list[float], sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    rows, base = [], None
    for size, group in itertools.groupby(zip(sizes, times, strict=False), key=lambda x: x[0]):
        beats = Times(seconds for _, seconds in list(group)[1:])
        if not beats:
            continue
        third = max(1, len(beats) // 3)
        base = base or beats.median
        rows.append(
            {
                "positions, Reasoner and Backbone": f"{size[0]} and {size[1]}",
                "beats": len(beats),
                "median, ms": milliseconds(beats.median),
                "first third, ms": milliseconds(Times(beats[:third]).median),
                "last third, ms": milliseconds(Times(beats[-third:]).median),
                "times the first size": beats.median / base,
            }
        )
    return rows


def questions(subject: Subject, report: Report, args: argparse.Namespace) -> None:
    """Questions of 2 to 32 s: the prefill alone."""
    rows = []
    for seconds in args.questions or ([1, 2, 4] if args.quick else [2, 4, 8, 16, 32, 64]):
        if report.out_of_time():
            break
        prompt = common.make_prompt(subject.config, 1, seconds, args.voice)
        prompt = jax.device_put(prompt)

        def prefill(prompt=prompt):
            return Live(subject, prompt, 64).state

        times = common.timed(prefill, repeats=2 if args.quick else 10)
        positions, padded = int(prompt.lengths[0]), prompt.ids.shape[1]
        rows.append(
            {
                "question, s": seconds,
                "positions": positions,
                "padded to": padded,
                "chunks, padded": prompt.chunks.shape[1],
                "prefill, median ms": milliseconds(times.median),
                "p95 ms": milliseconds(times.p95),
                "ms per 100 positions run": milliseconds(100 * times.median / padded),
            }
        )
        report.keep("Longer questions, one stream", rows)
    fit = ""
    if len(rows) > 2:
        x, y = (np.array([r[k] for r in rows]) for k in ("padded to", "prefill, median ms"))
        slope, first = np.polyfit(x, y, 1)
        worst = np.abs(first + slope * x - y).max()
        fit = (
            f" A straight line through them: {first:.3g} ms and {100 * slope:.3g} ms per 100 positions run; "
            f"the farthest from it is off by {worst:.3g} ms."
        )
    report.table(
        "Longer questions, one stream",
        rows,
        f"The voice of the same length is heard with each.{fit}",
    )


def memory(subject: Subject, report: Report, args: argparse.Namespace) -> None:
    """Bytes counted from the configuration, beside those of the arrays and those that the device reports."""
    config = subject.config
    prompt = common.make_prompt(config, 1, args.question, args.voice)
    frames = 2 * common.count_beats(config, args.reply)
    weights = common.weight_bytes(subject.model)
    title, rows = f"Memory, caches for replies of {args.reply:g} s", []
    for count in args.streams or ([1, 4] if args.quick else [1, 16]):
        if report.out_of_time():
            break
        gc.collect()  # what is freed later would be missing from the difference
        before = common.memory_in_use()
        live = Live(subject, prompt, frames, grow=False)
        state = common.widen(live.state, count)
        sizes, live = live.ledger.limits, None
        state = jax.block_until_ready(state)
        counted = {
            "Reasoner's cache": common.cache_bytes(config.reasoner.text, count, sizes.reasoner),
            "Backbone's cache": common.cache_bytes(config.backbone.llama, count, sizes.backbone),
        }
        rest = common.weight_bytes(state) - sum(counted.values())
        now = common.memory_in_use()
        program = programs.beat.lower(subject.flat, state).compile().memory_analysis()
        rows.append(
            {
                "streams": count,
                "weights, MB": weights / 1e6,
                **{f"{name}, MB": size / 1e6 for name, size in counted.items()},
                "rest of the state, MB": rest / 1e6,
                "counted, state, MB": (sum(counted.values()) + rest) / 1e6,
                f"{now[0]}, more by, MB": (now[1] - before[1]) / 1e6,
                f"{now[0]}, all, MB": now[1] / 1e6,
                "a beat's temporaries, MB": program.temp_size_in_bytes / 1e6,
                "updated in place, MB": program.alias_size_in_bytes / 1e6,
            }
        )
        report.keep(title, rows)
        state = None
    what, peak = common.peak_memory()
    report.table(
        title,
        rows,
        "Weights and state as their arrays hold them, caches counted from the configuration: layers x streams x positions x heads x width, keys and values. The "
        "rest of the state is the Codec's, and which codes and words have been said. Temporaries and what is updated in place are the compiler's figures for the beat. "
        f"Where the device does not report its memory, the bytes of all live arrays stand in. Peak {what} of the process so far: {peak / 1e6:,.0f} MB.",
    )
