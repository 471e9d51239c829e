"""The task `dialogue`: the tiny checkpoint answers, fake judges hear it; the run survives being stopped."""

import json

import numpy as np
import pytest

from chroma_jax import Sampling
from chroma_jax.audio import load_audio
from chroma_jax.evaluation import dialogue, results, speech
from chroma_jax.evaluation.dialogue import read_questions
from chroma_jax.evaluation.lists import read_list
from chroma_jax.evaluation.speaking import Speaker


@pytest.fixture
def questions(tmp_path, question_path, voice_path, voice_text):
    lines = [
        {"id": "a", "question": str(question_path), "answer": ["sun"], "group": "x"},
        {"id": "b", "question_text": "How many?", "answer": "7", "rule": "number", "group": "y",
         "voice_audio": str(voice_path), "voice_text": voice_text},
        {"id": "c", "turns": [{"question_text": "Hello?"}, {"question": str(question_path)}]},
    ]  # fmt: skip
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


class Hears:
    """A judge that hears the same in every sound."""

    digest, scale = "0" * 12, "made up"

    def __init__(self, name, value):
        self.name, self.value, self.calls = name, value, 0

    def __call__(self, samples, rate):
        self.calls += 1
        return self.value


@pytest.fixture
def ears(monkeypatch):
    from chroma_jax.evaluation import judges, scoring

    heard = dict(recognizer="the sun has 7", speaker=np.array([1.0, 0.0]), mos=3.0)
    for name, value in heard.items():
        judge = Hears(name, value)
        monkeypatch.setattr(judges, name, lambda *_, judge=judge: judge)
    return scoring.Ears(scoring.Names())


def run(path, chroma, ears, voice, out, **more):
    speaker = Speaker(chroma, max_seconds=0.3, sampling=Sampling(temperature=1.0), seed=3)
    return dialogue.run(
        read_questions(path), out, speaker, ears, source={"name": path.name, "digest": "1", "n": 3},
        system="tiny", how={"max_seconds": 0.3}, voice=voice, **more,
    )  # fmt: skip


@pytest.mark.slow
def test_the_tiny_checkpoint(questions, golden, ears, voice_path, voice_text, tmp_path):
    pytest.importorskip("whisper_normalizer", reason="pip install whisper-normalizer")
    found = run(questions, golden, ears, (voice_path, voice_text), tmp_path / "out")
    rows = {r["key"]: r for r in results.read_rows(tmp_path / "out")}
    assert list(rows) == ["system/a", "system/b", "system/c/0", "system/c/1"]
    assert (rows["system/a"]["right"], rows["system/b"]["right"]) == (True, True)
    assert rows["system/c/1"]["right"] is None
    assert found["right"] == 100.0
    assert found["counted"]["right"] == 2
    assert [r["group"] for r in found["tables"][1]["rows"]] == ["x", "y"]
    for key, path in (("a", "audio/a.wav"), ("c/1", "c/chat_1.wav")):
        row, sound = rows[f"system/{key}"], load_audio(tmp_path / "out" / path, 24000)
        assert row["spoken_seconds"] == pytest.approx(len(sound) / 24000, abs=1e-3)
        assert row["first_sound"] > 0
        assert (row["sim"], row["mos"], row["missing"]) == (1.0, 3.0, None)
        assert row["finish_reason"] in ("length", "stop")
    # Scored again: nothing is asked or heard anew, and the bytes are the same.
    before, calls = (tmp_path / "out" / "summary.json").read_bytes(), ears.words.calls
    run(questions, golden, ears, (voice_path, voice_text), tmp_path / "out")
    assert ears.words.calls == calls
    assert (tmp_path / "out" / "summary.json").read_bytes() == before
    # An answer does not depend on what was asked before it.
    one = tmp_path / "one.jsonl"
    one.write_text(questions.read_text().splitlines()[1])
    run(one, golden, ears, None, tmp_path / "alone")
    again = results.read_rows(tmp_path / "alone")[0]
    assert again["said"] == rows["system/b"]["said"]


class Fake:
    """A Chroma that refuses one text, and says others in as many tenths of a second as they have letters."""

    sample_rate = 16000

    class Reply:
        sample_rate = 16000
        finish_reason = "stop"

        def __init__(self, text):
            self.text, self.audio = text, np.full(160 * len(text), 0.05, np.float32)

    def say(self, text, *, voice, seed, max_seconds, sampling, system_prompt):
        self.said = [*getattr(self, "said", ()), (text, seed)]
        if text == "Too long":
            raise ValueError("too much to say: 900 tokens")
        return self.Reply(text)


