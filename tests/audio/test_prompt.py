"""The processor: questions, voices, and their limits."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from chroma_jax.audio import prompt
from chroma_jax.audio.chat import Turn
from chroma_jax.audio.mel import MelConfig, log_mel
from chroma_jax.audio.prompt import (
    DEFAULT_SYSTEM_PROMPT,
    Processor,
    check_question_length,
    check_voice_length,
)
from chroma_jax.audio.tokenizer import tiny_tokenizer
from chroma_jax.audio.wav import AudioError, load_audio
from chroma_jax.config import chroma_4b, tiny

DATA = Path(__file__).parents[1] / "data"
VOICE = DATA / "voice_librivox_0920.wav"
CONFIG = tiny()
AUDIO = CONFIG.reasoner.audio_token_id


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(CONFIG, DATA / "chroma-tiny")


def noise(seconds: float, rate: int = 16000) -> tuple[np.ndarray, int]:
    return 0.1 * np.random.default_rng(0).standard_normal(int(seconds * rate)).astype(
        np.float32
    ), rate


def test_spoken_question(processor):
    question = processor.question(VOICE)
    mel = log_mel(load_audio(VOICE, 16000))
    assert len(question.mels) == 1
    np.testing.assert_array_equal(question.mels[0], mel)
    assert question.ids.dtype == np.int32
    count = CONFIG.reasoner.audio.num_features(len(mel))
    assert count > 100
    where = np.flatnonzero(question.ids == AUDIO)
    assert where.tolist() == list(range(where[0], where[0] + count))
    assert question.ids[where[0] - 1] == CONFIG.reasoner.audio_start_token_id
    assert question.ids[where[-1] + 1] == CONFIG.reasoner.audio_end_token_id
    text = processor.tokenizer.decode(question.ids)
    assert text == f"system\n{DEFAULT_SYSTEM_PROMPT}\nuser\n\nassistant\n"


def test_every_rate_gives_the_same_count(processor):
    counts = {len(processor.question(noise(1.0, rate)).ids) for rate in (8000, 16000, 44100, 48000)}
    assert len(counts) == 1


def test_several_turns(processor):
    a, b = noise(1.0), noise(2.5)
    turns = [
        Turn(audio=a),
        Turn(role="assistant", text="yes"),
        Turn(audio=b, text="and this?"),
        Turn(text="bye"),
    ]
    question = processor.question(turns, system_prompt="Be brief.")
    assert [len(mel) for mel in question.mels] == [100, 250]
    inside = (question.ids == AUDIO).astype(int)
    starts, ends = np.flatnonzero(np.diff(inside) == 1), np.flatnonzero(np.diff(inside) == -1)
    assert (ends - starts).tolist() == [25, 62]
    text = processor.tokenizer.decode(question.ids)
    assert (
        text == "system\nBe brief.\nuser\n\nassistant\nyes\nuser\nand this?\nuser\nbye\nassistant\n"
    )


def test_text_question_and_system_prompts(processor):
    question = processor.question([Turn(text="hi")], system_prompt="")
    assert question.mels == []
    assert processor.tokenizer.decode(question.ids) == "user\nhi\nassistant\n"
    own = [Turn(role="system", text="Mine."), Turn(text="hi")]
    assert (
        processor.tokenizer.decode(processor.question(own).ids)
        == "system\nMine.\nuser\nhi\nassistant\n"
    )


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("missing.wav", r"^missing\.wav: no such file$"),
        (noise(0.02), r"^audio of turn 0: 0\.020 s is too short to be heard$"),
        ((np.zeros(0, np.float32), 16000), "^audio of turn 0: has no samples$"),
        ([Turn(text="a"), Turn(audio=(np.array([np.nan]), 16000))], "^audio of turn 1: has NaN"),
        ((np.zeros(301 * 16000, np.int16), 16000), r"^audio of turn 0: 301\.0 s long, the longest"),
        (np.zeros(16000, np.float32), "^audio of turn 0 must be a path, .* got ndarray"),
    ],
)
def test_bad_sound(processor, turns, message):
    with pytest.raises(AudioError, match=message):
        processor.question(turns)


def test_shortest_question_that_is_heard(processor):
    assert (processor.question((noise(1)[0][: 2 * 160 + 1], 16000)).ids == AUDIO).sum() == 1
    with pytest.raises(AudioError, match="too short"):
        processor.question((noise(1)[0][: 2 * 160], 16000))


def test_question_too_long(processor):
    limit = CONFIG.reasoner.text.max_positions - 1
    header = len(processor.question([Turn(text="x")], system_prompt="").ids) - 1
    assert (
        len(processor.question([Turn(text="x" * (limit - header))], system_prompt="").ids) == limit
    )
    with pytest.raises(
        ValueError, match=f"question too long: {limit + 1} tokens .* at most {limit} fit"
    ):
        processor.question([Turn(text="x" * (limit - header + 1))], system_prompt="")
    with pytest.raises(ValueError, match="question too long"):
        processor.question([Turn(audio=noise(170.0))])


def test_voice(processor):
    voice = processor.voice_arrays(VOICE, "had he married")
    assert voice.ids.tolist() == list(b"had he married")
    assert voice.ids.dtype == np.int32
    np.testing.assert_array_equal(voice.wave, load_audio(VOICE, 24000))
    assert voice.wave.dtype == np.float32


def test_transcript_is_text_only(processor):
    voice = processor.voice_arrays(VOICE, "<|im_end|>\n")
    assert voice.ids.tolist() == list(b"<|im_end|>\n")


@pytest.mark.parametrize(
    ("audio", "transcript", "message"),
    [
        (VOICE, None, "a voice needs its transcript, .* got None"),
        (VOICE, "", "a voice needs its transcript"),
        (VOICE, " \n", "a voice needs its transcript"),
        (VOICE, 5, "a voice needs its transcript, .* got 5"),
        (None, "hello", "a voice needs its sound as well as its transcript"),
        ("missing.wav", "hello", r"^missing\.wav: no such file$"),
        (noise(0.05), "hello", r"^voice: 0\.050 s is too short for a voice, one frame is 0\.08 s$"),
        ((np.full(24000, np.nan), 24000), "hello", "^voice: has NaN or infinite samples$"),
        (
            noise(170.0),
            "hello",
            r"^voice: voice longer than the context allows: 170\.0 s .* 162\.9 s would fit$",
        ),
        (noise(1.0), "x" * 2100, r"1\.0 s of sound and 2100 transcript tokens, 0\.0 s would fit"),
    ],
)
def test_bad_voices(processor, audio, transcript, message):
    with pytest.raises(ValueError, match=message):
        processor.voice_arrays(audio, transcript)


def test_silent_voice_is_a_warning(processor, monkeypatch):
    said = []
    monkeypatch.setattr(
        prompt.logging, "warning", lambda message, *args: said.append(message % args)
    )
    processor.voice_arrays((np.zeros(24000, np.float32), 24000), "hush")
    assert said == ["voice: the voice is silent"]
    processor.voice_arrays(VOICE, "loud")
    assert len(said) == 1


def test_voice_limit_is_exact():
    # 2048 positions: 10 transcript tokens, text_start, text_end, the zero vector and the first beat leave 2031 frames.
    check_voice_length(CONFIG, 10, 2031 * 1920)
    with pytest.raises(AudioError, match=r"162\.5 s would fit"):
        check_voice_length(CONFIG, 10, 2031 * 1920 + 1)


def test_question_limit_is_exact():
    check_question_length(CONFIG, 4095)
    with pytest.raises(ValueError, match="row 3 too long: 4096 tokens"):
        check_question_length(CONFIG, 4096, name="row 3")


def test_load_without_tokenizer(tmp_path):
    assert Processor.load(CONFIG).tokenizer.name == "byte tokenizer"
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer"):
        Processor.load(chroma_4b(), tmp_path)
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        Processor.load(chroma_4b())
    assert (
        Processor(config=chroma_4b(), tokenizer=tiny_tokenizer(chroma_4b()))
        .question(VOICE)
        .ids.max()
        == 151648
    )


def test_preprocessor_settings_are_used(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"chunk_length": 1}))
    processor = Processor.load(CONFIG, tmp_path)
    assert processor.mel == MelConfig(max_seconds=1)
    with pytest.raises(AudioError, match="the longest the model hears is 1 s"):
        processor.question(VOICE)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80}))
    with pytest.raises(
        ValueError, match="the preprocessor makes 80 mel bins, the model's num_mel_bins is 128"
    ):
        Processor.load(CONFIG, tmp_path)


def test_foreign_tokenizer_is_refused():
    other = dataclasses.replace(CONFIG, im_end_token_id=400)
    with pytest.raises(
        ValueError, match=r"<\|im_end\|> is token 400, but im_end_token_id of the model is 511"
    ):
        Processor(config=CONFIG, tokenizer=tiny_tokenizer(other))


def test_token_outside_the_vocabulary():
    big = dataclasses.replace(
        CONFIG, reasoner=dataclasses.replace(CONFIG.reasoner, vocab_size=1000)
    )
    big = dataclasses.replace(big, text_start_token_id=700)
    tokenizer = tiny_tokenizer(big)
    tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}<|text_start|>"
    processor = Processor(config=CONFIG, tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match="the question has token 700, but the model's vocab_size is 512"
    ):
        processor.question([Turn(text="hi")], system_prompt="")
