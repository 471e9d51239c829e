"""Two processes of a job: both hear what the first was refused, and both stop at the same place when a signal comes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import contextlib, sys, time
from chroma_jax import jobs
asked = dict(coordinator_address=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
jobs.join(asked, saves_on_sigterm=True)
from chroma_jax.checkpoint.processes import by_first
from chroma_jax.training.signals import Signals

@contextlib.contextmanager
def taken():
    raise ValueError("the place is taken")
    yield ""

@contextlib.contextmanager
def free():
    yield "the pl\\u00e4ce"

with jobs.together():
    try:
        with by_first(taken):
            print("inside")
    except ValueError as e:
        print(e)
    with by_first(free) as value:
        print(ascii(value), flush=True)
    with Signals() as signals:
        number = None
        count = 0
        while number is None and count < 100_000:
            count += 1
            number = signals.asked()
            time.sleep(0.005 * (1 + asked["process_id"]))
    print(count, number)
"""


def line(process):
    """The next line that is the program's own: the library of collectives speaks, too."""
    return next(line for line in process.stdout if not line.startswith("[Gloo]"))


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        address = f"localhost:{one.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(number)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for number in range(2)
    ]  # fmt: skip
    said = [[line(process), line(process)] for process in processes]
    assert said == [
        ["the place is taken\n", "'the pl\\xe4ce'\n"],
        ["process 0: the place is taken\n", "'the pl\\xe4ce'\n"],
    ]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    stops = {out.splitlines()[-1] for out, _ in ends}
    assert len(stops) == 1 and stops.pop().split()[1] == str(int(signal.SIGTERM))
