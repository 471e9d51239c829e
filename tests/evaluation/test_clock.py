"""The clock's arithmetic on made-up arrivals."""

import time
import types

import numpy as np
import pytest

from chroma_jax.evaluation import clock


def test_stalls_by_hand():
    # Pieces of 1 s at 10 Hz. The second comes in time, the third half a second late, the fourth waits for nothing.
    sounds = [(1.0, 10), (1.5, 10), (3.5, 10), (3.6, 10)]
    assert clock.stalls(sounds, 10) == pytest.approx([0, 0, 0.5, 0])
    # A piece that is late twice over: playing has moved on by the first stall.
    assert clock.stalls([(0, 10), (1.25, 10), (2.75, 10)], 10) == pytest.approx([0, 0.25, 0.5])
    assert clock.stalls([], 10) == []


def chunk(audio, tokens=0, frames=0):
    return types.SimpleNamespace(audio=np.zeros(audio), tokens=np.zeros(tokens), frames=np.zeros((frames, 8)))  # fmt: skip


def test_what_comes_first(monkeypatch):
    now = iter([1.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: next(now)))
    chunks = [chunk(0, tokens=1), chunk(0, tokens=1, frames=2), chunk(8, frames=2), chunk(8)]
    found = clock.follow(chunks, 0.5, 4)
    assert (found.first_text, found.first_frame, found.first_sound) == (0.5, 1.5, 3.5)
    assert (found.end, found.seconds, found.rtf) == (4.5, 4.0, 4.5 / 4)
    assert found.gaps == [1.0]
    assert found.stalls == [0.0, 0.0]


def test_to_the_first_sound():
    chunks = iter([chunk(0), chunk(8), chunk(8)])
    found = clock.follow(chunks, time.perf_counter(), 4, until_sound=True)
    assert found.seconds == 2.0
    assert len(list(chunks)) == 1


def test_silence_has_no_sound():
    found = clock.follow([chunk(0)], 0.0, 4)
    assert (found.first_sound, found.rtf, found.gaps) == (None, None, [])
