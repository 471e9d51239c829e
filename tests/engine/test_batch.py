"""Streams that come and go in one running batch give what they give alone, and nothing compiles twice."""

import jax
import numpy as np
import pytest

from chroma_jax import Chroma, Sampling, TokenSampling, Turn, Voice
from chroma_jax.engine import caches, programs, warmup
from chroma_jax.engine.batch import BatchFull
from chroma_jax.engine.caches import CacheLedger, CacheSizes
from chroma_jax.schedule import POSITIONS_PER_BEAT

HOT = Sampling(temperature=0.9, top_k=40)


@pytest.fixture(scope="module")
def requests(voice):
    """Five requests that differ in question, voice, length, sampling and seed, in the same static shapes."""
    clip = voice.wave
    other = Voice((clip[:40000], 24000), "and mister john")
    return [
        dict(
            question=Turn(text="What time is it?"),
            voice=voice,
            max_seconds=1.0,
            sampling=HOT,
            seed=1,
        ),
        dict(question=Turn(text="Hello!"), voice=other, max_seconds=0.4),
        dict(question=Turn(text="And you?"), voice=other, max_seconds=0.6, sampling=HOT, seed=3),
        dict(
            question=Turn(text="Why is that?"), voice=voice, max_seconds=0.16, sampling=HOT, seed=4
        ),
        dict(question=Turn(text="Good night."), voice=voice, max_seconds=0.7, sampling=HOT, seed=5),
    ]


@pytest.fixture(scope="module")
def alone(golden, requests):
    return [golden.reply(**request) for request in requests]


@pytest.fixture(scope="module")
def make(golden):
    def make(**changes):
        sizes = dict(slots=2, question_positions=384, positions=256)
        return golden.batch(**(sizes | changes))

    return make


def run(batch):
    steps = 0
    while batch.busy:
        batch.step()
        steps += 1
        assert steps < 100
    return steps


def same(stream, reply):
    stream.take()
    got = stream.reply()
    np.testing.assert_array_equal(got.frames, reply.frames)
    np.testing.assert_array_equal(got.tokens, reply.tokens)
    assert got.text == reply.text
    assert got.finish_reason == reply.finish_reason
    np.testing.assert_allclose(got.audio, reply.audio, rtol=0, atol=1e-5)


def test_streams_come_and_go(make, requests, alone):
    batch = make()
    streams = [batch.admit(**request) for request in requests[:3]]
    batch.step()
    batch.step()
    compiled = [f._cache_size() for f in (programs.pausing_beat, programs.insert_rows)]
    streams += [batch.admit(**request) for request in requests[3:]]
    run(batch)
    for stream, reply in zip(streams, alone, strict=True):
        assert stream.done
        same(stream, reply)
    assert [f._cache_size() for f in (programs.pausing_beat, programs.insert_rows)] == compiled
    assert batch.num_free == 2
    assert batch.step() == []


def test_a_slow_listener_holds_its_own_row_only(make, requests, alone):
    batch = make(max_pending=3)
    slow, quick = (batch.admit(**requests[i]) for i in (0, 4))
    while not quick.done:
        batch.step()
        quick.take()
        assert slow.num_pending <= 3
    same(quick, alone[4])
    assert not slow.done
    while not slow.done:
        batch.step()
        slow.take()
    same(slow, alone[0])


@pytest.mark.parametrize("max_pending", [1, 2])
def test_a_listener_may_take_one_chunk_at_a_time(make, requests, alone, max_pending):
    batch = make(max_pending=max_pending)
    stream = batch.admit(**requests[4])
    for _ in range(100):
        batch.step()
        assert stream.num_pending <= max_pending
        stream.take()
        if stream.done:
            break
    same(stream, alone[4])


def test_a_stream_says_where_it_is(make, requests):
    batch = make(slots=1, max_pending=1)
    first, second = batch.admit(**requests[0]), batch.admit(**requests[1])
    assert [first.status, second.status] == ["queued", "queued"]
    batch.step()
    assert [first.status, second.status] == ["paused", "queued"]
    assert first.finish_reason == "running"
    first.take()
    assert first.status == "running"
    batch.cancel(first)
    batch.step()
    assert [first.status, second.status] == ["done", "paused"]


