#!/usr/bin/env python3
"""Submits a command of chroma_jax to a SLURM cluster, on any number of nodes.

    python launch/slurm.py --nodes=4 --gpus_per_node=8 --time=24:00:00 train --config=configs/chroma_4b.py --workdir=DIR ...
    python launch/slurm.py --nodes=2 --gpus_per_node=8 --time=4:00:00 prepare --manifest=data.jsonl --checkpoint=DIR --out=DATA
    python launch/slurm.py --dry_run ... > job.sbatch        to read it, or change it, before `sbatch job.sbatch`

Call it from the environment and the directory where the command is to run: the job uses this Python, and relative paths are of
this directory, which (with data, checkpoints and --workdir) must be on a file system that all nodes share.

One process per GPU, or with --per=node one per node; they find each other through SLURM's variables. Before the time limit, and when
the job is preempted, they get SIGTERM: training saves and exits with code 143, and the job puts itself into the queue
again, where it goes on from what it saved. So a run may be longer than a job may be.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence

from commands import (
    STOPPED,
    Parser,
    add_command,
    add_dry_run,
    check_command,
    command_line,
    count,
    execute,
    fail,
    modules,
    positive,
)

_TIME = r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"  # what sbatch takes


def script(argv: Sequence[str] | None = None) -> tuple[str, bool]:
    """(the batch script, whether it is only to be shown)."""
    parser = Parser(prog="launch/slurm.py", description=__doc__)
    parser.add_argument("--nodes", type=positive, default=1, help="(default 1)")
    parser.add_argument("--gpus_per_node", type=count, required=True, help="0: a cluster of CPUs")
    parser.add_argument(
        "--per",
        choices=("gpu", "node"),
        default="gpu",
        help="what has a process of its own (default gpu)",
    )
    parser.add_argument("--time", required=True, help="of one job, as in 24:00:00 or 2-00:00:00")
    parser.add_argument("--job_name", default="chroma", help="(default chroma)")
    parser.add_argument(
        "--log",
        default="%x-%j.log",
        help="file for the output (default %%x-%%j.log: name and number of the job)",
    )
    for flag in ("partition", "account", "qos"):
        parser.add_argument(f"--{flag}", help="of the job")
    parser.add_argument("--cpus_per_task", type=positive, help="cores of a process")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, as in --sbatch=--mem=0; may be repeated",
    )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell to run on the first node before, as in --setup='module load cuda'; may be repeated",
    )
    parser.add_argument("--python", default=sys.executable, help="(default: the one that runs this)")  # fmt: skip
    parser.add_argument(
        "--notice",
        type=positive,
        default=300,
        help="seconds between SIGTERM and the time limit (default 300)",
    )
    parser.add_argument(
        "--requeues", type=count, default=100, help="how often the job queues again (default 100)"
    )
    add_dry_run(parser)
    add_command(parser)
    args = parser.parse_args(argv)
    check_command(args)
    if not re.fullmatch(_TIME, args.time):
        fail(f"--time must be as in 30 (minutes), 24:00:00 or 2-00:00:00, got {args.time!r}")
    for flag in ("job_name", "log", "partition", "account", "qos"):
        value = getattr(args, flag)
        if value is not None and not re.fullmatch(r"[^\s'\"]+", value):
            fail(f"--{flag} must have no spaces or quotes, got {value!r}")
    for option in args.sbatch:
        if not re.fullmatch(r"--?[a-zA-Z][^\n]*", option):
            fail(f"--sbatch wants an option of sbatch, as in --sbatch=--mem=0, got {option!r}")
    tasks = args.gpus_per_node if args.per == "gpu" and args.gpus_per_node else 1
    if args.nodes * tasks > 1 and not modules()[args.command]:
        fail(f"{args.command} runs in one process: --nodes=1, and --gpus_per_node=1 or --per=node")

    options = [
        f"--job-name={args.job_name}",
        f"--nodes={args.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--time={args.time}",
        f"--output={args.log}",
        "--open-mode=append",  # a job that queues again goes on in the same log
        "--requeue",
        f"--signal=TERM@{args.notice}",  # to the processes, not to this script
    ]
    if args.gpus_per_node:
        options.append(f"--gpus-per-node={args.gpus_per_node}")
    for flag in ("partition", "account", "qos", "cpus_per_task"):
        if getattr(args, flag) is not None:
            options.append(f"--{flag.replace('_', '-')}={getattr(args, flag)}")
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in [*options, *args.sbatch])]
    lines += ["set -euo pipefail"]
    if args.setup:
        lines += ["set +u  # what others wrote", *args.setup, "set -u"]
    if tasks < args.gpus_per_node:
        # Without this JAX gives each process of a SLURM job one GPU.
        devices = ",".join(map(str, range(args.gpus_per_node)))
        lines.append(f"export JAX_LOCAL_DEVICE_IDS={devices}")
    run = ["srun", "--kill-on-bad-exit=1"]
    if args.cpus_per_task:  # srun does not take it over from sbatch
        run.append(f"--cpus-per-task={args.cpus_per_task}")
    run += command_line(args, args.python)
    lines += [
        "status=0",
        f"{shlex.join(run)} || status=$?",
        f"# {STOPPED}: stopped by SIGTERM, and saved. scancel ends this script too, so what is cancelled stays so.",
        f'if [ "$status" -eq {STOPPED} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {args.requeues} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n", args.dry_run


def main(argv: Sequence[str] | None = None) -> int:
    """The launcher; returns its exit code."""
    text, dry_run = script(argv)
    if dry_run:
        print(text, end="")
        return 0
    return execute(["sbatch"], dry_run=False, stdin=text)


if __name__ == "__main__":
    sys.exit(main())
