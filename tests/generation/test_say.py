"""What is given to be said is said, whole or while it is being written, exactly as if the Reasoner had chosen it."""

import numpy as np
import pytest

from chroma_jax import Sampling, Turn
from chroma_jax.engine.script import Script

TEXT = "Good morning, Mr. Dashwood. How do you do?"
HOT = dict(max_seconds=1.5, sampling=Sampling(temperature=0.9, top_k=40), seed=3)


def same(a, b):
    np.testing.assert_array_equal(a.frames, b.frames)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
    np.testing.assert_allclose(a.audio, b.audio, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def whole(golden, voice):
    return golden.say(TEXT, voice=voice, max_seconds=8, seed=3)


def test_the_words_are_said_to_their_end(golden, whole):
    tokens = golden.processor.tokenizer.encode(TEXT)
    np.testing.assert_array_equal(whole.tokens, [*tokens, golden.config.im_end_token_id])
    assert whole.text == TEXT
    assert whole.finish_reason == "length"
    assert len(whole.frames) == 100 > 2 * len(whole.tokens)


def pieces(text, seed):
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(text) + 1, 9))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_pieces_are_asked_for_as_the_speech_comes_to_them(golden, voice, whole):
    asked = []

    def written():
        for piece in pieces(TEXT, 0):
            asked.append(piece)
            yield piece

    heard = 0
    with golden.say(written(), voice=voice, max_seconds=8, seed=3) as stream:
        for chunk in stream:
            heard += len(chunk.text)
            # Never more than the word that is spoken, the next one, and what decides that it is over.
            assert len("".join(asked[:-1])) <= heard + 12
    same(stream.reply(), whole)


def test_the_seed_and_the_sampling_are_those_of_a_reply(golden, voice):
    hot = golden.say(TEXT, voice=voice, **HOT)
    same(golden.say(TEXT, voice=voice, **HOT), hot)
    other = golden.say(TEXT, voice=voice, **(HOT | {"seed": 4}))
    assert (other.frames != hot.frames).any()
    np.testing.assert_array_equal(other.tokens, hot.tokens)
    asked = golden.say(TEXT, voice=voice, question=Turn(text="Who are you?"), **HOT)
    assert (asked.frames != hot.frames).any()


def test_words_of_the_reasoners_own_choice_give_its_own_reply(golden, voice, monkeypatch):
    """The reply's tokens are forced as they are: text of random weights does not survive being written."""
    question = Turn(text="What time is it?")
    reply = golden.reply(question, voice=voice, **HOT)

    class Tokens(Script):
        def tokens(self, tokenizer, end):
            given, self._read = [] if self._read else reply.tokens.tolist(), True
            return given

    script = Tokens("some words")
    request = golden.engine.request(
        question, voice, HOT["max_seconds"], HOT["sampling"], HOT["seed"], say=script
    )
    same(golden.answer(request), reply)


def test_a_running_batch_says_and_answers_beside_each_other(golden, voice, whole):
    batch = golden.batch(slots=2, question_positions=384, positions=512)
    script = Script()
    written = batch.admit(say=script, voice=voice, max_seconds=8, seed=3)
    answering = batch.admit(Turn(text="What time is it?"), voice=voice, **HOT)
    waited = 0
    for piece in pieces(TEXT, 1):
        for _ in range(4):
            batch.step()
            waited += written.status == "paused"
        script.write(piece)
    script.close()
    while batch.busy:
        batch.step()
        written.take()
    assert waited > 0
    same(written.reply(), whole)
    answering.take()
    same(answering.reply(), golden.reply(Turn(text="What time is it?"), voice=voice, **HOT))


def test_what_cannot_be_said_is_named(golden, voice):
    for text, message in (
        ("  ", "nothing to say"),
        ("word " * 500, "too much to say: 2501 tokens"),
        (5, "text or pieces"),
        (None, "text or pieces"),
    ):
        with pytest.raises(ValueError, match=message):
            golden.say(text, voice=voice)
    with pytest.raises(ValueError, match="voice must be a Voice"):
        golden.say("Hello.", voice=None)
    with pytest.raises(ValueError, match="neither a question nor"):
        golden.engine.request(None, voice)
    with pytest.raises(ValueError, match="text or a Script"):
        golden.engine.request(None, voice, say=["Hello."])


@pytest.mark.parametrize("failing", ["raises", "gives no text"])
def test_a_writer_that_fails_ends_the_stream(golden, voice, failing):
    def written():
        yield "Good morning, "
        if failing == "raises":
            raise RuntimeError("the other model is gone")
        yield b"bytes"

    stream = golden.say(written(), voice=voice, max_seconds=8)
    with pytest.raises((RuntimeError, ValueError), match="the other model|must be text"):
        list(stream)
    assert stream.finish_reason == "failed"
    with pytest.raises((RuntimeError, ValueError)):
        stream.reply()
    with pytest.raises((RuntimeError, ValueError)):
        next(stream)