class Broken(Exception):  # noqa: N818
    pass


@pytest.fixture
def breaks(monkeypatch):
    """Makes a call of the device raise, the next time."""

    def once(where, name):
        whole = getattr(where, name)

        def broken(*args, **kwargs):
            monkeypatch.setattr(where, name, whole)
            raise Broken(name)

        monkeypatch.setattr(where, name, broken)

    return once


# What fails, and which of two streams it must end: one that runs, one that joins. A third waits.
FAILURES = {
    "prefill": (programs, {"joins"}),
    "insert_rows": (programs, {"joins"}),
    "resize": (caches, {"joins"}),
    "pausing_beat": (programs, {"runs", "joins"}),
    "device_get": (jax, {"runs", "joins"}),
}


@pytest.mark.parametrize("call", FAILURES)
def test_a_failure_ends_the_rows_that_it_is_about(make, requests, alone, breaks, call):
    where, lost = FAILURES[call]
    batch = make()
    streams = {"runs": batch.admit(**requests[1])}
    batch.step()
    if call == "resize":  # a voice that needs larger caches
        batch._state = caches.resize(batch._state, CacheSizes(300, 200))
    streams |= {"joins": batch.admit(**requests[0]), "waits": batch.admit(**requests[2])}
    breaks(where, call)
    run(batch)
    for (name, stream), index in zip(streams.items(), (1, 0, 2), strict=True):
        if name in lost:
            assert (stream.status, stream.finish_reason) == ("failed", "failed")
            with pytest.raises(Broken, match=call):
                stream.reply()
            with pytest.raises(Broken, match=call):
                stream.result()
        else:
            same(stream, alone[index])
    assert batch.num_free == 2
    again = batch.admit(**requests[1])
    run(batch)
    same(again, alone[1])


def test_the_real_length_of_a_question_counts(make, golden, requests, alone):
    length = len(golden.processor.question(requests[1]["question"]).ids)
    batch = make(question_positions=length + 4)  # its padding does not fit
    stream = batch.admit(**requests[1])
    run(batch)
    same(stream, alone[1])


def test_a_failure_of_the_first_row_leaves_the_others(make, requests, alone, breaks):
    batch = make()
    breaks(programs, "empty_like")
    first, second = batch.admit(**requests[0]), batch.admit(**requests[1])
    run(batch)
    assert first.status == "failed"
    same(second, alone[1])


def test_a_state_that_a_failure_took_along_is_made_anew(make, requests, alone, monkeypatch):
    batch = make()
    runs = batch.admit(**requests[1])
    batch.step()
    whole = programs.insert_rows

    def broken(state, rows, slots):
        monkeypatch.setattr(programs, "insert_rows", whole)
        jax.tree.map(lambda x: x.delete(), state)
        raise Broken

    monkeypatch.setattr(programs, "insert_rows", broken)
    joins, waits = batch.admit(**requests[0]), batch.admit(**requests[2])
    run(batch)
    assert (runs.status, joins.status) == ("failed", "failed")
    same(waits, alone[2])


def test_failures_about_given_words_and_kept_turns(make, requests, alone, breaks):
    batch = make()
    request = requests[1] | {"question": None, "say": "Hello.", "keep": True}
    runs = batch.admit(**requests[4])
    batch.step()
    breaks(programs, "force")
    joins, waits = batch.admit(**request), batch.admit(**request)
    batch.step()
    assert (runs.status, joins.status) == ("failed", "failed")
    breaks(programs, "extract_reasoner")
    beside = batch.admit(**requests[2])
    run(batch)
    assert waits.finish_reason == "length" and waits.kept() is None
    same(beside, alone[2])


def test_a_failed_ending_is_a_failure_of_those_who_go_on(make, requests, alone, breaks):
    batch = make()
    gone, stays = (batch.admit(**requests[i]) for i in (0, 2))
    batch.step()
    breaks(programs, "end_rows")
    batch.cancel(gone)
    run(batch)
    assert (gone.status, stays.status) == ("done", "failed")
    comes = batch.admit(**requests[1])
    run(batch)
    same(comes, alone[1])
    batch.cancel(stays)  # is nothing
    assert stays.finish_reason == "failed"


