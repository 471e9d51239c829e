"""A turn that is kept is not taken in again, and long questions go in by pieces: the replies are the same."""

import numpy as np
import pytest

from chroma_jax import Sampling, Turn
from chroma_jax.audio.prompt import Question
from chroma_jax.engine import prefill, programs

HOT = dict(max_seconds=0.5, sampling=Sampling(temperature=0.9, top_k=40), seed=3)
SAID = "I am well, thank you."


def same(a, b):
    np.testing.assert_array_equal(a.frames, b.frames)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
    np.testing.assert_allclose(a.audio, b.audio, rtol=0, atol=1e-5)


@pytest.fixture
def taken_in(monkeypatch):
    """The tokens of each piece that is taken in from now on."""
    counts = []
    whole = programs.extend
    monkeypatch.setattr(
        programs, "extend", lambda *a: counts.append([int(n) for n in a[4]]) or whole(*a)
    )
    return counts


@pytest.fixture(scope="module")
def spoken(voice):
    return Turn(audio=(voice.wave[: 24000 * 3], 24000))


@pytest.fixture(scope="module")
def kept(golden, voice, spoken):
    """A spoken question and what was said to it."""
    batch = golden.batch(slots=2, question_positions=512, positions=512)
    request = dict(voice=voice, say=SAID, max_seconds=4, keep=True)
    over, stopped = batch.admit(spoken, **request), batch.admit(spoken, **request)
    assert over.kept() is None
    for _ in range(8):
        batch.step()
    batch.cancel(stopped)
    while batch.busy:
        batch.step()
    assert over.finish_reason == "length"
    return over.kept(), stopped.kept()


def test_what_is_kept_is_the_question_and_what_was_said(golden, spoken, kept):
    whole, stopped = kept
    asked = golden.processor.question(spoken)
    tokens = golden.processor.tokenizer.encode(SAID)
    np.testing.assert_array_equal(whole.ids, [*asked.ids, *tokens])
    assert whole.spoken == len(tokens)
    assert 4 < stopped.spoken < len(tokens)
    np.testing.assert_array_equal(stopped.ids, whole.ids[: len(stopped.ids)])
    cut = whole.truncated(3)
    assert (cut.spoken, len(cut.ids)) == (3, len(asked.ids) + 3)
    assert whole.truncated(100).spoken == len(tokens)
    assert whole.truncated(0).spoken == whole.truncated(-1).spoken == 0


@pytest.mark.parametrize("which", ["whole", "truncated", "stopped"])
def test_the_next_turn_goes_on_from_it(golden, voice, spoken, kept, taken_in, which):
    turn = {"whole": kept[0], "truncated": kept[0].truncated(4), "stopped": kept[1]}[which]
    heard = golden.processor.tokenizer.decode(turn.ids[len(turn.ids) - turn.spoken :])
    turns = [spoken, Turn(role="assistant", text=heard), Turn(text="And now?")]
    want = golden.reply(turns, voice=voice, **HOT)
    assert taken_in == []
    for _ in range(2):  # what is kept is not used up
        same(golden.answer(golden.engine.request(turns, voice, after=turn, **HOT)), want)
    length = len(golden.processor.question(turns).ids)
    assert taken_in == [[length - len(turn.ids)]] * 2
    # Spoken turns go on from it, too.
    del taken_in[:]
    listening = golden.listen(voice=voice, history=turns[:2], after=turn)
    assert sum(map(sum, taken_in)) < 40 < len(turn.ids)
    listening.push(voice.wave[:20000], 24000)
    turns[2] = Turn(audio=(voice.wave[:20000], 24000))
    same(listening.reply(**HOT), golden.reply(turns, voice=voice, **HOT))


def test_only_what_is_the_same_is_used(golden, spoken, voice, kept):
    turn, config = kept[0], golden.config
    question = golden.processor.question
    assert turn.reusable(config, question(spoken)) == len(question(spoken).ids) - 1
    other = Turn(audio=(voice.wave[24000 : 24000 * 4], 24000))  # as long, but another sound
    begins = int(np.flatnonzero(turn.ids == config.reasoner.audio_token_id)[0])
    assert turn.reusable(config, question(other)) == begins
    longer = Turn(audio=(voice.wave[: 24000 * 4], 24000))
    assert turn.reusable(config, question(longer)) == begins
    assert turn.reusable(config, question(spoken, system_prompt="Be brief.")) < begins
    assert turn.truncated(2).reusable(config, question([spoken, Turn(role="assistant", text=SAID), Turn(text="x")])) == len(turn.truncated(2).ids)  # fmt: skip


