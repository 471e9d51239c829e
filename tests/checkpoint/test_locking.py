"""Locks: one holder at a time, living; a dead one on this host is found at once, one elsewhere by its silence."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from chroma_jax import paths
from chroma_jax.checkpoint import locking
from chroma_jax.checkpoint.locking import LockedError, exclusive

BUSY = "another process is writing x"


@pytest.fixture
def lock(tmp_path):
    return tmp_path / ".x.lock"


@pytest.fixture
def brief(monkeypatch):
    """Leases of a moment."""
    monkeypatch.setattr(locking, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(locking, "BEAT_SECONDS", 0.1)


def said(line):
    pytest.fail(f"nothing is to be waited for, but: {line}")


def test_the_second_is_refused_at_once(lock):
    began = time.monotonic()
    with exclusive(lock, BUSY, said) as hold:
        with pytest.raises(LockedError, match=rf"{BUSY} \(process {os.getpid()} on \S+\)$"):
            exclusive(lock, BUSY, said).__enter__()
        hold.check()
    assert time.monotonic() - began < locking.BEAT_SECONDS / 2
    assert not lock.exists()
    with exclusive(lock, BUSY, said):
        pass


# As `exclusive` does it, without the rest of the package, which takes seconds to import.
HOLDER = """
import filelock, sys, time
with filelock.SoftFileLease(sys.argv[1], lease_duration=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_that_was_killed_hinders_nobody(lock):
    command = [sys.executable, "-c", HOLDER, str(lock), str(locking.LEASE_SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"process {process.pid} on"):
            exclusive(lock, BUSY, said).__enter__()
        process.send_signal(signal.SIGKILL)
    assert lock.exists()
    with exclusive(lock, BUSY, said):
        assert f"pid={os.getpid()}\n" in lock.read_text()


def left_elsewhere(lock):
    """The lock file of a process on another host."""
    with exclusive(lock, BUSY, said):
        text = lock.read_text()
    lines = [
        f"host=elsewhere.{line}" if line.startswith("host=") else line for line in text.split("\n")
    ]
    lock.write_text("\n".join(lines))


def test_one_on_another_host_is_dead_when_it_is_silent(lock, brief):
    left_elsewhere(lock)
    lines, began = [], time.monotonic()
    with exclusive(lock, BUSY, lines.append) as hold:
        assert time.monotonic() - began >= 1.0
        hold.check()
    (line,) = lines
    assert "on elsewhere." in line and "waiting up to 1 s" in line


def test_one_on_another_host_lives_when_it_is_heard(lock, brief):
    left_elsewhere(lock)
    threading.Timer(0.3, os.utime, [lock]).start()
    began = time.monotonic()
    with pytest.raises(LockedError, match=rf"{BUSY} \(process {os.getpid()} on elsewhere\."):
        exclusive(lock, BUSY, lambda _: None).__enter__()
    assert time.monotonic() - began < 1.0
    assert lock.exists()


def test_a_lock_that_was_taken_is_noticed(lock, brief):
    with exclusive(lock, BUSY, said) as hold:
        lock.unlink()
        lock.write_text("another's")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                hold.check()
            except LockedError as e:
                assert "was taken by another process" in str(e)
                break
            time.sleep(0.05)
        else:
            pytest.fail("it was not noticed")
    assert lock.read_text() == "another's"


def test_many_at_once(lock):
    """Eight threads, each often, never two inside."""
    inside, taken = [], []

    def attempt(i):
        for _ in range(20):
            try:
                with exclusive(lock, BUSY, said):
                    inside.append(i)
                    assert inside == [i]
                    time.sleep(0.001)
                    inside.remove(i)
                    taken.append(i)
            except LockedError:
                time.sleep(0.001)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, range(8)))
    assert taken and not lock.exists()


class Objects:
    """An object store with one object."""

    def __init__(self):
        self.text = None

    def read_text(self):
        if self.text is None:
            raise FileNotFoundError
        return self.text

    def write_text(self, text):
        self.text = text

    def unlink(self):
        self.text = None


@pytest.fixture
def store(monkeypatch, brief):
    objects = Objects()
    monkeypatch.setattr(paths, "at", lambda _: objects)
    monkeypatch.setattr(locking, "_SETTLE_SECONDS", 0.05)
    return objects


def test_in_an_object_store(store):
    with exclusive("gs://bucket/run/.lock", BUSY) as hold:
        assert json.loads(store.text)["pid"] == os.getpid()
        with pytest.raises(LockedError, match=rf"{BUSY} \(process {os.getpid()} on"):
            exclusive("gs://bucket/run/.lock", BUSY, lambda _: None).__enter__()
        hold.check()
        store.text = json.dumps(dict(token="another", beat=0))
        time.sleep(0.5)
        with pytest.raises(LockedError, match="gs://bucket/run/.lock was taken by another process"):
            hold.check()
    assert json.loads(store.text)["token"] == "another"  # not ours to remove
    lines = []
    with exclusive("gs://bucket/run/.lock", BUSY, lines.append):  # dead: it is silent
        pass
    assert len(lines) == 1 and store.text is None


def test_two_that_write_to_an_object_store_at_once(store, monkeypatch):
    wrote = store.write_text

    def later(text):
        wrote(text)
        if json.loads(text)["beat"] == 0:
            wrote(json.dumps(dict(token="another", pid=7, host="there")))

    monkeypatch.setattr(store, "write_text", later)
    with pytest.raises(LockedError, match=r"\(process 7 on there\)"):
        exclusive("gs://bucket/run/.lock", BUSY).__enter__()