def test_a_mistake_about_one_row_ends_that_row(make, requests, alone, monkeypatch):
    batch = make()
    bad, good = (batch.admit(**requests[i]) for i in (0, 4))
    told = []
    bad._on_news = told.append
    monkeypatch.setattr(bad, "deliver", lambda *a: 1 / 0)
    run(batch)
    assert isinstance(bad.error, ZeroDivisionError)
    assert told == [bad]
    same(good, alone[4])


def test_a_question_that_cannot_be_taken_in_ends_alone(
    golden, make, requests, alone, voice, breaks
):
    for call in ("extend", "start"):
        batch = golden.batch(slots=2, question_positions=512, positions=512)
        runs = batch.admit(**requests[4])
        batch.step()
        listening = golden.listen(voice=voice, batch=batch)
        listening.push(voice.wave[:30000], 24000)
        stream = batch.admit_request(listening.request(max_seconds=0.3))
        breaks(programs, call)
        run(batch)
        assert isinstance(stream.error, Broken)
        same(runs, alone[4])


def test_a_listener_that_fails_harms_nobody(make, requests, alone):
    batch = make()
    heard = []

    def on_news(stream):
        heard.append(stream.finish_reason)
        raise Broken

    stream = batch.admit(**requests[1], on_news=on_news)
    run(batch)
    same(stream, alone[1])
    assert heard[-1] == "length" and len(heard) == 3


def test_the_caches_shrink_when_a_long_row_has_gone(golden, make, requests, alone, monkeypatch):
    monkeypatch.setattr(caches, "SHRINK_AFTER", 2)
    monkeypatch.setattr(caches, "_LOOK_EVERY", 1)
    batch = golden.batch(slots=2, question_positions=384)
    long, short = batch.admit(**requests[0]), batch.admit(**requests[4])
    batch.step()
    batch._state = caches.resize(batch._state, CacheSizes(384, 1024))  # as if it had been long
    batch.step()
    batch.cancel(long)
    sizes = []
    while batch.busy:
        batch.step()
        sizes.append(caches.sizes_of(batch._state).backbone if batch._state else None)
    assert 256 in sizes or 512 in sizes
    same(short, alone[4])
    assert sizes[-1] is not None
    batch.step()
    assert batch._state is None  # nobody is in


def test_cancelling_frees_the_slot_and_disturbs_nobody(make, requests, alone):
    batch = make()
    first, second, waiting, last = (batch.admit(**requests[i]) for i in (0, 2, 4, 1))
    batch.step()
    batch.step()
    batch.cancel(waiting)
    batch.cancel(first)
    batch.cancel(first)  # again is nothing
    run(batch)
    assert first.finish_reason == waiting.finish_reason == "cancelled"
    assert waiting.take() == []
    first.take()
    got = first.reply().frames
    assert 0 < len(got) < len(alone[0].frames)
    np.testing.assert_array_equal(got, alone[0].frames[: len(got)])
    same(second, alone[2])
    same(last, alone[1])


