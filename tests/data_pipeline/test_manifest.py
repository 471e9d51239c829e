"""The manifest: what is read, and every mistake told with its line."""

import json

import numpy as np
import pytest
from corpus import write_corpus

from chroma_jax.audio.wav import save_wav
from chroma_jax.data.manifest import BadRow, Row, check_files, load_row, read_manifest
from chroma_jax.data.voices import VoiceLimits, cut_voice

GOOD = {"question_text": "Why?", "answer_text": "So.", "answer_audio": "a.wav"}


def read(tmp_path, *rows):
    path = tmp_path / "m.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return read_manifest(path).rows


def test_rows_are_read(tmp_path):
    full = GOOD | {
        "id": 7,
        "question": "sub/q.wav",
        "voice_audio": "/abs/v.wav",
        "voice_text": "words",
        "speaker": "ada",
        "language": "en",
        "turns": [{"role": "user", "audio": "q0.wav"}, {"role": "assistant", "text": "Yes?"}],
    }
    first, second = read(tmp_path, GOOD, "", full)
    assert (first.line, first.id, second.line, second.id) == (1, "line-1", 3, "7")
    assert first.turns[-1].text == "Why?"
    assert first.files == [str(tmp_path / "a.wav")]
    assert second.files == [
        str(tmp_path / "q0.wav"),
        str(tmp_path / "sub/q.wav"),
        str(tmp_path / "a.wav"),
        "/abs/v.wav",
    ]
    assert [turn.role for turn in second.turns] == ["user", "assistant", "user"]
    assert (second.speaker, second.language, first.speaker) == ("ada", "en", None)


MISTAKES = {
    "not_json": ("{", "not JSON"),
    "not_an_object": ("[1]", "object"),
    "unknown_key": (GOOD | {"anser": "x"}, "unknown key 'anser'"),
    "no_answer_text": ({"question_text": "a", "answer_audio": "a.wav"}, "answer_text is missing"),
    "no_answer_audio": ({"question_text": "a", "answer_text": "a"}, "answer_audio is missing"),
    "empty_answer_text": (GOOD | {"answer_text": "  "}, "answer_text must be text"),
    "number_for_text": (GOOD | {"answer_text": 3}, "answer_text must be text"),
    "no_question": ({"answer_text": "a", "answer_audio": "a.wav"}, "question"),
    "voice_without_text": (GOOD | {"voice_audio": "v.wav"}, "go together"),
    "bad_id": (GOOD | {"id": [1]}, "id must be"),
    "turns_no_list": (GOOD | {"turns": "x"}, "turns must be a list"),
    "turn_with_unknown_key": (GOOD | {"turns": [{"rle": "user"}]}, "turn 0"),
    "turn_of_numbers": (GOOD | {"turns": [{"role": "user", "text": 1}]}, "turn 0: text"),
}


@pytest.mark.parametrize(("row", "reason"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_bad_row_has_its_line_and_reason(tmp_path, row, reason):
    good, bad, other = read(tmp_path, GOOD, row, GOOD | {"answer_audio": "b.wav"})
    assert isinstance(good, Row)
    assert isinstance(other, Row)
    assert isinstance(bad, BadRow)
    assert bad.line == 2
    assert reason in bad.reason


def test_duplicates(tmp_path):
    rows = read(tmp_path, GOOD | {"id": "x"}, GOOD | {"id": "y"}, GOOD | {"id": "x", "answer_audio": "b.wav"})  # fmt: skip
    assert isinstance(rows[0], Row)
    assert "same question and answer is on line 1" in rows[1].reason
    assert "id 'x' is on line 1" in rows[2].reason


def test_files_that_are_no_manifest(tmp_path):
    with pytest.raises(ValueError, match="absent.jsonl cannot be read"):
        read_manifest(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_manifest(tmp_path / "empty.jsonl")


LIMITS = VoiceLimits(max_frames=20, max_tokens=40)
SOUND = {
    "missing": ({"answer_audio": "absent.wav"}, "no such file", True),
    "no_sound": ({"answer_audio": "data.jsonl"}, "data.jsonl: not a sound file", True),
    "missing_question": ({"question": "absent.wav"}, "absent.wav: no such file", True),
    "empty": ({"answer_audio": "empty.wav"}, "has no samples", True),
    "silent": ({"answer_audio": "silent.wav"}, "is silent", False),
    "less_than_a_frame": ({"answer_audio": "short.wav"}, "less than one frame", False),
    "nan": ({"answer_audio": "nan.wav"}, "NaN", False),
    "too_long": ({"answer_audio": "long.wav"}, "too long: an answer of 2138 frames", False),
    "answer_text_too_long": ({"answer_text": "x" * 4000}, "the Reasoner has 4096", False),
    "question_too_long": ({"question_text": "x" * 5000, "question": "<none>"}, "too long", False),
    "assistant_audio": (
        {"turns": [{"role": "assistant", "audio": "a0.wav"}]},
        "turn 0: only user turns",
        False,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("sounds")
    write_corpus(folder, clip, 2)
    save_wav(folder / "empty.wav", np.zeros(0), 24000)
    save_wav(folder / "silent.wav", np.zeros(9000), 24000)
    save_wav(folder / "short.wav", clip[9000:10000], 24000)
    save_wav(folder / "long.wav", np.tile(clip, 13), 24000)
    import soundfile

    soundfile.write(folder / "nan.wav", np.full(9000, np.nan), 24000, subtype="FLOAT")
    return folder


@pytest.mark.parametrize(("change", "reason", "by_header"), SOUND.values(), ids=SOUND.keys())
def test_sound_that_cannot_be_used(folder, clip, golden, change, reason, by_header):
    (row, other) = read_manifest(write_corpus(folder, clip, 2, row0=change)).rows
    with pytest.raises(ValueError, match=reason):
        load_row(row, golden.processor, LIMITS)
    if by_header:
        with pytest.raises(ValueError, match=reason.split(":")[0]):
            check_files(row)
    load_row(other, golden.processor, LIMITS)
    check_files(other)


def test_a_voice_that_fits_stays_whole(golden):
    tokenizer = golden.processor.tokenizer
    ids, frames = cut_voice("then leisure", 20, tokenizer, LIMITS)
    assert (tokenizer.decode(ids), frames) == ("then leisure", 20)


@pytest.mark.parametrize(
    ("text", "frames", "want"),
    [
        # 20 of 50 frames are 40 % of the 26 characters: 10.4
        ("had then leisure to decide", 50, ("had then", 15)),
        # tokens are bytes here: 40 of them
        ("considering " * 5, 19, ("considering considering considering", 11)),
        ("然后有闲暇考虑她的力量", 44, ("然后有闲暇", 20)),
        ("Donaudampfschifffahrtsgesellschaft", 68, ("Donaudampf", 20)),
    ],
    ids=["frames", "tokens", "no_spaces", "one_word"],
)
def test_a_long_voice_is_cut_at_a_word(golden, text, frames, want):
    tokenizer = golden.processor.tokenizer
    ids, kept = cut_voice(text, frames, tokenizer, LIMITS)
    assert (tokenizer.decode(ids), kept) == want
    assert ids.dtype == np.int32
