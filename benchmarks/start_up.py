"""How soon a new process answers, with compiled programs kept on disk and without.

    python benchmarks/start_up.py --size=chroma_100m --out=out/bench

Each row is a process of its own, by the clock: from its start until everything is imported, until the device answers, until the
weights are there, and from then to the first samples of the first reply on the host, through `Chroma.stream`, without any
warm-up. The last of these is the time that a user of a new server waits. The first process finds an empty compilation cache and fills it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import common
import jax

from chroma_jax import Voice, compilation_cache

_RESULT = "start-up: "
_EVENTS = {
    "tracing": "/jax/core/compile/jaxpr_trace_duration",
    "lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compiling or reading": "/jax/core/compile/backend_compile_duration",
}


def child(args: argparse.Namespace) -> None:
    """One process: loads, answers, prints its times as JSON."""
    seconds = {"imported": time.time() - args.began}
    compilation_cache(args.cache)
    jax.devices()
    seconds["device ready"] = time.time() - args.began - seconds["imported"]
    start = time.perf_counter()
    subject = common.open_subject(args)
    seconds["weights"] = time.perf_counter() - start
    spent: dict[str, list[tuple[float, float]]] = {event: [] for event in _EVENTS.values()}

    def listen(event: str, start: float, end: float, **_: object) -> None:
        if event in spent:
            spent[event].append((start, end))

    jax.monitoring.register_event_time_span_listener(listen)
    sound = common.noise(args.question, 16000)
    voice = Voice.load(args.saved_voice) if args.saved_voice else common.noise_voice(args.voice)

    def answer() -> float:
        start = time.perf_counter()
        chroma, around = common.chroma_of(subject)
        with chroma.stream((sound, 16000), voice=voice, max_seconds=10, **around) as stream:
            next(stream)
            return time.perf_counter() - start

    seconds["first sound"] = answer()
    seconds |= {kind: _covered(spent[event]) for kind, event in _EVENTS.items()}
    seconds["again"] = answer()
    if args.save_voice:
        voice.save(args.save_voice)
    device = common.environment()["device"]
    print(_RESULT + json.dumps({"seconds": seconds, "device": device}), flush=True)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds that the spans cover together: programs are traced inside the tracing of others."""
    covered, reached = 0.0, 0.0
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def measure(argv: list[str], cache: str, **options: str) -> tuple[dict[str, float], str]:
    """Runs a process and returns its times and its device."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    call = [sys.executable, __file__, *argv, "--child", f"--cache={cache}", *given]
    done = subprocess.run(
        [*call, f"--began={time.time()}"], stdout=subprocess.PIPE, text=True, check=True
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(_RESULT))
    result = json.loads(line.removeprefix(_RESULT))
    return result["seconds"], result["device"]


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes DIR/start_up.json."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    if args.child:
        child(args)
        return
    # The device belongs to the processes that are measured, one after the other.
    jax.config.update("jax_platforms", "cpu")
    report = common.Report("start_up", args, model=args.checkpoint or args.size)
    repeats = 1 if args.quick else args.repeats
    rows: list[dict] = []
    title = "A new process: seconds to the first sound"
    with tempfile.TemporaryDirectory() as folder:
        cache, voice = f"{folder}/programs", f"{folder}/voice.npz"
        cases = [
            ("empty", "new", 1, dict(save_voice=voice)),
            ("filled", "new", repeats, {}),
            ("filled", "saved with its codes", repeats, dict(saved_voice=voice)),
        ]
        for state, who, times, options in cases:
            if report.out_of_time():
                break
            runs = []
            for _ in range(times):
                run, report.content["device"] = measure(argv, cache, **options)
                runs.append(run)
            middle = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
            other = middle["first sound"] - sum(middle[kind] for kind in _EVENTS)
            rows.append(
                {
                    "compilation cache": state,
                    "voice": who,
                    "imported": middle["imported"],
                    "device ready": middle["device ready"],
                    "weights made or loaded": middle["weights"],
                    "from weights to first sound": middle["first sound"],
                    **{f"of that {kind}": middle[kind] for kind in _EVENTS},
                    "the rest": max(0.0, other),
                    "the same again": middle["again"],
                }
            )
            report.keep(title, rows)
    report.table(
        title,
        rows,
        f"On {report.content['device']}. A question of {args.question:g} s, a voice of {args.voice:g} s; rows with a filled cache are medians of {repeats} processes. "
        "No warm-up. The same again: the first sound of a second Chroma in the same process, which knows the voice's codes.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument("--question", type=float, default=8.0, help="its seconds")
    parser.add_argument("--voice", type=float, default=8.0, help="its seconds")
    parser.add_argument("--repeats", type=int, default=3, help="processes with a filled cache")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    for name in ("cache", "saved-voice", "save-voice"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