def test_texts_are_said(tmp_path, voice_path):
    lines = [f"{n}|said|{voice_path}|{t}" for n, t in (("a", "One two"), ("b", "Too long"), ("c", "Three"))]  # fmt: skip
    (tmp_path / "meta.lst").write_text("\n".join(lines))
    items, chroma = read_list(tmp_path / "meta.lst"), Fake()
    for _ in range(2):
        ended = speech.make(items, tmp_path / "out", Speaker(chroma), {"checkpoint": "x"})
        assert ended == {"refused": 1, "stop": 2}
    assert [t for t, _ in chroma.said] == ["One two", "Too long", "Three"]
    assert len({seed for _, seed in chroma.said}) == 3
    assert sorted(p.name for p in (tmp_path / "out" / "wavs").iterdir()) == ["a.wav", "c.wav"]
    made = results.read_rows(tmp_path / "out" / "made")
    assert made[1]["why"] == "too much to say: 900 tokens"
    with pytest.raises(ValueError, match="another checkpoint"):
        speech.make(items, tmp_path / "out", Speaker(chroma), {"checkpoint": "y"})


def test_a_list_without_prompts_wants_a_voice(tmp_path):
    (tmp_path / "meta.lst").write_text("a|One two")
    with pytest.raises(ValueError, match="a has no prompt with its text: give a voice"):
        speech.make(read_list(tmp_path / "meta.lst"), tmp_path / "out", Speaker(Fake()), {})


BAD = {
    "no_id": ({"question_text": "a"}, "cannot name a file"),
    "path": ({"id": "../a", "question_text": "a"}, "cannot name a file"),
    "nothing": ({"id": "a"}, "neither question"),
    "key": ({"id": "a", "question_text": "a", "sound": "b"}, "unknown key 'sound'"),
    "rule": ({"id": "a", "question_text": "a", "answer": "b", "rule": "c"}, "no rule 'c'"),
    "no_answer": ({"id": "a", "question_text": "a", "rule": "number"}, "wants an answer"),
    "absent": ({"id": "a", "question": "absent.wav"}, "1 of its sound files are not there"),
    "voice": ({"id": "a", "question_text": "a", "voice_audio": "v.wav"}, "wants voice_text"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_bad_questions_are_told(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q.jsonl")


def test_the_same_id_twice(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"id": 1, "question_text": "a"}\n' * 2)
    with pytest.raises(ValueError, match="q.jsonl:2: the id 1 is there already"):
        read_questions(tmp_path / "q.jsonl")


def test_questions_without_a_voice(questions, golden, ears, tmp_path):
    with pytest.raises(ValueError, match="2 questions have no voice, as a"):
        run(questions, golden, ears, None, tmp_path / "out")


@pytest.mark.slow  # compiles say and the Codec over a whole prompt
def test_the_command_speaks_a_list(golden_dir, golden, ears, voice_path, voice_text, tmp_path, monkeypatch):  # fmt: skip
    from absl import flags

    from chroma_jax import Chroma, evaluate

    monkeypatch.setattr(Chroma, "from_pretrained", lambda *_, **__: golden)
    (tmp_path / "meta.lst").write_text(f"a|{voice_text}|{voice_path}|the sun has 7")
    values = flags.FlagValues()
    evaluate.define_flags("speech", values)
    values(["evaluate", f"--list={tmp_path / 'meta.lst'}", f"--checkpoint={golden_dir}", f"--out={tmp_path / 'out'}", "--max_seconds=1"])  # fmt: skip
    evaluate.main("speech", values)
    found = results.read_summary(tmp_path / "out")
    assert (found["n"], found["missing"], found["wer"]) == (1, 0, 0.0)
    assert found["made"]["max_seconds"] == 1.0
    assert sum(found["made"]["ended by"].values()) == 1
    # The ceiling: the prompt through the Codec has its length.
    back = load_audio(next((tmp_path / "out" / "codec").iterdir()), 24000)
    assert len(back) == len(load_audio(voice_path, 24000))
    assert found["anchors"]["codec"]["sim"] == 1.0
    assert "forced to the target" in found["tables"][0]["note"]
