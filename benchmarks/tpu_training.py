"""Compiles the training step of the published sizes for TPU slices, on a machine that has none, and prints what to expect.

    pip install 'chroma_jax[tpu,train]'
    python benchmarks/tpu_training.py [--only=v6e] [--quick] [--json=tpu_training.json]

Each row is one compilation of `python -m chroma_jax.train --config=configs/... --compile_only=...` and takes minutes. Rows are kept in
the JSON file as they come: the same command started again makes only those that are missing. --quick ends each compilation before
machine code, in a tenth of the time, and estimates without the compiler's count of cycles (give it a JSON file of its own). The last table is weak scaling: the
same rows per chip on 16 and on 256.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import runpy
import sys
import traceback
from typing import NamedTuple

import jax

from chroma_jax.cost import tpu
from chroma_jax.training import compile_only
from chroma_jax.training.run_config import RunConfig

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


class Case(NamedTuple):
    """A row: what is compiled for what."""

    stage: str  # as printed
    config: str
    hidden: bool  # Reasoner states come with the records
    topology: str
    slices: int
    rows: int  # per chip
    mesh: dict[str, int]

    @property
    def key(self) -> str:
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.items())
        return f"{self.topology} x{self.slices}, {self.stage}, {self.rows} rows a chip, {mesh}"


STAGES = (
    ("stage 1, precomputed", "chroma_4b", True),
    ("stage 1, Reasoner inside", "chroma_4b", False),
    ("stage 2, precomputed", "chroma_4b_stage2", True),
    ("LoRA, precomputed", "chroma_4b_lora", True),
)
FSDP = {"fsdp": -1}
# Rows a chip: where more would gain little. Splitting over "fsdp" alone uses the links of all axes of a slice at once.
SLICES = (
    ("v5e:4x4", 4, FSDP),
    ("v5p:2x2x4", 8, FSDP),
    ("v5p:2x4x4", 8, FSDP),
    ("v6e:8x8", 8, FSDP),
    ("v6e:16x16", 8, FSDP),
)


def cases() -> list[Case]:
    """The rows, those that matter most first."""
    table = [
        Case(*stage, topology, 1, rows, mesh) for stage in STAGES for topology, rows, mesh in SLICES
    ]
    small = Case(*STAGES[0], "v6e:4x4", 1, 8, FSDP)
    scaling = [
        small,
        Case(*STAGES[0], "v5e:16x16", 1, 4, FSDP),
        Case(*STAGES[0], "v5e:4x4", 2, 4, {"data": 2, "fsdp": 16}),
    ]
    return table[:5] + scaling + table[5:]


def compile_case(case: Case, codegen: bool) -> dict:
    """One compilation: the report of `compile_only`."""
    values = runpy.run_path(str(CONFIGS / f"{case.config}.py"))["get_config"]()
    config = RunConfig.from_dict(values)
    chips = len(tpu.topology_devices(case.topology, case.slices))
    size = compile_only.size_of(config.data, rows=case.rows * chips, hidden=case.hidden)
    train = dataclasses.replace(config.train, mesh=case.mesh)
    return compile_only.report(
        case.topology, config.model.sizes(), train, size, case.slices, codegen
    )


def row(case: Case, r: dict) -> str:
    """A line of the Markdown table."""
    name = case.topology + (f" x {case.slices}" if case.slices > 1 else "")
    mesh = " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1)
    begin = [name, r["chips"], case.stage, mesh, case.rows]
    if "error" in r:
        return _line([*begin, "does not fit", *[""] * 5])
    memory = f"{r['peak_bytes'] / 2**30:.1f} of {r['hbm_bytes'] / 2**30:.0f}"
    return _line(
        [
            *begin,
            memory,
            f"{1e3 * r['seconds']:.0f}",
            r["limit"],
            f"{r['tokens_per_second']:,.0f}",
            f"{r['audio_seconds_per_second']:,.0f}",
            f"{r['mfu']:.0%}",
        ]
    )


HEAD = (
    "slice", "chips", "step", "mesh", "rows a chip", "GiB a chip", "ms a step", "limited by",
    "positions/s a chip", "audio s/s a chip", "MFU",
)  # fmt: skip


def _line(cells: list) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def scaling(done: dict[str, dict]) -> list[str]:
    """Time of a step on 16 chips over that on 256, the same rows a chip."""
    lines = []
    for generation in ("v5e", "v6e"):
        times = {
            done[case.key]["chips"]: done[case.key]["seconds"]
            for case in cases()
            if case.topology in (f"{generation}:4x4", f"{generation}:16x16")
            and case.slices == 1
            and case.stage == STAGES[0][0]
            and "seconds" in done.get(case.key, {})
        }
        if {16, 256} <= set(times):
            lines.append(_line([generation, f"{times[16] / times[256]:.0%}"]))
    return lines


def main() -> None:
    """Prints the tables; keeps rows in the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows with this in their name, such as v6e")
    parser.add_argument("--quick", action="store_true", help="without machine code and cycles")
    parser.add_argument(
        "--json", type=os.path.expanduser, default="tpu_training.json", help="where rows are kept"
    )
    args = parser.parse_args()
    path = pathlib.Path(args.json)
    done = json.loads(path.read_text()) if path.exists() else {}
    chosen = [case for case in cases() if args.only in case.key]
    for case in chosen:
        if case.key in done:
            continue
        print(case.key, file=sys.stderr, flush=True)
        try:
            done[case.key] = compile_case(case, not args.quick)
        except Exception:  # the other rows are worth having
            traceback.print_exc()
            continue
        path.write_text(json.dumps(done, indent=1) + "\n")
        jax.clear_caches()
    print(f"jax {jax.__version__}\n\n{_line(list(HEAD))}\n|{' --- |' * len(HEAD)}")
    for case in chosen:
        if case.key in done:
            print(row(case, done[case.key]))
    if lines := scaling(done):
        print("\n| weak scaling | 16 to 256 chips |\n| --- | --- |\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
