"""URO-Bench, Big Bench Audio and VoiceBench on small folders of their layouts: files, scores, and an endpoint that fails midway."""

import json

import pytest

from chroma_jax.evaluation import benchmarks, uro
from chroma_jax.evaluation.endpoint import EndpointError
from chroma_jax.evaluation.speaking import Speaker

pytest.importorskip("jiwer", reason="pip install jiwer")
pytest.importorskip("whisper_normalizer", reason="pip install whisper-normalizer")


class ByNumber:
    """A Chroma whose answers go by the order of the questions."""

    sample_rate = 16000

    def __init__(self, stream, answers):
        self._stream, self._answers, self.turns = stream, iter(answers), []

    def stream(self, conversation, **_):
        self.turns.append([(t.role, t.text) for t in conversation])
        given = next(self._answers)
        if isinstance(given, Exception):
            raise given
        return self._stream(*given)


@pytest.fixture
def fake(fake_chroma):
    def make(*answers):
        stream = type(fake_chroma({None: ("", 0)}).stream([type("T", (), {"text": None})], voice=None))  # fmt: skip
        return Speaker(ByNumber(stream, answers))

    return make


@pytest.fixture
def asked(fake_ears, voice_path, voice_text):
    words = {
        1: "repeat after me",
        2: "red green blue grey",
        3: "it is 7",
        4: "hello there",
        5: "bye",
    }
    ears = fake_ears(words, None, dict.fromkeys(words, 4.0))
    return dict(ears=ears, system="tiny", how={}, voice=(voice_path, voice_text))


def write(path, rows, write_sound):
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        for part in row.get("dialogue", [row]):
            for key in ("source_wav", "file_name", "audio"):
                if key in part:
                    write_sound(path.parent / part[key], 50)
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def root(tmp_path, write_sound):
    sets = {
        "basic/Repeat": [
            {"source_wav": "wav/0.wav", "source_text": "Repeat after me.", "target_text": "Repeat after me"},
            {"source_wav": "wav/1.wav", "source_text": "Red, green!"},
        ],
        "basic/Gsm8kEval": [{"source_wav": "a.wav", "source_text": "3 + 4?", "target_text": ["7", "seven"]}],
        "basic/AlpacaEval": [{"source_wav": "b.wav", "source_text": "Greet me."}],
        "pro/MtBenchEval": [{"id": 9, "dialogue": [
            {"round": 1, "source_wav": "1.wav", "source_text": "And part.", "target_text": ""},
            {"round": 0, "source_wav": "0.wav", "source_text": "Greet.", "target_text": ""}]}],
        "pro/GenEmotion": [{"source_wav": "c.wav", "source_text": "Sound sad.", "emotion": "sad"}],
    }  # fmt: skip
    for name, rows in sets.items():
        write(tmp_path / "data" / name / "test.jsonl", rows, write_sound)
    return tmp_path / "data"


ANSWERS = (
    ("Hello there!", 4),  # AlpacaEval
    ("It is seven.", 3),  # Gsm8kEval
    ("Repeat after me.", 1),  # Repeat
    ("Red, green, blue, grey.", 2),
    ValueError("question too long"),  # GenEmotion
    ("Hello there.", 4),  # MtBenchEval
    ("Good bye.", 5),
)


class Judge:
    name, model, digest = "judge at home", "judge", "1"

    def __init__(self, *scores):
        self.scores, self.asked = list(scores), []

    def score(self, question, answer, reference=None):
        self.asked.append((question, answer, reference))
        given = self.scores.pop(0)
        if given is None:
            raise EndpointError("judge at home: 503; what is scored is kept, run again to go on")
        return given


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_uro(root, fake, asked, tmp_path):
    speaker = fake(*ANSWERS)
    found = uro.run(root, tmp_path / "out", speaker=speaker, endpoint=None, **asked)
    sets = found["sets"]
    # Two repetitions: one right; of four words said two were not to be: WER 0.5, still good. 1 × (1 - 0.25).
    assert sets["basic/Repeat"]["score"] == 75.0
    assert (sets["basic/Gsm8kEval"]["score"], sets["basic/Gsm8kEval"]["by"]) == (100.0, "rule")
    assert sets["basic/AlpacaEval"]["score"] is None
    assert "judge_url" in sets["basic/AlpacaEval"]["by"]
    assert "own scripts" in sets["pro/GenEmotion"]["by"]
    assert sets["pro/MtBenchEval"]["asr_wer"] == pytest.approx(0.25)  # "bye" for "good bye"
    folder = tmp_path / "out" / "eval" / "basic" / "Repeat"
    assert sorted(p.name for p in (folder / "audio").iterdir()) == ["0000.wav", "0001.wav"]
    assert lines(folder / "question_text.jsonl") == [{"0000": "Repeat after me."}, {"0001": "Red, green!"}]  # fmt: skip
    assert lines(folder / "gt_text.jsonl") == [{"0000": "Repeat after me"}, {"0001": "Red, green!"}]
    assert lines(folder / "pred_text.jsonl") == [{"0000": "Repeat after me."}, {"0001": "Red, green, blue, grey."}]  # fmt: skip
    assert lines(folder / "asr_text.jsonl") == [{"0000": "repeat after me"}, {"0001": "red green blue grey"}]  # fmt: skip
    assert lines(tmp_path / "out/eval/basic/Gsm8kEval/gt_text.jsonl") == [{"0000": "7 / seven"}]
    # What the model refused: no sound, a blank for the ASR.
    assert lines(tmp_path / "out/eval/pro/GenEmotion/asr_text.jsonl") == [{"0000": " "}]
    assert not (tmp_path / "out/eval/pro/GenEmotion/audio/0000.wav").exists()
    # A dialogue keeps its history, in the order of its rounds.
    (talk,) = lines(tmp_path / "out/eval/pro/MtBenchEval/output_with_text.jsonl")
    assert (talk["id"], talk["num_round"]) == (9, 2)
    assert [r["output_text"] for r in talk["dialogue"]] == ["Hello there.", "Good bye."]
    assert (tmp_path / "out/eval/pro/MtBenchEval/9/chat_1.wav").exists()
    assert speaker.chroma.turns[-1] == [("user", None), ("assistant", "Hello there."), ("user", None)]  # fmt: skip
    assert "Means want all sets" in (tmp_path / "out" / "table.md").read_text()


