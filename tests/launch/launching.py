"""How the launchers are called here, and programs that stand in for those of a cluster."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def launch(script, *arguments, cwd=None, path=None, **more):
    """Calls launch/<script>.py; `path`: a directory of programs that come first."""
    environment = dict(os.environ)
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        [sys.executable, LAUNCH / f"{script}.py", *arguments],
        capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, **more,
    )  # fmt: skip


def shown(script, *arguments, **more):
    """The lines of a dry run."""
    done = launch(script, *arguments, **more)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def refused(script, *arguments):
    """The one line that says what is wrong; nothing is run and the exit code is 2."""
    done = launch(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def program(folder, name, text):
    """A shell script that can be called by its name."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return folder


def is_shell(text):
    """Whether bash can read it."""
    return subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
