"""Our step beside PyTorch on the same shapes, in one run on one machine.

    python benchmarks/peers.py --size=chroma_100m --out=out/bench

Seconds per frame (80 ms of sound) of one stream, by turns, so that whatever else the machine does falls on all alike: our beats,
several per call as a whole reply runs and one per call as a stream does, with the Codec in every beat; and, built from transformers with random weights of the same sizes,

- Thinker, LLaMA, depth decoder and Mimi looped as the reference loops (the depth decoder by its own generate), all sound at the end;
- the same with the depth decoder called directly, which is leaner than the reference;
- transformers' CSM by its own generate (Backbone, Decoder and Codec, but no Reasoner), eager, and compiled with static caches.

PyTorch is measured at each number of threads and the best one counts. Everybody chooses greedily in the same dtype.
"""

from __future__ import annotations

import os
import statistics
import time

import common
import jax
from common import Live, Report

from chroma_jax import schedule
from chroma_jax.engine import programs

_REST = 0.5  # seconds between turns: threads of the one before may still spin, waiting for work


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes DIR/peers.json."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="turns of everybody")
    parser.add_argument("--frames", type=int, help="frames of a turn")
    parser.add_argument("--threads", type=lambda t: [int(x) for x in t.split(",")], metavar="N,M,...",
                        help="PyTorch's numbers of threads; default 1 and all cores")  # fmt: skip
    parser.add_argument("--compiled", action="store_true", help="also the compiled CSM: minutes of compilation")  # fmt: skip
    args = parser.parse_args(argv)
    rounds = args.rounds or (2 if args.quick else 7)
    frames = args.frames or (8 if args.quick else 48)
    import torch
    import torch_peers

    if args.checkpoint:
        raise SystemExit("peers are compared with random weights: give --size")
    subject = common.open_subject(args)
    config = subject.config
    report = Report("peers", args, model=subject.name, notes=subject.notes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.backbone.llama.dtype)
    threads = args.threads or (sorted({1, os.cpu_count() or 1}) if device == "cpu" else [torch.get_num_threads()])  # fmt: skip
    seconds = 2.0 if args.quick else 8.0
    prompt = common.make_prompt(config, 1, seconds, seconds)
    question = int(prompt.lengths[0])
    voice = int(prompt.voice_id_lengths[0] + prompt.voice_frame_lengths[0]) + 2

    makers = {
        "the reference's loop (Thinker, LLaMA, depth decoder by generate, Mimi)": lambda: (
            torch_peers.Assembled(config, by_generate=True, dtype=dtype, device=device)
        ),
        "the same, depth decoder called directly": lambda: torch_peers.Assembled(
            config, by_generate=False, dtype=dtype, device=device
        ),
        "CSM generate, eager (no Reasoner)": lambda: torch_peers.Csm(
            config, compiled=False, dtype=dtype, device=device
        ),
    }
    if args.compiled:
        makers["CSM generate, compiled, static caches (no Reasoner)"] = lambda: torch_peers.Csm(
            config, compiled=True, dtype=dtype, device=device
        )

    def ours() -> tuple[float, float]:
        """Seconds per frame as `Chroma.reply` runs, and as a live stream does."""
        each = programs.BEATS_PER_CALL * schedule.FRAMES_PER_TEXT
        calls = -(-frames // each)
        live = Live(subject, prompt, calls * each)
        state = jax.block_until_ready(live.state)
        start = time.perf_counter()
        for _ in range(calls):
            state = live.ledger.make(state, programs.BEATS_PER_CALL)
            state, out = programs.decode(subject.flat, state, programs.BEATS_PER_CALL)
            jax.device_get(out)
        whole = (time.perf_counter() - start) / (calls * each)
        live = Live(subject, prompt, frames + 2)
        live.beat()
        return whole, sum(live.run(frames // 2)) / (frames // 2 * 2)

    ours()
    title = "Seconds per frame, one stream"
    mine: list[tuple[float, float]] = []
    rows = []
    failed = []
    for name, make in makers.items():
        turns: dict[int, list[tuple[float, tuple[float, float]]]] = {n: [] for n in threads}
        try:
            peer = make()
            for turn in range(rounds + 1):
                for n in threads:
                    torch.set_num_threads(n)
                    time.sleep(_REST)
                    theirs = torch_peers.seconds_per_frame(peer, question, voice, frames)
                    time.sleep(_REST)
                    own = ours()
                    if turn:  # the first warms up
                        turns[n].append((theirs, own))
        except Exception as error:  # a peer that cannot run here is a finding, not the end
            failed.append(f"{name} did not run: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")  # fmt: skip
            continue
        finally:
            peer = None
        best = min(threads, key=lambda n: statistics.median(t for t, _ in turns[n]))
        mine += [own for pairs in turns.values() for _, own in pairs]
        pairs = turns[best]
        rows.append(
            {
                "per frame": name,
                "threads": best,
                "median, ms": 1e3 * statistics.median(t for t, _ in pairs),
                "fastest, ms": 1e3 * min(t for t, _ in pairs),
                "times our reply": statistics.median(t / o[0] for t, o in pairs),
                "times our stream": statistics.median(t / o[1] for t, o in pairs),
                "fastest by fastest reply": min(t for t, _ in pairs) / min(o[0] for _, o in pairs),
            }
        )
        report.keep(title, rows)
    names = (
        f"chroma_jax, reply: {programs.BEATS_PER_CALL} beats per call",
        "chroma_jax, stream: one beat per call",
    )
    for i, name in reversed(list(enumerate(names))):
        own = [o[i] for o in mine]
        rows.insert(
            0,
            {
                "per frame": name,
                "threads": os.cpu_count(),
                "median, ms": 1e3 * statistics.median(own) if own else None,
                "fastest, ms": 1e3 * min(own) if own else None,
                "times our reply": None,
                "times our stream": None,
                "fastest by fastest reply": None,
            },
        )
    report.table(
        title,
        rows,
        " ".join(
            [
                f"{rounds} turns of {frames} frames each, by turns with ours (medians of the ratios within turns), after a question of {question} and a voice of {voice} "
                f"positions. The real-time limit is {1e3 / config.codec.frame_rate:.0f} ms.",
                *failed,
            ]
        ),
    )


if __name__ == "__main__":
    main()