def test_pieces_are_whole_chunks_and_all_of_the_question(golden):
    reasoner = golden.config.reasoner
    audio, rng = reasoner.audio, np.random.default_rng(0)
    for _ in range(20):
        ids, mels = [np.arange(rng.integers(1, 600)) % 50], []
        for _ in range(rng.integers(0, 3)):
            frames = int(rng.integers(10, 20 * audio.chunk_frames))
            mels.append(rng.standard_normal((frames, audio.num_mel_bins)).astype(np.float32))
            ids += [np.full(audio.num_features(frames), reasoner.audio_token_id), np.arange(7)]
        question = Question(np.concatenate(ids).astype(np.int32), mels)
        pieces = list(prefill._cut(golden.config, question, 0))
        np.testing.assert_array_equal(np.concatenate([p for p, _ in pieces]), question.ids)
        lengths = [n for _, sound in pieces if sound is not None for n in sound[1]]
        assert sum(lengths) == sum(map(len, mels))
        for tokens, sound in pieces:
            chunks = 0 if sound is None else len(sound[1])
            assert chunks <= prefill.CHUNKS_PER_PIECE
            places = int((tokens == reasoner.audio_token_id).sum())
            assert places == sum(audio.num_features(n) for n in (() if sound is None else sound[1]))


@pytest.mark.slow
def test_a_long_question_does_not_stop_the_others(golden, voice, taken_in):
    wave = np.concatenate([voice.wave] * 4)[: 24000 * 21]
    question = Turn(audio=(wave, 24000))
    want = golden.reply(question, voice=voice, **HOT)
    short = golden.reply(Turn(text="Hello!"), voice=voice, **HOT)
    batch = golden.batch(slots=2, question_positions=1024, positions=512)
    long, quick = batch.admit(question, voice=voice, **HOT), batch.admit(Turn(text="Hello!"), voice=voice, **HOT)  # fmt: skip
    assert long.status == "prefilling"
    batch.step()
    assert (long.num_pending, quick.num_pending) == (0, 1)
    while batch.busy:
        batch.step()
    assert len(taken_in) == 2
    for stream, reply in ((long, want), (quick, short)):
        stream.take()
        same(stream.reply(), reply)


def test_a_question_that_nobody_waits_for_is_not_taken_in(golden, voice, taken_in):
    batch = golden.batch(slots=1, question_positions=1024, positions=512)
    wave = np.concatenate([voice.wave] * 4)[: 24000 * 21]
    gone = batch.admit(Turn(audio=(wave, 24000)), voice=voice, **HOT)
    batch.cancel(gone)
    assert not batch.busy
    batch.step()
    with golden.listen(voice=voice, batch=batch) as listening:
        listening.push(wave, 24000)
    batch.step()
    assert not batch.busy and taken_in == []


def test_questions_of_one_shape_are_taken_in_together(golden, voice, monkeypatch):
    """Two prompts, and two questions that are being spoken."""
    calls = []
    for name, rows in (("prefill", lambda a: len(a[1].ids)), ("extend", lambda a: len(a[1]))):
        whole = getattr(programs, name)
        monkeypatch.setattr(
            programs, name, lambda *a, n=name, r=rows, f=whole, **k: calls.append((n, r(a))) or f(*a, **k)
        )  # fmt: skip
    questions = [Turn(text="What time is it?"), Turn(text="Good night.")]  # of one padded size
    want = [golden.reply(q, voice=voice, **HOT) for q in questions]
    del calls[:]
    batch = golden.batch(slots=4, question_positions=512, positions=512, together=2)
    streams = [batch.admit(q, voice=voice, **HOT) for q in questions]
    waves = [voice.wave[:26000], voice.wave[30000:56000]]
    heard = [golden.listen(voice=voice, batch=batch) for _ in waves]
    for listening, wave in zip(heard, waves, strict=True):
        listening.push(wave, 24000)
    streams += [batch.admit_request(listening.request(**HOT)) for listening in heard]
    while batch.busy:
        batch.step()
    assert ("prefill", 2) in calls and ("prefill", 1) not in calls
    assert {rows for name, rows in calls if name == "extend"} == {2}
    want += [golden.reply((wave, 24000), voice=voice, **HOT) for wave in waves]
    for stream, reply in zip(streams, want, strict=True):
        stream.take()
        same(stream.reply(), reply)
