"""What one beat must cost on this device, and what it does cost, stage by stage.

    python benchmarks/roofline.py --size=chroma_4b --out=out/bench

A beat is one text token and two frames, 160 ms of sound. Counted from the shapes: the bytes of every weight times the passes over
it in a beat (the Decoder runs seven times a frame), the live keys and values, and the multiplications and additions of all matrix
products. Measured on the device: the rates of a large copy (bytes read and written), of a large sum (bytes read), and of a large
matrix product in the model's dtype. The floor of a stage is the larger of bytes over the better of the first two and operations over
the third. Weights that fit the device's caches can be
read faster than memory gives them: small models may beat their floor.
"""

from __future__ import annotations

import common
import jax
import jax.numpy as jnp
from common import Report, Subject

from chroma_jax.cost.flops import flops
from chroma_jax.engine import programs
from chroma_jax.evaluation import stages


def copy_rate(megabytes: int, repeats: int) -> float:
    """Bytes per second, read and written, of a large elementwise operation in place: no fresh pages to be had first."""
    x = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    add = jax.jit(lambda x: (x + 1, ()), donate_argnums=0)
    return 2 * x.nbytes / common.step_through(add, x, repeats=repeats, warm=2)[0].median


def read_rate(megabytes: int, repeats: int) -> float:
    """Bytes per second of a large sum."""
    x = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    return x.nbytes / common.timed(jax.jit(jnp.sum), x, repeats=repeats, warm=2).median


def product_rate(size: int, dtype: str, repeats: int) -> float:
    """Operations per second of a square matrix product, on random numbers."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    times = common.timed(jax.jit(lambda x: x @ x), x, repeats=repeats, warm=2)
    return 2 * size**3 / times.median


def measure(subject: Subject, report: Report, quick: bool, rows: int) -> None:
    """Both tables."""
    config, model = subject.config, subject.model
    cpu = jax.default_backend() == "cpu"
    repeats = 3 if quick else 20
    dtype = config.backbone.llama.dtype
    megabytes, size = (16, 256) if quick else (256, 2048) if cpu else (4096, 8192)
    copied, read = copy_rate(megabytes, repeats), read_rate(megabytes, repeats)
    bandwidth, rate = max(copied, read), product_rate(size, dtype, repeats)
    report.table(
        "Device",
        [
            {"what": f"copy of {megabytes} MB, read and written, GB/s", "measured": copied / 1e9},
            {"what": f"sum of {megabytes} MB, read, GB/s", "measured": read / 1e9},
            {"what": f"product of {size} x {size} {dtype}, TFLOP/s", "measured": rate / 1e12},
        ],
    )
    seconds, heard = (3.2, 2.0) if quick else (20.0, 8.0)
    prompt = common.make_prompt(config, rows, heard, heard)
    frames = 2 * common.count_beats(config, seconds)
    state = common.Live(subject, prompt, frames, grow=False).state
    # The middle of the reply; what the slots hold does not matter to the clock.
    ahead = common.count_beats(config, seconds) // 2
    state = state._replace(
        reasoner=state.reasoner._replace(length=state.reasoner.length + ahead),
        backbone=state.backbone._replace(length=state.backbone.length + 4 * ahead),
    )
    table, whole = [], {"bytes": 0, "flops": 0, "floor": 0.0}
    for stage in stages.make(model, state):
        moved = stage.cache_bytes + sum(
            common.weight_bytes(stage.weights[name]) * count for name, count in stage.reads.items()
        )
        work = flops(stage.step, model, stage.state)
        step = jax.jit(stage.step)
        seconds_taken = common.timed(step, model, stage.state, repeats=repeats, warm=2).median
        floor = max(moved / bandwidth, work / rate)
        table.append(row(stage.name, moved, work, bandwidth, rate, floor, seconds_taken))
        whole["bytes"] += moved
        whole["flops"] += work
        whole["floor"] += floor
    beat, _ = common.step_through(
        lambda s: programs.beat(subject.flat, s), state, repeats=repeats, warm=2
    )
    table.append(
        row("Whole beat", whole["bytes"], whole["flops"], bandwidth, rate, whole["floor"], beat.median)
    )  # fmt: skip
    sound = common.beat_seconds(config)
    report.table(
        f"One beat of {rows} stream(s), in the middle of a reply of {seconds:.0f} s",
        table,
        f"Floor of the real-time factor {whole['floor'] / sound:.4f}, measured {beat.median / sound:.4f}. The stages are programs of "
        "their own, each called alone; the whole beat is one program.",
    )


def row(name, moved, work, bandwidth, rate, floor, seconds):
    """A line of the table."""
    return {
        "stage": name,
        "MB": moved / 1e6,
        "GFLOP": work / 1e9,
        "memory floor, ms": 1e3 * moved / bandwidth,
        "arithmetic floor, ms": 1e3 * work / rate,
        "floor, ms": 1e3 * floor,
        "measured, ms": 1e3 * seconds,
        "fraction of the floor's speed": f"{floor / seconds:.0%}",
    }


def main(argv: list[str] | None = None) -> None:
    """Prints the tables and writes DIR/roofline.json."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1, help="streams in the batch")
    args = parser.parse_args(argv)
    subject = common.open_subject(args)
    report = Report("roofline", args, model=subject.name, notes=subject.notes)
    measure(subject, report, args.quick, args.rows)


if __name__ == "__main__":
    main()
