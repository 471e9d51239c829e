"""Several processes as one job: one that fails ends all, soon, with its message and its exit code."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from chroma_jax import jobs

ROOT = pathlib.Path(__file__).parents[1]


class Service:
    """Stands in for what the processes met by."""

    def __init__(self):
        self.words, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            if key in self.words:
                raise RuntimeError("ALREADY_EXISTS")
            self.words[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.words, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.words[key]


@pytest.fixture
def ends():
    """Exit codes by process, instead of an end."""
    return {}


def job(service, number, ends, count=3):
    def end(code):
        ends[number] = code

    return jobs._Job(service, number, count, end)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_ends_all(ends, capsys, failing):
    service = Service()
    processes = [job(service, i, ends) for i in range(3)]
    for process in processes:
        process.start()
    processes[failing].fail(ValueError("no such\ndataset"))
    wait_for(lambda: len(ends) == 3)
    assert set(ends.values()) == {2}
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == ["error: no such dataset"] + 2 * [
        f"error: process {failing} failed: no such dataset"
    ]
    for process in processes:
        process.stop()


def test_the_first_error_is_everybodys(ends, capsys):
    service = Service()
    service.key_value_set("chroma_jax/failed", json.dumps([2, 1, "Traceback\n  x\nKeyError: 'y'"]))
    job(service, 1, ends).fail(ValueError("another"))
    assert ends == {1: 1}
    assert capsys.readouterr().err == "error: process 2 failed: KeyError: 'y'\n"


def test_a_job_without_a_failure(ends):
    service = Service()
    process = job(service, 1, ends)
    process.start()
    process.stop()
    assert not process._thread.is_alive() and not ends and not service.words


PROGRAM = """
import sys, time
from chroma_jax import jobs
address, number, failing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
asked = dict(coordinator_address=address, num_processes=2, process_id=number)
jobs.join(asked, saves_on_sigterm=True)
with jobs.together():
    print("joined", flush=True)
    if number == failing:
        raise ValueError("a folder is missing")
    jobs.client().wait_at_barrier("for one that never comes", 600_000)
"""


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_end_within_seconds(failing):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(number), str(failing)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for number in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "joined\n"
    began = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert time.monotonic() - began < 20
    assert [process.returncode for process in processes] == [2, 2]
    assert errors[failing].splitlines()[-1] == "error: a folder is missing"
    assert (
        errors[1 - failing].splitlines()[-1]
        == f"error: process {failing} failed: a folder is missing"
    )
