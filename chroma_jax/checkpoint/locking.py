"""One process at a time: a lock that a dead holder loses, also on file systems that hosts share, and in object stores.

On file systems it is filelock's lease. A holder that died on the same host is found by its process number, at once; one on another
host by the silence of its lock file, which a living holder touches every few seconds. `LEASE_SECONDS` of silence, counted by whoever
waits, mean that it is dead. In object stores the same is done with an object that the holder writes anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from chroma_jax import paths

LEASE_SECONDS = 90.0
BEAT_SECONDS = 10.0
# In an object store two may write at the same time: the one whose words are still there after this long holds the lock.
_SETTLE_SECONDS = 2.0
_LOOK_SECONDS = 0.5  # until it is clear that a lock file is no leaving holder's
_FIRST_NAMESPACE = 0xEFFFFFFC  # inode of the process namespace that is no container's, on Linux


class LockedError(ValueError):
    """Another process, which lives, has the lock."""


class Hold:
    """A lock that is held, as far as is known."""

    def __init__(self, path: str):
        self._path, self._lost = path, False

    def lose(self, *_: Any) -> None:
        """Notes that another process took it."""
        self._lost = True

    def check(self) -> None:
        """Raises LockedError if the lock was lost: this process was thought dead, after it had stood still for too long."""
        if self._lost:
            raise LockedError(
                f"{self._path} was taken by another process while this one stood still"
            )


@contextlib.contextmanager
def exclusive(
    path: str | os.PathLike, busy: str, say: Callable[[str], None] = logging.warning
) -> Iterator[Hold]:
    """Holds the lock file `path`, which is made and removed, while the block runs.

    Args:
      path: of the lock file.
      busy: what to say of it when another process has it, such as "another process is writing x".
      say: told when it is not clear yet whether the holder, on another host, is dead: that takes `LEASE_SECONDS`.

    Raises:
      LockedError: another process, which lives, has it.
      OSError: the file cannot be made.
    """
    path = os.fspath(path)
    hold = Hold(path)
    lock = (
        _remote(path, busy, say, hold) if paths.is_remote(path) else _local(path, busy, say, hold)
    )
    with lock:
        yield hold


@contextlib.contextmanager
def _local(path: str, busy: str, say: Callable[[str], None], hold: Hold) -> Iterator[None]:
    import filelock

    lock = filelock.SoftFileLease(
        path, lease_duration=LEASE_SECONDS, heartbeat_interval=BEAT_SECONDS, on_compromise=hold.lose
    )

    def here() -> bool:
        owner = lock.owner
        return owner is not None and _is_ours(owner.hostname)

    beat = _beat(path)
    try:
        lock.acquire(timeout=_LOOK_SECONDS, cancel_check=here)
    except filelock.Timeout as e:
        owner = lock.owner
        if owner is None or _is_ours(owner.hostname):
            raise LockedError(_told(busy, owner and owner.pid, owner and owner.hostname)) from e
        _say_waiting(say, busy, owner.pid, owner.hostname)
        try:
            lock.acquire(
                timeout=LEASE_SECONDS + BEAT_SECONDS,
                poll_interval=min(1.0, BEAT_SECONDS),
                cancel_check=lambda: _beat(path) not in (beat, None),
            )
        except filelock.Timeout as late:
            raise LockedError(_told(busy, owner.pid, owner.hostname)) from late
    try:
        yield
    finally:
        lock.release()


def _beat(path: str) -> int | None:
    """When a lock file was last touched, by the file system's clock; None where there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def _is_ours(host: str) -> bool:
    """Whether a process number of that host is one here: then the holder was looked up, and lives."""
    try:
        first = os.stat("/proc/self/ns/pid").st_ino == _FIRST_NAMESPACE
    except OSError:
        first = True
    return first and host == socket.gethostname()


def _told(busy: str, pid: Any, host: Any) -> str:
    return busy if pid is None else f"{busy} (process {pid} on {host})"


def _say_waiting(say: Callable[[str], None], busy: str, pid: Any, host: Any) -> None:
    say(
        f"{_told(busy, pid, host)}, unless it is dead: waiting up to {LEASE_SECONDS:.0f} s for a sign of it"
    )


@contextlib.contextmanager
def _remote(path: str, busy: str, say: Callable[[str], None], hold: Hold) -> Iterator[None]:
    file, token = paths.at(path), secrets.token_hex(8)

    def read() -> dict[str, Any] | None:
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def write(beat: int) -> None:
        about = dict(token=token, beat=beat, pid=os.getpid(), host=socket.gethostname())
        file.write_text(json.dumps(about))

    seen = read()
    if seen is not None:
        _say_waiting(say, busy, seen.get("pid"), seen.get("host"))
        end = time.monotonic() + LEASE_SECONDS
        while (now := read()) == seen and time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 5)
        if now is not None and now != seen:
            raise LockedError(_told(busy, now.get("pid"), now.get("host")))
    write(0)
    time.sleep(_SETTLE_SECONDS)
    mine = read() or {}
    if mine.get("token") != token:
        raise LockedError(_told(busy, mine.get("pid"), mine.get("host")))
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT_SECONDS):
            count += 1
            # A store that does not answer takes no lock away from anybody.
            with contextlib.suppress(OSError):
                if (read() or {}).get("token") != token:
                    hold.lose()
                    return
                write(count)

    thread = threading.Thread(target=beat, name=f"lock {path}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if (read() or {}).get("token") == token:
            file.unlink()
