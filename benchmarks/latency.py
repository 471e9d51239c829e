"""How soon the first sound comes, how fast speech is made, and how many streams a device keeps in real time.

    python benchmarks/latency.py --size=chroma_4b --out=out/bench

One table has the layout of the paper's table 4 (one stream, a reply of 38.8 s): the stages as programs of their own, then the
whole. The others have what the paper leaves out: compilation; from the end of the question to the first sound on the host, also
where the question is heard while it is spoken; the real-time factor with and without the Codec; more streams, longer replies, longer
questions, memory (growth.py). Every beat ends with its samples on the host. Text goes on through the whole reply, the dearest case,
unless --text says otherwise. A new process with a warm compilation cache is start_up.py's.
"""

from __future__ import annotations

import argparse
import itertools
import time
import traceback

import common
import jax
import numpy as np
from common import Live, Report, Subject, Times, milliseconds
from growth import memory, questions, replies

from chroma_jax import Voice
from chroma_jax.engine import programs
from chroma_jax.evaluation import clock, stages
from chroma_jax.generation.reply import ReplyStream

REAL_TIME = 0.160  # seconds: the sound of a beat
_PACKET = 320  # samples at 16 kHz in which a question comes: 20 ms


def start_up(subject: Subject, report: Report, args: argparse.Namespace) -> None:
    """Compilation: the first reply of a process against the second."""
    prompt = common.make_prompt(subject.config, 1, args.question, args.voice)
    frames = 2 * common.count_beats(subject.config, args.reply)

    def reply() -> tuple[float, float]:
        start = time.perf_counter()
        live = Live(subject, prompt, frames)
        jax.block_until_ready(live.state)
        heard = time.perf_counter()
        live.beat()
        return heard - start, time.perf_counter() - heard

    cold, warm = reply(), reply()
    cache = jax.config.jax_compilation_cache_dir
    what, peak = common.peak_memory()
    report.table(
        "Start-up",
        [
            {
                "weights made or loaded, s": subject.load_seconds,
                "weights, GB": common.weight_bytes(subject.model) / 1e9,
                "prefill: compile and run, s": cold[0],
                "beat: compile and run, s": cold[1],
                "second prefill, s": warm[0],
                "second beat, s": warm[1],
                f"peak {what}, GB": peak / 1e9,
            }
        ],
        f"Compilation cache: {cache or 'none'}.",
    )


def first_sound(subject: Subject, report: Report, args: argparse.Namespace) -> None:
    """From the end of the question to the first samples on the host, as a user gets them: through `Chroma`."""
    chroma, around = common.chroma_of(subject)
    repeats = 2 if args.quick else 20
    wanted = dict(max_seconds=10.0, **around)
    kept = common.noise_voice(args.voice)
    voices = (common.noise_voice(args.voice, seed) for seed in itertools.count(1))
    title = f"End of question to first sound, a voice of {args.voice:g} s"
    rows = []

    def first_chunk(stream: ReplyStream, start: float) -> float:
        seconds = clock.follow(stream, start, chroma.sample_rate, until_sound=True).first_sound
        if seconds is None:
            raise ValueError("the reply made no sound")
        # The beat after it is under way: the next measurement begins when it is done.
        jax.block_until_ready(stream._batch._state)
        stream.close()
        return seconds

    def whole(wave: np.ndarray, voice: Voice) -> tuple[float, float]:
        start = time.perf_counter()
        return first_chunk(chroma.stream((wave, 16000), voice=voice, **wanted), start), 0.0

    def listened(wave: np.ndarray, voice: Voice) -> tuple[float, float]:
        start = time.perf_counter()
        listening = chroma.listen(voice=voice, **around)
        *packets, last = np.split(wave, range(_PACKET, len(wave), _PACKET))
        for packet in packets:
            listening.push(packet, 16000)
        # In life this work is done while the speaker goes on.
        jax.block_until_ready(listening._prefill._cache)
        spoken = time.perf_counter()
        listening.push(last, 16000)
        return first_chunk(listening.stream(max_seconds=10.0), spoken), spoken - start

    ways = {
        "whole recording, voice new": lambda wave: whole(wave, next(voices)),
        "whole recording, voice kept": lambda wave: whole(wave, kept),
        "heard while it is spoken, voice kept": lambda wave: listened(wave, kept),
    }
    for seconds in args.spoken or ([2.0, 4.0] if args.quick else [2.0, 8.0, 30.0]):
        wave = common.noise(seconds, 16000)
        for way, answer in ways.items():
            if report.out_of_time():
                break
            answer(wave)  # compiles
            runs = [answer(wave) for _ in range(repeats)]
            times = Times(first for first, _ in runs)
            before = Times(spoken for _, spoken in runs).median
            rows.append(
                {
                    "question, s": seconds,
                    "how": way,
                    "median, ms": milliseconds(times.median),
                    "p95, ms": milliseconds(times.p95),
                    "work while it is spoken, ms per s": milliseconds(before / seconds),
                }
            )
            report.keep(title, rows)
    report.table(
        title,
        rows,
        f"{repeats} times each, everything compiled before. The clock starts when the last samples of the question are there "
        "(heard while spoken: when its last 20 ms packet is pushed; what came before is pushed as fast as it goes, and done), "
        "and stops when the samples of the first beat, two frames, are on the host. It includes log-mel and prompt on the host, the prefill, the first "
        "beat, and for a new voice its codes and their way through the Backbone; no microphone, network or loudspeaker. "
        "Questions of whole chunks (2 s) leave the most to the end where they are heard while spoken: a whole chunk. The sound is steady noise: "
        "where the loudest moment of a question lies in its end, chunks with pauses are heard anew then.",
    )
    _pieces(subject, report, args, repeats)


