"""Caches that grow with the reply change nothing that is said, and no row meets the end of one that can still grow."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from chroma_jax import Chroma, Sampling, Turn, Voice
from chroma_jax.engine import caches, programs
from chroma_jax.engine.caches import CacheLedger, CacheSizes, final_sizes, ladder
from chroma_jax.engine.voice import EncodedVoice
from chroma_jax.model.chroma import abstract_model

HOT = Sampling(temperature=1.0, top_k=20)


@pytest.fixture
def small_steps(monkeypatch):
    """Sizes 64, 128, 256, ..., so that short replies grow often."""
    monkeypatch.setattr(caches, "FIRST_SIZE", 64)
    monkeypatch.setattr(caches, "BEATS_AHEAD", 2)
    monkeypatch.setattr(caches.ladder, "__defaults__", (64,))
    monkeypatch.setattr(CacheLedger.sizes, "__defaults__", (2, None))


@pytest.fixture(scope="module")
def short_context(golden):
    """The golden weights with a Backbone of 128 positions."""
    config = golden.config
    llama = dataclasses.replace(config.backbone.llama, max_positions=128)
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, llama=llama))
    graphdef, _ = nnx.split(abstract_model(config))
    model = nnx.merge(graphdef, nnx.state(golden.model))
    processor = dataclasses.replace(golden.processor, config=config)
    return Chroma(model, processor), Chroma(model, processor, grow=False)


@pytest.fixture(scope="module")
def short_voice(voice):
    return Voice(
        (voice.wave[:40000], 24000), "and mister john"
    )  # 21 frames, 15 bytes: 38 positions


def same(a, b):
    np.testing.assert_array_equal(a.frames, b.frames)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.finish_reason == b.finish_reason
    np.testing.assert_allclose(a.audio, b.audio, rtol=0, atol=1e-5)


def test_growing_changes_nothing_and_ends_where_the_context_does(
    small_steps, short_context, short_voice, monkeypatch
):
    growing, whole = short_context
    sizes = []
    monkeypatch.setattr(
        caches, "resize", lambda s, to, resize=caches.resize: sizes.append(to) or resize(s, to)
    )
    request = dict(voice=short_voice, sampling=Sampling(temperature=1.0, top_k=20), seed=3)
    want = whole.reply(Turn(text="Why?"), **request)
    assert want.finish_reason == "context"
    assert len(want.frames) == 2 * ((128 - 38) // 4)
    assert sizes == []
    same(growing.reply(Turn(text="Why?"), **request), want)
    with growing.stream(Turn(text="Why?"), **request) as stream:
        for _ in stream:
            pass
    same(stream.reply(), want)
    assert [s.backbone for s in sizes] == [128, 128]


@pytest.mark.parametrize(
    "transcript",
    ["and mister joh", "and mister john", "and mister john,", "and mister john d"],
    ids=len,
)
def test_every_remainder_of_the_context_is_used_as_far_as_beats_go(
    short_context, voice, transcript
):
    """From 3 positions left to none: a beat that does not fit whole is not begun."""
    voice = Voice((voice.wave[:40000], 24000), transcript)  # 21 frames
    positions = 21 + len(transcript) + 2
    reply = short_context[1].reply(Turn(text="Why?"), voice=voice, sampling=HOT, seed=3)
    assert reply.finish_reason == "context"
    assert len(reply.frames) == 2 * ((128 - positions) // 4)


@pytest.mark.slow
def test_a_running_batch_grows_with_its_longest_stream(small_steps, short_context, short_voice):
    growing, whole = short_context
    requests = [
        (Turn(text="Why?"), dict(voice=short_voice, seed=1)),
        (Turn(text="Good night."), dict(voice=short_voice, max_seconds=1.0, seed=2)),
        (Turn(text="And you?"), dict(voice=short_voice, max_seconds=1.0, seed=3)),
    ]
    batch = growing.batch(slots=2, question_positions=512)
    streams = [batch.admit(question, **request) for question, request in requests]
    sizes = set()
    while batch.busy:
        batch.step()
        sizes.add(batch._state.backbone.size)
    assert sizes == {64, 128}
    for stream, (question, request) in zip(streams, requests, strict=True):
        stream.take()
        same(stream.reply(), whole.reply(question, **request))


@pytest.mark.parametrize("seed", range(5))
def test_no_row_meets_the_end_of_a_cache_that_can_grow(seed, monkeypatch):
    """Rows come, lose their text, are held and leave; the true lengths are counted beside."""
    rng = np.random.default_rng(seed)
    rows = 4
    limits = CacheSizes(1500, 2048)
    room = CacheLedger(limits, rows)
    monkeypatch.setattr(caches, "resize", lambda state, sizes: state_of(sizes))

    def state_of(sizes):
        return SimpleNamespace(
            reasoner=SimpleNamespace(size=sizes.reasoner),
            backbone=SimpleNamespace(size=sizes.backbone),
        )

    state, rest = state_of(CacheSizes(0, 0)), np.zeros((rows, 2), int)
    text, used = np.zeros(rows, bool), np.zeros(rows, bool)
    for _ in range(600):
        for row in range(rows):
            if not used[row] and rng.random() < 0.1:
                rest[row] = rng.integers(30, 700), rng.integers(40, 400)
                used[row] = text[row] = True
                room.enter(row, *rest[row])
            elif used[row] and rng.random() < 0.01:
                used[row] = False
                room.leave(row)
        state = room.make(state)
        sizes = (state.reasoner.size, state.backbone.size)
        for row in np.flatnonzero(used):
            need = rest[row] + [text[row], 4 if text[row] else 2]
            assert (need <= np.minimum(sizes, limits)).all() or (need > limits).any()
            if (need > limits).any():  # the row ends
                used[row] = False
                room.leave(row)
            elif rng.random() < 0.1:
                room.unused(row)
            else:
                rest[row] = need
                if not text[row]:
                    room.without_text(row)
                text[row] &= rng.random() > 0.02


def test_sizes_are_few(golden):
    assert ladder(2048) == (256, 512, 1024, 2048)
    assert ladder(384) == (256, 384)
    limits = final_sizes(golden.config, 100, 150, max_frames=960)
    assert limits == (1024, 2048)
    room = CacheLedger(limits, 1)
    room.enter(0, 100, 150)
    assert list(room.path()) == [(256, 256), (256, 512), (512, 1024), (1024, 2048)]
    whole = CacheLedger(limits, 1, grow=False)
    assert list(whole.path()) == [limits]


def test_a_voice_is_heard_once(golden, voice, short_voice, monkeypatch):
    request = dict(max_seconds=0.16)
    want = golden.reply(Turn(text="Hi."), voice=voice, **request)
    chroma = Chroma(golden.model, golden.processor)
    heard = []
    hear = programs.prefill_voice
    monkeypatch.setattr(programs, "prefill_voice", lambda *a: heard.append(0) or hear(*a))
    again = Voice((voice.wave.copy(), 24000), voice.text)
    for v in (voice, short_voice, again, short_voice):
        reply = chroma.reply(Turn(text="Hi."), voice=v, **request)
        if v is not short_voice:
            same(reply, want)
    assert len(heard) == 2
    other = Voice((voice.wave, 24000), voice.text + "!")
    chroma.reply(Turn(text="Hi."), voice=other, **request)
    assert len(heard) == 3
    chroma.engine.voices._most = 2  # the one used for longest not is let go
    chroma.prefill_voice(voice)
    chroma.prefill_voice(Voice((voice.wave[:30000], 24000), "and"))
    assert len(chroma.engine.voices) == 2
    chroma.prefill_voice(voice)
    assert len(heard) == 4
    chroma.prefill_voice(short_voice)
    assert len(heard) == 5


def test_a_voice_is_heard_while_its_codes_are_on_their_way(golden, short_voice, tmp_path):
    fresh = Voice((short_voice.wave, 24000), short_voice.text)
    chroma, other = (Chroma(golden.model, golden.processor) for _ in range(2))
    request = dict(max_seconds=0.16)
    got = chroma.reply(Turn(text="Hi."), voice=fresh, **request)
    assert isinstance(fresh._codes[chroma.engine.codec_id], EncodedVoice)
    fresh.save(tmp_path / "voice.npz")
    loaded = Voice.load(tmp_path / "voice.npz")
    codes = programs.encode_voice(golden.model, fresh.wave)
    for voice in (fresh, loaded):
        np.testing.assert_array_equal(voice.codes(chroma.engine.codec_id), codes)
        np.testing.assert_array_equal(chroma.encode_voice(voice), codes)
    same(got, other.reply(Turn(text="Hi."), voice=loaded, **request))
