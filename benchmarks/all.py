"""Everything that a machine with an accelerator is to be asked, in one command and within ten minutes on one H200.

    python benchmarks/all.py --size=chroma_4b --out=out/bench

Latency, roofline, the goldens on the device, a new process's first sound, training: each in a process of its own, so that one that fails or hangs takes nothing
else with it. Tables are printed and JSON is written as they come; DIR/all.json says how each part ended. It needs jax, flax, numpy,
optax and what loading a checkpoint needs; torch only for --peers. The exit code is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
# Part: (share of the time, arguments). Points that matter most come first in each.
PARTS = {
    "latency": (
        0.5,
        ["--streams=1,64,128,8,32", "--spoken=8,30", "--replies=5,40,80", "--questions=2,8,32"],
    ),
    "roofline": (0.15, []),
    "parity": (0.15, []),
    "start_up": (0.15, ["--repeats=1"]),
    "training": (0.2, []),
}


def command(part: str, extra: list[str], args: argparse.Namespace, seconds: float) -> list[str]:
    """How a part is called."""
    program = [sys.executable, str(HERE / f"{part}.py")]
    if part == "parity":
        return [*program, f"--json={args.out / 'parity.json'}"]
    which = f"--checkpoint={args.checkpoint}" if args.checkpoint else f"--size={args.size}"
    if part in ("training", "peers"):
        which = f"--size={args.size}"
    options = [which, f"--out={args.out}", f"--budget={0.7 * seconds:.0f}"]
    if args.dtype:
        options.append(f"--dtype={args.dtype}")
    if part in ("latency", "roofline", "start_up"):
        options.append(f"--layers={args.layers}")
        options += [f"--quantize={args.quantize}"] if args.quantize else []
    return [*program, *options, *(["--quick"] if args.quick else extra)]


def run(part: str, call: list[str], seconds: float, environment: dict[str, str]) -> dict:
    """Runs a part, its output passed on; how it ended."""
    print(f"\n# {part}: {' '.join(call)}\n", flush=True)
    start = time.monotonic()
    # A group of its own, so that what the part itself has started ends with it.
    process = subprocess.Popen(call, env=environment, cwd=HERE.parent, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
        ended = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s; what it had measured is kept"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = time.monotonic() - start
    print(f"\n{part}: {ended}, {took:.0f} s", flush=True)
    return {"part": part, "ended": ended, "seconds": round(took, 1), "command": call[1:]}


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="chroma_4b", help="tiny, chroma_100m or chroma_4b")
    parser.add_argument(
        "--checkpoint",
        type=os.path.expanduser,
        help="instead of random weights (training stays random)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--quantize", choices=("int8", "fp8"))
    parser.add_argument("--layers", choices=("apart", "stacked"), default="stacked",
                        help="of latency, roofline and start_up: stacked compiles much sooner")  # fmt: skip
    parser.add_argument(
        "--out",
        type=lambda text: pathlib.Path(text).expanduser(),
        required=True,
        help="a folder for the results",
    )
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything together")
    parser.add_argument("--quick", action="store_true", help="few repeats, few points")
    parser.add_argument("--peers", action="store_true", help="also the comparison with PyTorch")
    parser.add_argument(
        "--only", choices=(*PARTS, "peers"), action="append", help="this part alone"
    )
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = dict(PARTS)
    if args.peers or "peers" in (args.only or ()):
        parts["peers"] = (0.25, [])
    if args.only:
        parts = {part: parts[part] for part in args.only}
    ended = []
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as programs:
        # Parts share compilations, but the first one, which says how long they take, finds none.
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", programs)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
        )
        shares = {part: share for part, (share, _) in parts.items()}
        for part, (share, extra) in parts.items():
            left = deadline - time.monotonic()
            seconds = left * share / sum(shares.values())  # what a part leaves, the next ones have
            del shares[part]
            if left < 5:
                ended.append({"part": part, "ended": "not begun: no time was left", "seconds": 0})
            else:
                ended.append(run(part, command(part, extra, args, seconds), seconds, environment))
            (args.out / "all.json").write_text(json.dumps(ended, indent=1) + "\n")
    print("\n| part | ended | seconds |\n| --- | --- | --- |")
    for row in ended:
        print(f"| {row['part']} | {row['ended']} | {row['seconds']} |")
    return int(any(row["ended"] != "done" for row in ended))


if __name__ == "__main__":
    sys.exit(main())
