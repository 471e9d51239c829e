"""A question heard while it is spoken gives the reply to the whole recording, however it is cut and wherever it is loudest."""

import numpy as np
import pytest

from chroma_jax import Turn
from chroma_jax.engine import programs
from chroma_jax.engine.caches import CacheSizes
from chroma_jax.generation import listening as module

SHORT = dict(max_seconds=0.3)


def same(a, b):
    np.testing.assert_array_equal(a.frames, b.frames)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
    np.testing.assert_allclose(a.audio, b.audio, rtol=0, atol=1e-5)


def pieces(wave, split):
    if split == "whole":
        return [wave]
    if split == "packets":
        return np.array_split(wave, len(wave) // 960 + 1)
    rng = np.random.default_rng(int(split))
    return np.split(wave, np.sort(rng.integers(0, len(wave), 9)))


def check(chroma, voice, wave, rate, split="3", turns=(), **listen):
    """Hears the wave in pieces: hidden states and reply must be those of the whole. Returns the listening."""
    question = [*turns, Turn(audio=(wave, rate), text=listen.get("text"))]
    around = dict(voice=voice, system_prompt=listen.get("system_prompt"))
    request = chroma.request(question, **around)
    want = request.begin(chroma.model, CacheSizes(1024, 512)).hidden
    heard = []
    for answer in (
        lambda heard: heard.request().question.hidden,
        lambda heard: heard.reply(**SHORT),
    ):
        listening = chroma.listen(voice=voice, history=list(turns), **listen)
        for piece in pieces(wave, split):
            listening.push(piece, rate)
        heard.append(answer(listening))
    np.testing.assert_allclose(heard[0], want, rtol=0, atol=2e-5 * np.abs(want).max())
    same(heard[1], chroma.reply(question, **around, **SHORT))
    return listening


@pytest.fixture(scope="module")
def speech(voice):
    """Six seconds at 24 kHz."""
    return voice.wave[: 24000 * 6]


@pytest.mark.parametrize("split", ["whole", "packets", "1"])
def test_any_split_gives_the_reply_to_the_whole(golden, voice, speech, split):
    check(golden, voice, speech, 24000, split)


def loud_late(speech):
    """Digital silence, then quiet speech, and the loudest moment at the end, beyond the last whole chunk."""
    return speech[: 24000 * 5] * np.linspace(0.001, 1, 24000 * 5, dtype=np.float32) ** 3


@pytest.mark.parametrize(
    ("make", "seconds_anew"),
    [
        (lambda x: loud_late(x), 5),
        (lambda x: np.concatenate([np.zeros(24000 * 2, np.float32), x[: 24000 * 3]]), 5),
        (lambda x: np.zeros(24000 * 3, np.float32), 0),
        (lambda x: x[: 24000 * 4], None),
        (lambda x: x[: 24000 * 1], 0),
    ],
    ids=["loud late", "silence first", "silence only", "two chunks and nothing", "no whole chunk"],
)
def test_loudness_and_length(golden, voice, speech, make, seconds_anew):
    listening = check(golden, voice, make(speech), 24000, "packets")
    if seconds_anew is not None:  # the case is what it says
        assert (listening._heard_anew_at > 0) == (seconds_anew > 0)


def test_history_text_and_other_rates(golden, voice, speech):
    turns = (
        Turn(audio=(speech[:40000], 24000)),
        Turn(role="assistant", text="Yes?"),
    )
    stereo = np.stack([speech[: 24000 * 3], 0 * speech[: 24000 * 3]], axis=1)
    check(golden, voice, (stereo * 30000).astype(np.int16), 44100, turns=turns, text="And why?")
    check(golden, voice, speech[:40000], 16000, system_prompt="")


def test_a_long_recording_at_once_goes_in_many_chunks_at_a_time(golden, voice, speech, monkeypatch):
    calls = []
    monkeypatch.setattr(
        module.programs, "extend", lambda *a, hear=programs.extend: calls.append(a[5]) or hear(*a)
    )
    check(golden, voice, np.concatenate([speech] * 3), 24000, "whole")
    assert [None if c is None else c.shape[1] for c in calls] == [None, 8, 1] * 2


def test_a_second_listening_compiles_nothing(golden, voice, speech):
    check(golden, voice, speech, 24000)
    compiled = programs.extend._cache_size()
    check(golden, voice, speech[: 24000 * 5], 24000, "5")
    assert programs.extend._cache_size() == compiled


def test_a_running_batch_answers(golden, voice, speech):
    want = golden.reply((speech, 24000), voice=voice, **SHORT)
    batch = golden.batch(slots=2, question_positions=512, positions=512)
    listening = golden.listen(voice=voice)
    for piece in pieces(speech, "4"):
        listening.push(piece, 24000)
    stream = batch.admit_request(listening.request(**SHORT))
    while batch.busy:
        batch.step()
    stream.take()
    same(stream.reply(), want)


def test_stream_and_cancel(golden, voice, speech):
    with golden.listen(voice=voice) as listening:
        listening.push(speech, 24000)
        assert listening.seconds == pytest.approx(6, abs=0.1)
        stream = listening.stream(max_seconds=1)
        first = next(stream)
        stream.close()
    assert stream.finish_reason == "cancelled"
    np.testing.assert_array_equal(
        first.frames, golden.reply((speech, 24000), voice=voice, **SHORT).frames[:2]
    )
    for call in (lambda: listening.push(speech), listening.reply, listening.stream):
        with pytest.raises(ValueError, match="answered or closed"):
            call()
    closed = golden.listen(voice=voice)
    closed.close()
    with pytest.raises(ValueError, match="answered or closed"):
        closed.reply()


def test_a_refused_push_changes_nothing(golden, voice, speech):
    """Also where the resampler would have taken it in before its length was known."""
    wave, rate = speech[: 24000 * 3], 44100
    want = golden.reply((wave, rate), voice=voice, **SHORT)
    listening = golden.listen(voice=voice)
    listening.push(wave[:50000], rate)
    seconds = listening.seconds
    for bad, at, message in (
        (np.zeros(rate * 170, np.float32), rate, "too long"),
        (np.full(1000, np.nan), rate, "NaN"),
        (wave[:1000], 16000, "the rate was"),
    ):
        with pytest.raises(ValueError, match=message):
            listening.push(bad, at)
        assert listening.seconds == seconds
    listening.push(wave[50000:], rate)
    same(listening.reply(**SHORT), want)


def test_what_is_wrong_is_named(golden, voice, speech):
    listening = golden.listen(voice=voice)
    for samples, rate, message in (
        ([np.nan], 16000, "NaN"),
        ([500.0], 16000, "full scale"),
        ([0.1], 3, "sampling rate"),
        (["a"], 16000, "floats"),
        (np.zeros((2, 2, 2)), 16000, "N, C"),
    ):
        with pytest.raises(ValueError, match=message):
            listening.push(samples, rate)
    listening.push(np.zeros(0), 16000)
    with pytest.raises(ValueError, match="max_seconds"):
        listening.reply(max_seconds=-1)
    with pytest.raises(ValueError, match="seed"):
        listening.reply(seed=-1)
    with pytest.raises(ValueError, match="no samples"):
        listening.reply()
    short = golden.listen(voice=voice)
    short.push([0.1] * 100)
    with pytest.raises(ValueError, match="the rate was 16000 Hz"):
        short.push([0.1], 8000)
    with pytest.raises(ValueError, match=r"0\.006 s is too short"):
        short.reply()
    long = golden.listen(voice=voice)
    with pytest.raises(ValueError, match="spoken question too long"):
        long.push(np.zeros(16000 * 170, np.int16))
    with pytest.raises(ValueError, match="voice must be a Voice"):
        golden.listen(voice=None)
    with pytest.raises(ValueError, match="history must be a list"):
        golden.listen(voice=voice, history="before.wav")
    with pytest.raises(ValueError, match="turn 0: role"):
        golden.listen(voice=voice, history=[Turn(role="nobody", text="x")])
