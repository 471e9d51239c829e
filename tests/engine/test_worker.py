"""Many threads that ask, write, take and cancel, one that steps: everybody gets what he gets alone."""

import concurrent.futures
import threading
import time

import numpy as np
import pytest

from chroma_jax import Sampling, Turn, Voice
from chroma_jax.engine.batch import BatchFull
from chroma_jax.engine.script import Script
from chroma_jax.engine.worker import Worker

HOT = Sampling(temperature=0.9, top_k=40)
TEXT = "Good morning, sir."


@pytest.fixture(scope="module")
def kinds(golden, voice):
    """Requests of several kinds, and what is replied to each alone."""
    other = Voice((voice.wave[:40000], 24000), "and mister john")
    asked = [
        dict(question=Turn(text="What time is it?"), voice=voice, max_seconds=0.6, sampling=HOT, seed=1),
        dict(question=Turn(text="Hello!"), voice=other, max_seconds=0.4),
        dict(question=Turn(text="Why is that?"), voice=voice, max_seconds=0.16, sampling=HOT, seed=4),
    ]  # fmt: skip
    spoken, said = dict(max_seconds=0.4, sampling=HOT, seed=5), dict(max_seconds=0.7, seed=6)
    wave = (voice.wave[:26000], 24000)
    return {
        **{f"asked {i}": (request, golden.reply(**request)) for i, request in enumerate(asked)},
        "spoken": (spoken, golden.reply(wave, voice=voice, **spoken)),
        "said": (said, golden.say(TEXT, voice=voice, **said)),
    }


def begin(golden, batch, voice, kind, request, rng):
    """Admits a request of a kind, in one of the ways in which it can come."""

    def admitted(admit, *args, **kwargs):
        while True:
            try:
                return admit(*args, **kwargs)
            except BatchFull:
                time.sleep(0.02)

    if kind == "spoken":
        listening = golden.listen(voice=voice, batch=batch)
        cuts = np.sort(rng.integers(0, 26000, 3))
        for piece in np.split(voice.wave[:26000], cuts):
            listening.push(piece, 24000)
        return admitted(batch.admit_request, listening.request(**request))
    if kind == "said":
        script = Script()
        stream = admitted(batch.admit, say=script, voice=voice, **request)
        cut = int(rng.integers(0, len(TEXT)))
        for piece in (TEXT[:cut], TEXT[cut:]):
            time.sleep(float(rng.random()) * 0.01)
            script.write(piece)
        script.close()
        return stream
    return admitted(batch.admit, **request)


def crowd(golden, voice, kinds, streams, slots=3):
    """Eight threads with so many streams together. Returns how each kind ended."""
    batch = golden.batch(slots=slots, queue=4, max_pending=2, question_positions=384, positions=512)
    ends = []

    def one(number):
        rng = np.random.default_rng(number)
        kind = str(rng.choice(list(kinds)))
        request, want = kinds[kind]
        stream = begin(golden, batch, voice, kind, request, rng)
        way, chunks = rng.integers(4), []
        if way == 0:  # all at once
            chunks = None
        elif way == 1:  # and then goes away
            while not stream.done and len(chunks) < 2:
                chunks += stream.take()
                time.sleep(0.001)
            batch.cancel(stream)
            chunks += stream.take()
        elif way == 2:  # by looking
            while not stream.done:
                chunks += stream.take()
                time.sleep(float(rng.random()) * 0.01)
            chunks += stream.take()
        else:
            chunks += stream
        got = stream.result(300) if chunks is None else stream.reply()
        if chunks is not None:
            frames = [chunk.frames for chunk in chunks]
            np.testing.assert_array_equal(np.concatenate([got.frames[:0], *frames]), got.frames)
        if got.finish_reason != "cancelled":
            assert got.finish_reason == want.finish_reason
            assert len(got.frames) == len(want.frames)
            assert got.text == want.text
        count = len(got.frames)
        np.testing.assert_array_equal(got.frames, want.frames[:count])
        np.testing.assert_array_equal(got.tokens, want.tokens[: len(got.tokens)])
        np.testing.assert_allclose(got.audio, want.audio[: len(got.audio)], rtol=0, atol=1e-5)
        ends.append((kind, got.finish_reason))

    with Worker(batch), concurrent.futures.ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(one, number) for number in range(streams)]:
            done.result()
        assert not batch.busy
        assert batch.num_free == slots
    return ends


def test_everybody_gets_what_he_gets_alone(golden, voice, kinds):
    ends = crowd(golden, voice, kinds, 48)
    assert len(ends) == 48
    assert {kind for kind, _ in ends} == set(kinds)
    assert {end for _, end in ends} == {"length", "cancelled"}


@pytest.mark.slow
def test_a_great_crowd(golden, voice, kinds):
    assert len(crowd(golden, voice, kinds, 10_000, slots=8)) == 10_000


def test_a_worker_sleeps_wakes_and_closes(golden, voice, kinds):
    batch = golden.batch(slots=1, max_pending=1, question_positions=384, positions=512)
    request, want = kinds["asked 1"]
    worker = Worker(batch).start()
    assert worker.submit(threading.get_ident).result(60) == worker._thread.ident
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 / 0).result(60)
    stream = batch.admit(**request)
    np.testing.assert_array_equal(np.concatenate([chunk.frames for chunk in stream]), want.frames)
    version = batch.version
    time.sleep(0.2)
    assert batch.idle and batch.version == version  # asleep
    late = batch.admit(**(request | {"max_seconds": 5.0}))
    next(iter(late))
    worker.close()
    assert late.finish_reason == "cancelled"
    assert not worker._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(print)


def test_a_step_that_raises_ends_the_streams_and_not_the_worker(golden, voice, kinds, monkeypatch):
    batch = golden.batch(slots=1, question_positions=384, positions=512)
    request, want = kinds["asked 1"]
    whole = batch._land

    def broken(flight):
        monkeypatch.setattr(batch, "_land", whole)
        raise RuntimeError("a bug")

    monkeypatch.setattr(batch, "_land", broken)
    with Worker(batch):
        first = batch.admit(**request)
        with pytest.raises(RuntimeError, match="a bug"):
            first.result(60)
        assert first.status == "failed"
        np.testing.assert_array_equal(batch.admit(**request).result(60).frames, want.frames)


def test_who_waits_too_long_is_told(golden, voice, kinds):
    batch = golden.batch(slots=1, question_positions=384, positions=512)
    stream = batch.admit(**kinds["asked 1"][0])
    with pytest.raises(TimeoutError, match="not over in time"):
        stream.result(0.01)
