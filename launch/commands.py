"""What the launchers share: the commands of chroma_jax, arguments checked before anything runs, and dry runs.

Only the standard library: a launcher runs where chroma_jax itself need not be installed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
USAGE_ERROR = 2
# What a command exits with after SIGTERM (128 + 15): its work is saved, and the same command goes on.
STOPPED = 143
_OURS = ("--distributed", "--coordinator", "--num_processes", "--process_id")


# As in us-east5-b; those that Google set up for accelerators are as in us-south1-ai1b.
ZONE = r"[a-z]+-[a-z]+[0-9]+-(ai[0-9]+)?[a-z]"


def fail(message: str, code: int = USAGE_ERROR) -> NoReturn:
    """Prints `error: message` and exits."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, and errors in one line."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """One line, and exit code 2."""
        fail(f"{message} ({self.prog} --help lists the options)")


def modules() -> dict[str, bool]:
    """The commands, chroma_jax/*.py; the value says whether a command splits its work with --distributed."""
    sources = {path.stem: path.read_text("utf-8") for path in (ROOT / "chroma_jax").glob("*.py")}
    return {
        name: '"distributed"' in source
        for name, source in sorted(sources.items())
        if 'if __name__ == "__main__":' in source
    }


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The flag --dry_run."""
    parser.add_argument(
        "--dry_run", action="store_true", help="print what would be run, and run nothing"
    )


def add_command(parser: argparse.ArgumentParser) -> None:
    """The command to launch: the first word that is no option, and everything after it."""
    known = modules()
    parser.add_argument("command", choices=known, metavar="COMMAND", help=", ".join(known))
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="flags of the command"
    )


def check_command(args: argparse.Namespace) -> None:
    """Exits with a message if the command is given what is the launcher's to give."""
    for argument in args.arguments:
        name = argument.split("=", 1)[0]
        if name in _OURS:
            fail(f"{name} is set by the launcher: leave it out")
        if name == "--dry_run":
            fail(f"--dry_run stands before {args.command}")


def command_line(args: argparse.Namespace, python: str, cluster: Sequence[str] = ()) -> list[str]:
    """`python -m chroma_jax.COMMAND ...`; a command that can be split is told so, and `cluster` besides."""
    split = ["--distributed", *cluster] if modules()[args.command] else []
    return [python, "-m", f"chroma_jax.{args.command}", *split, *args.arguments]


def positive(text: str) -> int:
    """An integer from 1 on."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is wanted, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """An integer from 0 on."""
    if not re.fullmatch(r"[0-9]+", text):
        raise argparse.ArgumentTypeError(f"a whole number from 0 on is wanted, got {text!r}")
    return int(text)


def cloud_name(text: str) -> str:
    """A name that Google Cloud takes."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"up to 40 lower-case letters, digits and hyphens are wanted, beginning with a letter, got {text!r}"
        )
    return text


def execute(
    argv: Sequence[str], *, dry_run: bool, stdin: str | None = None, check: bool = True
) -> int:
    """Runs a program, after saying so, and returns its exit code; or only prints it.

    Exits with the program's code if that is not 0, unless `check` is off.
    """
    if dry_run:
        print(shlex.join(argv))
        return 0
    print(f"+ {shlex.join(argv)}", file=sys.stderr, flush=True)
    try:
        code = subprocess.run(argv, input=stdin, text=True).returncode
    except FileNotFoundError:
        fail(f"{argv[0]} is not installed, or not on the PATH")
    if code and check:
        fail(f"{os.path.basename(argv[0])} ended with exit code {code}", code if code > 0 else 1)
    return code