def _pieces(subject: Subject, report: Report, args: argparse.Namespace, repeats: int) -> None:
    """The pieces of the same, without `Chroma`."""
    # Numbers as a microphone gives them: the features are part of the time.
    from chroma_jax.audio.mel import MelConfig, log_mel

    if report.out_of_time():
        return
    config = subject.config
    wave = common.noise(args.question, 16000)
    mel = MelConfig(num_mel_bins=config.reasoner.audio.num_mel_bins)
    prompt = common.make_prompt(config, 1, args.question, args.voice)
    frames = 2 * common.count_beats(config, args.reply)
    parts: dict[str, Times] = {
        "features": Times(),
        "prefill": Times(),
        "beat": Times(),
        "all": Times(),
    }
    for i in range(repeats + 1):
        start = time.perf_counter()
        log_mel(wave, mel)
        heard = time.perf_counter()
        live = Live(subject, prompt, frames)
        jax.block_until_ready(live.state)
        ready = time.perf_counter()
        live.beat()
        end = time.perf_counter()
        if i:  # the first one compiles
            for name, seconds in zip(parts, (heard - start, ready - heard, end - ready, end - start), strict=True):  # fmt: skip
                parts[name].append(seconds)
    names = {"features": "log-mel on the host", "prefill": "question and voice heard", "beat": "first beat, with sound",
             "all": "all of it"}  # fmt: skip
    report.table(
        f"The pieces of it, a question of {args.question:g} s, a voice of {args.voice:g} s",
        [
            {"what": names[k], "median, ms": milliseconds(t.median), "p95, ms": milliseconds(t.p95)}
            for k, t in parts.items()
        ],
        f"{len(parts['all'])} times. A whole recording; the voice's codes are known, but not what the Backbone makes of them. "
        "Each piece is waited for before the next one begins.",
    )


