#!/usr/bin/env python3
"""Runs a command of chroma_jax on TPU slices of a GKE cluster, with xpk (pip install xpk).

    python launch/gke.py create --cluster=chroma --zone=us-east5-b --project=mine --tpu_type=v6e-64 --slices=2
    python launch/gke.py run    --cluster=chroma --zone=us-east5-b --project=mine --tpu_type=v6e-64 --slices=2 \\
        --name=first --storage=share train --config=configs/chroma_4b.py --workdir=/share/run ...
    python launch/gke.py status --cluster=chroma --zone=us-east5-b --project=mine
    python launch/gke.py stop   --cluster=chroma --zone=us-east5-b --project=mine --name=first
    python launch/gke.py delete --cluster=chroma --zone=us-east5-b --project=mine

`run` puts this repository as git's index has it (commit or `git add` what is new) on top of an image with Python, and installs it
when a container starts; with --image, which has chroma_jax installed, it does neither. Relative paths of the command begin
at the repository's root. Data, checkpoints and --workdir must be on a file system that all containers share: attach one to the
cluster with `xpk storage attach`, and name it with --storage.

A container that is to go away gets SIGTERM: training saves and exits with code 143, and the workload starts again, as it does
after a crash, up to --restarts times; it goes on from what is saved. Mistakes in the call (code 2) end it at once. Run again under
another --name it goes on as well.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence

from commands import (
    ROOT,
    ZONE,
    Parser,
    add_command,
    add_dry_run,
    check_command,
    cloud_name,
    command_line,
    count,
    execute,
    fail,
    modules,
    positive,
)

_TPU_TYPE = r"(v4|v5litepod|v5p|v6e|tpu7x)-[0-9]+(x[0-9]+)*"
_INSTALL = "python -m pip install --quiet -e '.[tpu,train]'"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = Parser(prog="launch/gke.py", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, what in {
        "create": "a cluster with TPU slices, or more slices in one",
        "run": "start a command on some of its slices",
        "status": "list the workloads",
        "stop": "end a workload",
        "delete": "the cluster",
    }.items():
        sub = actions.add_parser(action, help=what, description=what)
        sub.add_argument("--cluster", type=cloud_name, required=True, help="its name")
        sub.add_argument("--zone", required=True, help="as in us-east5-b")
        sub.add_argument("--project", help="(default: that of gcloud)")
        if action in ("create", "run"):
            sub.add_argument("--tpu_type", required=True, help="as in v5litepod-16, v5p-32, v6e-256")  # fmt: skip
            sub.add_argument("--slices", type=positive, default=1, help="how many (default 1)")
        if action == "create":
            price = sub.add_mutually_exclusive_group()
            price.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
            price.add_argument("--reservation", help="name of a reservation (default: on demand)")
        if action in ("run", "stop"):
            sub.add_argument("--name", type=cloud_name, required=True, help="of the workload")
        if action == "run":
            image = sub.add_mutually_exclusive_group()
            image.add_argument("--image", help="with chroma_jax installed, used as it is")
            image.add_argument(
                "--base_image",
                default="python:3.12",
                help="to put the code on (default python:3.12)",
            )
            sub.add_argument("--storage", action="append", default=[], help="of xpk, to mount; may be repeated")  # fmt: skip
            sub.add_argument("--restarts", type=count, default=20, help="at most (default 20)")
            sub.add_argument(
                "--grace",
                type=positive,
                default=300,
                help="seconds between SIGTERM and the end (default 300)",
            )
            sub.add_argument(
                "--priority",
                choices=("very-low", "low", "medium", "high", "very-high"),
                default="medium",
                help="(default medium)",
            )
        sub.add_argument(
            "--xpk",
            action="append",
            default=[],
            metavar="FLAG",
            help="any other flag of the xpk command, as in --xpk=--private; may be repeated",
        )
        add_dry_run(sub)
        if action == "run":
            add_command(sub)
    args = parser.parse_args(argv)
    if not re.fullmatch(ZONE, args.zone):
        fail(f"--zone must be as in us-east5-b, got {args.zone!r}")
    if "tpu_type" in args and not re.fullmatch(_TPU_TYPE, args.tpu_type):
        fail(f"--tpu_type must be as in v5litepod-16, v5p-32 or v6e-256, got {args.tpu_type!r}")
    for flag in args.xpk:
        if not flag.startswith("--"):
            fail(f"--xpk wants a flag, as in --xpk=--private, got {flag!r}")
    if args.action == "run":
        check_command(args)
        if args.slices > 1 and not modules()[args.command]:
            fail(f"{args.command} runs in one process: --slices=1, of a type that is one machine")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The launcher; returns its exit code."""
    args = parse(argv)
    where = [f"--cluster={args.cluster}", f"--zone={args.zone}"]
    if args.project:
        where.append(f"--project={args.project}")

    def xpk(*words: str) -> int:
        return execute(["xpk", *words, *args.xpk], dry_run=args.dry_run)

    if args.action == "create":
        price = "--on-demand"
        if args.spot:
            price = "--spot"
        elif args.reservation:
            price = f"--reservation={args.reservation}"
        return xpk(
            "cluster",
            "create",
            *where,
            f"--tpu-type={args.tpu_type}",
            f"--num-slices={args.slices}",
            price,
        )
    if args.action == "status":
        return xpk("workload", "list", *where)
    if args.action == "stop":
        return xpk("workload", "delete", *where, f"--workload={args.name}")
    if args.action == "delete":
        return xpk("cluster", "delete", *where)
    return xpk("workload", "create", *where, *_workload(args))


def _workload(args: argparse.Namespace) -> list[str]:
    # xpk sends SIGTERM to the shell that runs this line: exec makes it Python's.
    line = f"exec {shlex.join(command_line(args, 'python'))}"
    if args.image:
        image = [f"--docker-image={args.image}"]
    else:
        code = os.path.join(tempfile.gettempdir(), f"{args.name}-chroma_jax")
        execute(["rm", "-rf", code], dry_run=args.dry_run)
        execute(["git", "-C", str(ROOT), "checkout-index", "--all", f"--prefix={code}/"], dry_run=args.dry_run)  # fmt: skip
        image = [f"--base-docker-image={args.base_image}", f"--script-dir={code}"]
        line = f"{_INSTALL} && {line}"
    return [
        f"--workload={args.name}",
        f"--tpu-type={args.tpu_type}",
        f"--num-slices={args.slices}",
        *image,
        f"--max-restarts={args.restarts}",
        # 127 to 255 (signals, our 143) start again by themselves; 1 is a Python exception.
        "--restart-on-exit-codes=1",
        f"--termination-grace-period-seconds={args.grace}",
        f"--priority={args.priority}",
        *(f"--storage={storage}" for storage in args.storage),
        f"--command={line}",
    ]


if __name__ == "__main__":
    sys.exit(main())