def test_what_does_not_fit_is_refused(make, golden, requests, voice):
    batch = make(queue=1)
    for request in requests[:3]:
        batch.admit(**request)
    with pytest.raises(BatchFull, match="0 streams run and 3 wait"):
        batch.admit(**requests[3])
    batch = make()
    with pytest.raises(ValueError, match="sample_text"):
        batch.admit(**(requests[0] | {"sampling": Sampling(text=TokenSampling(temperature=1.0))}))
    with pytest.raises(ValueError, match="the question takes"):
        batch.admit(Turn(text="word " * 100), voice=voice)
    with pytest.raises(ValueError, match="the voice takes"):
        batch.admit(
            Turn(text="hi"), voice=Voice((np.full(24000 * 30, 0.1, np.float32), 24000), "x")
        )
    with pytest.raises(ValueError, match="seed"):
        batch.admit(**(requests[0] | {"seed": -1}))
    with pytest.raises(ValueError, match="another batch"):
        make().cancel(batch.admit(**requests[0]))
    for bad in (dict(slots=0), dict(positions=4096), dict(max_pending=0), dict(queue=-1)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make(**bad)


@pytest.fixture
def compilations():
    """Counts the programs that XLA makes, whoever asks for them: the list grows by one with each."""
    made = []

    def heard(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            made.append(about.get("fun_name", seconds))

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield made
    jax.monitoring.unregister_event_duration_listener(heard)


@pytest.mark.slow
def test_nothing_is_compiled_after_warmup(golden, voice, requests, alone, compilations):
    chroma, other = Chroma(golden.model, golden.processor), requests[1]["voice"]
    spoken = (voice.wave[:9000], 24000)
    batch = chroma.batch(slots=3, question_positions=512, positions=512)
    assert batch.warmup(voice=[voice, other], question_seconds=0.5, max_seconds=6.0) > 0
    assert len(compilations) > 10
    compilations.clear()
    # A short voice first, in small caches; then a long one joins, then the first one's answer outgrows them.
    long = dict(voice=Voice((voice.wave[:39000], 24000), "and mr john daswood"), max_seconds=6.0)
    streams = [batch.admit(spoken, **long)]
    batch.step()
    small = batch._state.backbone.size
    streams += [batch.admit(**requests[i]) for i in (1, 2)]
    listening = chroma.listen(voice=other)
    listening.push(*spoken)
    batch.step()
    streams.append(batch.admit_request(listening.request(max_seconds=0.5)))
    cancelled = batch.admit(**requests[3])
    while streams[1].finish_reason == "running" or None not in batch._slots:
        batch.step()
    batch.cancel(cancelled)
    streams += [batch.admit(**requests[i]) for i in (0, 4)]
    while batch.busy:
        batch.step()
    assert compilations == []
    assert batch._state.backbone.size > small
    for stream, index in zip((*streams[1:3], *streams[4:]), (1, 2, 0, 4), strict=True):
        same(stream, alone[index])
    assert len(streams[0].take()) > 30
    with pytest.raises(ValueError, match="no spoken question fits"):
        golden.batch(slots=1, question_positions=64).warmup(voice=voice)


def test_a_batch_is_warmed_up_before_its_streams(make, requests, alone):
    batch = make()
    stream = batch.admit(**requests[1])
    with pytest.raises(ValueError, match="0 run and 1 wait"):
        batch.warmup(voice=requests[1]["voice"])
    run(batch)
    same(stream, alone[1])
    # Between streams it does no harm.
    batch.warmup(voice=requests[1]["voice"], question_seconds=0.2, max_seconds=0.5, listening=False)
    assert not batch.busy
    assert batch.num_free == 2
    stream = batch.admit(**requests[4])
    run(batch)
    same(stream, alone[4])


@pytest.mark.parametrize("limits", [(2048, 2048), (768, 600)], ids=["model's", "own"])
def test_all_sizes_that_a_batch_can_have_are_known(limits):
    """A crowd of random rows, as far as the caches' sizes go."""
    limits, most, slots = CacheSizes(*limits), 60, 3
    rng = np.random.default_rng(0)
    every = set()
    for _ in range(40):
        prompts = [tuple(rng.integers((20, 10), (400, 300))) for _ in range(4)]
        known = set(warmup.reachable(limits, prompts, most + 2 + caches.BEATS_AHEAD))
        room, left, sizes, seen = CacheLedger(limits, slots), np.zeros(slots, int), None, set()
        for _ in range(400):
            # As `RunningBatch`: one row joins, then a beat of all; the end of a row is known one beat late.
            if rng.random() < 0.1 and (left == 0).any():
                slot, prompt = int(np.argmin(left)), prompts[rng.integers(4)]
                left[slot] = rng.integers(1, most + 1) + 1
                alone = CacheLedger(limits, 1)
                alone.enter(0, *prompt)
                room.enter(slot, *prompt)
                sizes = room.sizes(present=sizes or alone.sizes())
                seen.add(sizes)
            if not left.any():
                continue
            sizes = room.sizes(1, sizes)
            seen.add(sizes)
            room._length += POSITIONS_PER_BEAT
            ended = left == 1
            left = np.maximum(left - 1, 0)
            for slot in np.flatnonzero(ended):
                room.leave(slot)
            if left.any() and rng.random() < 0.05:  # the caches have long been too large
                sizes = CacheSizes(*map(min, room.sizes(), sizes))
                seen.add(sizes)
        assert seen <= known
        every |= seen
    assert len(every) > 3
