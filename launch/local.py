#!/usr/bin/env python3
"""Runs a command of chroma_jax on this machine, in one process or in several that share the work.

    python launch/local.py train --config=configs/debug.py --workdir=out/run
    python launch/local.py --processes=8 --gpus=0,1,2,3,4,5,6,7 train --config=configs/chroma_4b.py --workdir=DIR ...
    python launch/local.py --processes=2 --cpu_devices=4 prepare --manifest=data.jsonl --checkpoint=DIR --out=DATA

One process uses all devices of the machine, which is what a single machine usually wants. SIGTERM and Ctrl-C are passed on as
SIGTERM: training saves, and the same call goes on from there; a second one ends everything at once. When one process fails
the others are ended, and its exit code is this one's.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from commands import (
    STOPPED,
    Parser,
    add_command,
    add_dry_run,
    check_command,
    command_line,
    count,
    fail,
    modules,
    positive,
)

_GRACE_SECONDS = 15.0  # for the others to end by themselves after one has failed
_KILLED = 128  # a process ended by signal n counts as exit code 128 + n, as in a shell


def plan(argv: Sequence[str] | None = None) -> tuple[list[tuple[dict[str, str], list[str]]], bool]:
    """(environment and command line of each process, whether they are only to be shown)."""
    parser = Parser(prog="launch/local.py", description=__doc__)
    parser.add_argument("--processes", type=positive, default=1, help="how many (default 1)")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--gpus", help="numbers of the GPUs, as in 0,1,2,3: divided evenly")
    devices.add_argument(
        "--cpu_devices", type=positive, help="run on CPU, with so many virtual devices a process"
    )
    parser.add_argument(
        "--port", type=count, default=0, help="of process 0, for the others (default: a free one)"
    )
    add_dry_run(parser)
    add_command(parser)
    args = parser.parse_args(argv)
    check_command(args)
    number = args.processes
    gpus = args.gpus.split(",") if args.gpus is not None else []
    if not all(gpu.isdecimal() for gpu in gpus) or len(set(gpus)) != len(gpus):
        fail(f"--gpus wants different numbers with commas between them, got {args.gpus!r}")
    if len(gpus) % number:
        fail(f"--processes={number} does not divide the {len(gpus)} of --gpus")
    if number > 1 and not (gpus or args.cpu_devices):
        fail("several processes need --gpus or --cpu_devices: each would take all devices")
    if number > 1 and not modules()[args.command]:
        fail(f"{args.command} runs in one process; --processes is for commands that share work")
    port = args.port or (_free_port() if number > 1 else 0)
    processes = []
    for i in range(number):
        environment = {}
        if gpus:
            own = gpus[i * len(gpus) // number : (i + 1) * len(gpus) // number]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        if args.cpu_devices:
            environment["JAX_PLATFORMS"] = "cpu"
            environment["JAX_NUM_CPU_DEVICES"] = str(args.cpu_devices)
        if number == 1:
            command = [sys.executable, "-m", f"chroma_jax.{args.command}", *args.arguments]
        else:
            cluster = [f"--coordinator=localhost:{port}", f"--num_processes={number}", f"--process_id={i}"]  # fmt: skip
            command = command_line(args, sys.executable, cluster)
        processes.append((environment, command))
    return processes, args.dry_run


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run(commands: Sequence[tuple[dict[str, str], list[str]]]) -> int:
    """Runs all at once; the exit code of the first that failed, or 0."""
    asked, told = 0, 0

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    # Sessions of their own: Ctrl-C in the terminal reaches this process only.
    processes = [
        subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
        for environment, command in commands
    ]
    failed, since = 0, 0.0
    while None in (codes := [process.poll() for process in processes]):
        if asked > told:
            told = asked
            _send(processes, signal.SIGTERM if told == 1 else signal.SIGKILL)
        if not failed:
            # One that saved and stopped has not failed: the others are about to.
            failed = next((code for code in codes if code and code != STOPPED), 0)
            since = time.monotonic()
        elif time.monotonic() - since > _GRACE_SECONDS:
            _send(processes, signal.SIGKILL)  # they wait for the one that failed
        time.sleep(0.1)
    failed = failed or next((code for code in codes if code), 0)
    return failed if failed >= 0 else _KILLED - failed


def _send(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def main(argv: Sequence[str] | None = None) -> int:
    """The launcher; returns its exit code."""
    commands, dry_run = plan(argv)
    if not dry_run:
        return run(commands)
    for environment, command in commands:
        words = [f"{key}={value}" for key, value in environment.items()]
        print(shlex.join([*(["env", *words] if words else []), *command]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