def table_4(subject: Subject, report: Report, args: argparse.Namespace) -> None:
    """The stages, and the whole, of one reply."""
    config, model = subject.config, subject.model
    prompt = common.make_prompt(config, 1, args.question, args.voice)
    beats = common.count_beats(config, args.reply)
    repeats = 3 if args.quick else 20
    live = Live(subject, prompt, 2 * beats, grow=False)
    rows, together = stages.table(
        model, prompt, live.state, live.ledger.limits, beats=beats, repeats=repeats
    )

    def whole(name: str, first: float | None, total: float) -> None:
        rows.append(
            {
                "stage": name,
                "unit": "frame",
                "first, ms": first and milliseconds(first),
                "average, ms": milliseconds(total / 2 / beats),
                "count": 2 * beats,
                "total, s": total,
                "real-time factor": total / args.reply,
            }
        )

    for name, audio in (("Overall, one beat per call", True), ("Overall without the Codec", False)):
        for _ in range(2):  # the first time compiles
            start = time.perf_counter()
            live = Live(subject, prompt, 2 * beats, audio=audio, grow=False)
            live.beat()
            first = time.perf_counter() - start
            live.run(beats - 1, round(args.text * beats))
            total = time.perf_counter() - start
        whole(name, first, total)
    calls = -(-beats // programs.BEATS_PER_CALL)
    for _ in range(2):
        start = time.perf_counter()
        state = Live(subject, prompt, 2 * beats, grow=False).state
        for _ in range(calls):
            state, out = programs.decode(subject.flat, state, programs.BEATS_PER_CALL)
            jax.device_get(out)
        total = time.perf_counter() - start
    scale = beats / (calls * programs.BEATS_PER_CALL)
    whole(f"Overall, {programs.BEATS_PER_CALL} beats per call", None, total * scale)
    report.table(
        f"One stream, a reply of {args.reply:g} s (layout of the paper's table 4)",
        rows,
        f"Text in {args.text:.0%} of the beats. Stages are programs of their own, at the middle of the reply; together they would take "
        f"{together:.3g} s. First: of the Reasoner the question heard, of the Backbone the voice and the first pair; overall, "
        "from the question's features to the first samples on the host. Caches have their final size from the start.",
    )


def streams(subject: Subject, report: Report, args: argparse.Namespace) -> None:
    """A batch of 1 to 128 streams: how long a beat of all of them takes."""
    prompt = common.make_prompt(subject.config, 1, args.question, args.voice)
    frames = 2 * common.count_beats(subject.config, args.reply)
    title, rows, most = f"Streams in one batch, caches for replies of {args.reply:g} s", [], 0
    counts = args.streams or ([1, 2, 4] if args.quick else [1, 2, 4, 8, 16, 32, 64, 128])
    for count in counts:
        if report.out_of_time():
            break
        state = live = None  # the one before need not be kept
        try:
            live = Live(subject, prompt, frames, grow=False)
            state = common.widen(live.state, count)
            start = time.perf_counter()
            state, out = programs.beat(subject.flat, state)
            jax.block_until_ready(out)
            first = time.perf_counter() - start
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{count} streams do not fit the memory", flush=True)
            continue
        times = Times()
        for _ in range(min(5 if args.quick else 40, frames // 2 - 1)):
            start = time.perf_counter()
            state, out = programs.beat(subject.flat, state)
            jax.device_get(out)
            times.append(time.perf_counter() - start)
        what, peak = common.peak_memory()
        caches = sum(c.k.nbytes + c.v.nbytes for c in (state.reasoner, state.backbone))
        rows.append(
            {
                "streams": count,
                "beat, median ms": milliseconds(times.median),
                "beat, p95 ms": milliseconds(times.p95),
                "seconds of sound per second": count * REAL_TIME / times.median,
                "real time": "yes" if times.p95 < REAL_TIME else "no",
                "caches, GB": caches / 1e9,
                f"peak {what} so far, GB": peak / 1e9,
                "compile, s": first,
            }
        )
        report.keep(title, rows)
        most = max(most, count if times.p95 < REAL_TIME else 0)
        if times.p95 > 2 * REAL_TIME:
            break
    report.table(
        title,
        rows,
        f"Real time: 95 % of the beats take less than their own {1e3 * REAL_TIME:.0f} ms. Most streams of these in real time: {most}. "
        "All streams have text in every beat.",
    )


PARTS = {
    f.__name__: f for f in (start_up, first_sound, table_4, streams, replies, questions, memory)
}


def main(argv: list[str] | None = None) -> None:
    """Prints the tables and writes DIR/latency.json as they come."""
    parser = common.parser(__doc__)
    numbers = dict(type=lambda text: [float(x) for x in text.split(",")], metavar="X,Y,...")
    parser.add_argument("--question", type=float, help="its seconds")
    parser.add_argument("--voice", type=float, help="its seconds")
    parser.add_argument("--reply", type=float, help="its seconds")
    parser.add_argument(
        "--text", type=float, default=1.0, help="the share of a reply's beats with a text token"
    )
    parser.add_argument(
        "--streams", type=lambda t: [int(x) for x in t.split(",")], metavar="N,M,..."
    )
    parser.add_argument("--spoken", **numbers, help="seconds of the questions to the first sound")
    parser.add_argument("--replies", **numbers, help="seconds")
    parser.add_argument("--questions", **numbers, help="seconds")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone")
    args = parser.parse_args(argv)
    usual = dict(question=2.0, voice=2.0, reply=3.2) if args.quick else dict(question=8.0, voice=8.0, reply=38.8)  # fmt: skip
    for name, value in usual.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    subject = common.open_subject(args)
    report = Report("latency", args, model=subject.name, notes=subject.notes)
    failed = []
    for name, part in PARTS.items():
        if args.only and name not in args.only:
            continue
        if report.out_of_time():
            report.table(name, [], "no time was left for it")
            continue
        try:
            part(subject, report, args)
        except Exception as error:  # out of memory, say: the other parts are still worth having
            traceback.print_exc()
            report.table(name, [], f"failed: {type(error).__name__}: {str(error)[:300]}")
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