def test_an_endpoint_that_fails_midway(root, fake, asked, tmp_path):
    speaker, wanted = fake(*ANSWERS), ["AlpacaEval", "MtBenchEval"]
    speaker.chroma._answers = iter([ANSWERS[0], *ANSWERS[5:]])
    with pytest.raises(EndpointError, match="run again to go on"):
        uro.run(root, tmp_path / "out", sets=wanted, speaker=speaker, endpoint=Judge(80.0, 60.0, None), **asked)  # fmt: skip
    again = Judge(20.0)
    found = uro.run(root, tmp_path / "out", sets=wanted, speaker=speaker, endpoint=again, **asked)
    assert again.asked == [("And part.", "bye", None)]
    assert found["sets"]["basic/AlpacaEval"]["score"] == 80.0
    assert found["sets"]["pro/MtBenchEval"]["score"] == 40.0


def test_repeat_by_hand():
    answers, wanted = ["a b c d", "a b", "", "x y"], ["a b c d", "a b c", "a", "a b"]
    # WERs 0, 0.5 (one missing over two said), 1, 1: two good of four, their mean 0.25.
    assert uro.repeat_score(answers, wanted) == pytest.approx(100 * 0.5 * 0.75)
    assert uro.repeat_score([""], ["a"]) == 0.0


@pytest.mark.parametrize(
    ("sets", "spoil", "message"),
    [
        (["Absent"], None, "has no set Absent"),
        ((), "basic/Novel", "is no set of URO-Bench that is known: Novel"),
        ((), "basic/Summary", "wanted source_wav and source_text"),
    ],
    ids=["absent", "unknown", "foreign"],
)
def test_foreign_layouts(root, sets, spoil, message, fake, asked, tmp_path):
    if spoil:
        (root / spoil).mkdir()
        (root / spoil / "test.jsonl").write_text('{"question": "a.wav"}')
    with pytest.raises(ValueError, match=message):
        uro.run(root, tmp_path / "out", sets=sets, speaker=fake(), **asked)
    with pytest.raises(ValueError, match="wanted URO-Bench's layout"):
        uro.run(root / "basic", tmp_path / "out", speaker=fake(), **asked)
    assert not (tmp_path / "out").exists()


def test_big_bench_audio(fake, asked, tmp_path, write_sound):
    rows = [
        {"file_name": "data/1.wav", "id": 1, "category": "navigate", "official_answer": "No"},
        {"file_name": "data/2.wav", "id": 2, "category": "object_counting", "official_answer": "7"},
    ]
    write(tmp_path / "bba" / "metadata.jsonl", rows, write_sound)
    found = benchmarks.big_bench_audio(tmp_path / "bba", tmp_path / "out", speaker=fake(("Hi", 4), ("Seven.", 3)), **asked)  # fmt: skip
    assert found["right"] == 50.0
    assert [r["right by rule, %"].split()[0] for r in found["tables"][1]["rows"]] == [
        "0.0",
        "100.0",
    ]
    with pytest.raises(ValueError, match="wanted file_name, id"):
        (tmp_path / "bba" / "metadata.jsonl").write_text("{}")
        benchmarks.big_bench_audio(tmp_path / "bba", tmp_path / "out", speaker=fake(), **asked)


def test_voicebench_reads_the_models_own_text(fake, asked, tmp_path, write_sound):
    rows = [{"audio": "a.wav", "prompt": "Which? A. x B. y", "reference": "B", "subject": "art"}]
    write(tmp_path / "mmsu.jsonl", rows, write_sound)
    speaker = fake(("The answer is B.", 4))  # the ASR hears "hello there"
    found = benchmarks.voicebench(tmp_path / "mmsu.jsonl", tmp_path / "out", speaker=speaker, **asked)  # fmt: skip
    assert found["right"] == 100.0
    assert lines(tmp_path / "out" / "result-mmsu-audio.jsonl") == [{"prompt": "Which? A. x B. y", "reference": "B", "subject": "art", "response": "The answer is B."}]  # fmt: skip
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="no set 'other' of VoiceBench"):
        benchmarks.voicebench(tmp_path / "other.jsonl", tmp_path / "out", speaker=speaker, **asked)
