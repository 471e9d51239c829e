#!/usr/bin/env python3
"""Runs a command of chroma_jax on a Cloud TPU pod: one slice, or several.

    python launch/tpu_pod.py create --name=chroma --zone=us-east5-b --accelerator=v6e-64
    python launch/tpu_pod.py wait   --name=chroma --zone=us-east5-b
    python launch/tpu_pod.py setup  --name=chroma --zone=us-east5-b --nfs=10.0.0.2:/share
    python launch/tpu_pod.py run    --name=chroma --zone=us-east5-b train --config=configs/chroma_4b.py ...
    python launch/tpu_pod.py logs   --name=chroma --zone=us-east5-b        status, stop, delete likewise

    python launch/tpu_pod.py resume --name=chroma --zone=us-east5-b --accelerator=v6e-64 --nfs=10.0.0.2:/share train ...

`setup` sends the last commit of this repository to ~/chroma_jax on every worker, where relative paths of the command begin, and
installs it there. Data, checkpoints and --workdir must be on a file system that all workers share: --nfs mounts one (such as
Filestore) at /mnt/chroma.

`run` starts the command on every worker as a systemd service and returns; its output is in ~/chroma_jax.log. A worker whose
process dies starts it again, so a run survives crashes, and this machine may go away. `stop` sends SIGTERM: training saves. After
a maintenance or preemption that took workers or the whole pod away, `resume` (told all that create, setup and run were told) puts
back what is missing: the pod, its set-up, the command on workers where it does not run. It may be called at any time; what runs or
has ended well is left alone.

A command that does not split its work (generate, convert) runs on the first worker alone; if it computes, on a pod of one worker.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from commands import (
    ROOT,
    USAGE_ERROR,
    ZONE,
    Parser,
    add_command,
    add_dry_run,
    check_command,
    cloud_name,
    command_line,
    execute,
    fail,
    modules,
    positive,
)

# The operating system of a worker, by generation (cloud.google.com/tpu/docs/runtimes).
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
PYTHON = "3.12"  # the workers' own is older than chroma_jax wants
UNIT, LOG, MOUNT = "chroma_jax", "chroma_jax.log", "/mnt/chroma"
_POLL_SECONDS = 30


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = Parser(prog="launch/tpu_pod.py", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, what in {
        "create": "ask for the pod",
        "wait": "until the pod is there",
        "setup": "send the code to all workers and install it",
        "run": "start a command on all workers",
        "resume": "put back what a preemption or maintenance took away",
        "status": "of the pod, and of the command on each worker",
        "logs": "follow the first worker's output",
        "stop": "SIGTERM to the command on all workers",
        "delete": "the pod",
    }.items():
        sub = actions.add_parser(action, help=what, description=what)
        sub.add_argument("--name", type=cloud_name, required=True, help="of the pod")
        sub.add_argument("--zone", required=True, help="as in us-east5-b")
        sub.add_argument("--project", help="(default: that of gcloud)")
        sub.add_argument("--slices", type=positive, default=1, help="pods that train together (default 1)")  # fmt: skip
        sub.add_argument(
            "--direct",
            action="store_true",
            help="the TPU VM API instead of queued resources: now or never",
        )
        if action in ("create", "resume"):
            sub.add_argument("--accelerator", required=True, help="as in v5litepod-16, v5p-32, v6e-256")  # fmt: skip
            sub.add_argument("--runtime", help="version of the workers' system (default: by accelerator, for those of v4 to v6e)")  # fmt: skip
            price = sub.add_mutually_exclusive_group()
            price.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
            price.add_argument("--reserved", action="store_true", help="from a reservation")
            sub.add_argument(
                "--gcloud",
                action="append",
                default=[],
                metavar="FLAG",
                help="any other flag of its create command, as in --gcloud=--network=mine; may be repeated",
            )
        if action in ("setup", "resume"):
            sub.add_argument("--nfs", metavar="HOST:/PATH", help=f"file system to mount at {MOUNT}")
        add_dry_run(sub)
        if action in ("run", "resume"):
            add_command(sub)
    args = parser.parse_args(argv)
    if not re.fullmatch(ZONE, args.zone):
        fail(f"--zone must be as in us-east5-b, got {args.zone!r}")
    if args.direct and args.slices > 1:
        fail("several slices need queued resources: leave out --direct")
    if "accelerator" in args:
        match = re.fullmatch(r"([a-z0-9]+)-[1-9][0-9]*", args.accelerator)
        if not match:
            fail(
                f"--accelerator must be a generation and a size, as in v6e-64, got {args.accelerator!r}"
            )
        args.runtime = args.runtime or RUNTIMES.get(match[1])
        if args.runtime is None:
            fail(
                f"--accelerator={args.accelerator}: the runtimes known here are for {', '.join(RUNTIMES)}; "
                "for another generation, name one with --runtime"
            )
        for flag in args.gcloud:
            if not flag.startswith("--"):
                fail(f"--gcloud wants a flag, as in --gcloud=--network=mine, got {flag!r}")
    if getattr(args, "nfs", None) and not re.fullmatch(r"[\w.-]+:/[\w./-]*", args.nfs):
        fail(f"--nfs must be as in 10.0.0.2:/share, got {args.nfs!r}")
    if "command" in args:
        check_command(args)
    return args


class Pod:
    """What can be done with a pod; all of it only printed with --dry_run."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self._tpus = ["gcloud", "compute", "tpus"]
        self._kind = "tpu-vm" if args.direct else "queued-resources"
        self._where = [f"--zone={args.zone}"]
        if args.project:
            self._where.append(f"--project={args.project}")

    def _execute(self, *argv: str, check: bool = True) -> int:
        return execute(argv, dry_run=self.args.dry_run, check=check)

    def create(self) -> None:
        """Asks for it."""
        args = self.args
        request = [*self._tpus, self._kind, "create", args.name, *self._where]
        request.append(f"--accelerator-type={args.accelerator}")
        if args.direct:
            request.append(f"--version={args.runtime}")
        else:
            request.append(f"--runtime-version={args.runtime}")
            if args.slices == 1:
                request.append(f"--node-id={args.name}")
            else:
                request += [f"--node-count={args.slices}", f"--node-prefix={args.name}"]
        request += [f"--{price}" for price in ("spot", "reserved") if getattr(args, price)]
        self._execute(*request, *args.gcloud)

    def _describe(self) -> list[str]:
        field = "state" if self.args.direct else "state.state"
        return [*self._tpus, self._kind, "describe", self.args.name, *self._where, f"--format=value({field})"]  # fmt: skip

    def state(self) -> str:
        """Its state in Google's words; empty if there is no such pod."""
        try:
            found = subprocess.run(self._describe(), capture_output=True, text=True)
        except FileNotFoundError:
            fail("gcloud is not installed, or not on the PATH")
        if found.returncode == 0:
            return found.stdout.strip()
        if "NOT_FOUND" in found.stderr or "not found" in found.stderr:
            return ""
        fail(found.stderr.strip().splitlines()[-1] if found.stderr.strip() else "gcloud failed", 1)

    def there(self, state: str) -> bool:
        """Whether a pod in that state has its workers."""
        return state == ("READY" if self.args.direct else "ACTIVE")

    def wait(self) -> None:
        """Until the workers are there; fails if they will not come."""
        if self.args.dry_run:
            print(shlex.join(self._describe()))
            return
        last = None
        while not self.there(state := self.state()):
            if state in ("", "FAILED", "SUSPENDING", "SUSPENDED", "DELETING", "PREEMPTED", "TERMINATED"):  # fmt: skip
                fail(f"{self.args.name} will not come: it is {state or 'not there'}", 1)
            if state != last:
                print(f"{self.args.name} is {state}", file=sys.stderr, flush=True)
            last = state
            time.sleep(_POLL_SECONDS)

    def _target(self, workers: str = "all") -> tuple[list[str], list[str]]:
        """(group of gcloud commands, flags) that reach every worker, or with "0" the first."""
        if self.args.slices > 1:
            nodes = [f"--node={workers}", f"--worker={workers}"]
            return [*self._tpus, "queued-resources"], [*self._where, *nodes]
        return [*self._tpus, "tpu-vm"], [*self._where, f"--worker={workers}"]

    def ssh(self, command: str, *, workers: str = "all", check: bool = True) -> None:
        """Runs a line of shell on every worker, or on the first."""
        group, flags = self._target(workers)
        self._execute(*group, "ssh", self.args.name, *flags, f"--command={command}", check=check)

    def setup(self) -> None:
        """Code, Python and file system for every worker."""
        archive = os.path.join(tempfile.gettempdir(), f"{self.args.name}-chroma_jax.tar.gz")
        self._execute(
            "git",
            "-C",
            str(ROOT),
            "archive",
            "--format=tar.gz",
            "--prefix=chroma_jax/",
            f"--output={archive}",
            "HEAD",
        )
        group, flags = self._target()
        self._execute(*group, "scp", archive, f"{self.args.name}:chroma_jax.tar.gz", *flags)
        steps = [
            "set -eu",
            "cd",
            "tar -xzf chroma_jax.tar.gz",
            "python3 -m pip install --quiet --user uv",
            f".local/bin/uv venv --quiet --clear --python={PYTHON} chroma_jax/.venv",
            ".local/bin/uv pip install --quiet --python=chroma_jax/.venv/bin/python -e 'chroma_jax[tpu,train]'",
        ]
        if self.args.nfs:
            entry = shlex.quote(f"{self.args.nfs} {MOUNT} nfs defaults,nofail,_netdev 0 0")
            steps += [
                "sudo apt-get install -qq -y nfs-common",
                f"sudo mkdir -p {MOUNT}",
                f"grep -qxF {entry} /etc/fstab || echo {entry} | sudo tee -a /etc/fstab",
                f"mountpoint -q {MOUNT} || sudo mount {MOUNT}",
                f"sudo chmod 1777 {MOUNT}",
            ]
        self.ssh("; ".join(steps))

    def start(self, *, leave: bool) -> None:
        """Starts the command on every worker; one that does not split its work, on the first.

        `leave`: where it runs already, or has ended well, that is no error.
        """
        command = command_line(self.args, "$HOME/chroma_jax/.venv/bin/python")
        # systemd expands $NAME in arguments; $$ is a dollar.
        words = " ".join(shlex.quote(word.replace("$", "$$")) for word in command[1:])
        states = "running|start|auto-restart|stop*" + ("|exited" if leave else "")
        properties = [
            "Restart=on-failure", f"RestartPreventExitStatus={USAGE_ERROR}", "RestartSec=15", "RemainAfterExit=yes",
            "TimeoutStopSec=600", "LimitMEMLOCK=infinity", "LimitNOFILE=1048576",
        ]  # fmt: skip
        steps = [
            "set -eu",
            f'case "$(systemctl show --property=SubState --value {UNIT})" in {states}) '
            f'echo "$(hostname): a command runs or has run, and stays" >&2; exit {0 if leave else 1};; esac',
            f"sudo systemctl stop {UNIT} 2>/dev/null || true",
            f"sudo systemctl reset-failed {UNIT} 2>/dev/null || true",
            f"sudo systemd-run --unit={UNIT} "
            '--uid="$(id -u)" --gid="$(id -g)" --setenv=HOME="$HOME" --working-directory="$HOME/chroma_jax" '
            f'--property=StandardOutput="append:$HOME/{LOG}" --property=StandardError="append:$HOME/{LOG}" '
            + "".join(f"--property={value} " for value in properties)
            + f'-- "{command[0]}" {words}',
        ]
        self.ssh("; ".join(steps), workers="all" if modules()[self.args.command] else "0")

    def stop(self) -> None:
        """SIGTERM to the command on every worker."""
        self.ssh(f"sudo systemctl stop {UNIT}")

    def status(self) -> None:
        """Of the pod, and of the command on each worker."""
        self._execute(*self._describe())
        self.ssh(
            f"hostname; systemctl show --property=ActiveState,SubState,NRestarts,ExecMainStatus {UNIT}; tail -n 3 {LOG}",
            check=False,
        )

    def logs(self) -> None:
        """Follows the first worker's output."""
        self.ssh(f"tail -n 200 -F {LOG}", workers="0", check=False)

    def delete(self, check: bool = True) -> None:
        """With everything on its workers' disks."""
        force = [] if self.args.direct else ["--force"]
        self._execute(
            *self._tpus,
            self._kind,
            "delete",
            self.args.name,
            *self._where,
            *force,
            "--quiet",
            check=check,
        )

    def resume(self) -> None:
        """Puts back what is missing."""
        if self.args.dry_run:
            self.wait()
            print(f"# unless that says {'READY' if self.args.direct else 'ACTIVE'}:")
            state = "SUSPENDED"
        else:
            state = self.state()
        if not self.there(state):
            if state in ("FAILED", "SUSPENDING", "SUSPENDED", "PREEMPTED", "TERMINATED"):
                self.delete()
            if state in ("", "FAILED", "SUSPENDING", "SUSPENDED", "PREEMPTED", "TERMINATED"):
                self.create()
            self.wait()
            self.setup()
        if self.args.dry_run:
            print("# in any case:")
        self.start(leave=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The launcher; returns its exit code."""
    args = parse(argv)
    pod = Pod(args)
    if args.action == "run":
        pod.start(leave=False)
    else:
        getattr(pod, args.action)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
