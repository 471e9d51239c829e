"""The task `speech`: figures counted by hand, anchors, missing sounds, the same bytes however it is run."""

import pytest
from absl import flags

from chroma_jax.evaluation import report, results, speech
from chroma_jax.evaluation.judges import sound


@pytest.fixture
def folder(tmp_path, write_sound):
    """Four items in two voices; the second sound is wrong, the third is missing, the fourth is silent."""
    for number, name in enumerate(("anna", "bert"), 1):
        write_sound(tmp_path / f"{name}.wav", number)
    lines = [
        "a|prompt one|anna.wav|The sun, it rises!|bert.wav",
        "b|prompt one|anna.wav|Two words",
        "c|prompt two|bert.wav|Four words that miss",
        "d|prompt two|bert.wav|Silence",
    ]
    (tmp_path / "meta.lst").write_text("\n".join(lines))
    for name, number in (("a", 3), ("b", 4), ("d", 6)):
        write_sound(tmp_path / "wavs" / f"{name}.wav", number, seconds=1.0)
    return tmp_path


@pytest.fixture
def ears(fake_ears):
    words = {
        1: "prompt one",
        2: "the sun it rises",
        3: "the sun it rises",
        4: "two birds sing",
        6: "",
    }
    voices = {1: [1, 0], 2: [0.6, 0.8], 3: [1, 0], 4: [0, 1], 6: None}
    return fake_ears(words, voices, {1: 4.0, 2: 4.0, 3: 4.5, 4: 3.5, 6: None})  # fmt: skip


def run(folder, ears, out="out", **more):
    return speech.run(
        folder / "meta.lst", folder / "wavs", folder / out, ears, system="test", **more
    )


def test_figures(folder, ears):
    found = run(folder, ears)
    # a: right. b: one substitution, one insertion in two words. c: missing. d: nothing heard.
    assert found["wer"] == pytest.approx((0 + 1 + 1 + 1) / 4)
    assert found["wer_corpus"] == pytest.approx((0 + 2 + 4 + 1) / (4 + 2 + 4 + 1), abs=1e-6)
    assert (found["n"], found["missing"], found["missing_at_end"]) == (4, 1, 5)
    assert found["sim"] == pytest.approx((1 + 0) / 2)
    assert found["mos"] == pytest.approx(4.0)
    assert found["counted"] == {"wer": 4, "wer_corpus": 4, "sim": 2, "mos": 2}
    assert found["intervals"]["wer"] == [0.25, 1.0]
    human = found["anchors"]["recording"]
    assert (human["n"], human["wer"], human["sim"]) == (1, 0, pytest.approx(0.6))
    assert found["anchors"]["other"]["sim"] == pytest.approx(0.6)
    assert "codec" not in found["anchors"]
    note = found["tables"][0]["note"]
    for part in ("ASR, weights 0000", "no checkpoint was given", "n = 4", "seed 0"):
        assert part in note
    assert found["tables"][0]["rows"][0]["SIM"].endswith("(n 2)")


def test_the_ceiling(folder, ears):
    found = run(folder, ears, codec=sound.read)
    codec = found["anchors"]["codec"]
    # What comes back is the prompt: its own voice; the second's ASR text is another.
    assert (codec["n"], codec["sim"]) == (2, 1.0)
    assert codec["wer"] == pytest.approx((0 + 2) / 2)


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


def test_scored_again_the_same_bytes(folder, ears):
    run(folder, ears)
    first = contents(folder / "out")
    before = ears.words.calls
    run(folder, ears)
    assert ears.words.calls == before
    assert contents(folder / "out") == first
    run(folder, ears, out="new", workers=3)
    assert contents(folder / "new") == first


def test_by_speaker(folder, ears):
    lines = [
        '{"name": "a", "text": "The sun, it rises!", "prompt": "anna.wav", "speaker": "anna"}',
        '{"name": "b", "text": "Two words", "prompt": "bert.wav", "speaker": "bert"}',
    ]
    (folder / "list.jsonl").write_text("\n".join(lines))
    found = speech.run(folder / "list.jsonl", folder / "wavs", folder / "out", ears, system="x")
    rows = found["tables"][1]["rows"]
    assert [(r["what"], r["WER, %"].split()[0]) for r in rows] == [("anna", "0.00"), ("bert", "100.00")]  # fmt: skip


def test_a_sound_that_came_later_is_heard(folder, ears, write_sound):
    assert run(folder, ears)["missing"] == 1
    ears.words.meanings[7] = "four words that miss"
    ears.speaker.meanings[7], ears.mos.meanings[7] = [0.6, 0.8], 5.0
    write_sound(folder / "wavs" / "c.wav", 7)
    assert run(folder, ears)["missing"] == 0


def test_a_broken_sound_is_missing(folder, ears):
    (folder / "wavs" / "c.wav").write_bytes(b"no sound")
    run(folder, ears)
    row = next(r for r in results.read_rows(folder / "out") if r["key"] == "system/c")
    assert row["wer"] == 1
    assert row["missing"].startswith("c.wav: not a sound file")


def test_report(folder, ears):
    run(folder, ears)
    report.write([folder / "out", folder / "out"], folder / "page.html")
    page = (folder / "page.html").read_text()
    for part in ("Side by side", "<svg", "two birds sing", "no such file", "another speaker"):
        assert part in page
    assert "http" not in page
    with pytest.raises(ValueError, match="has no summary.json"):
        report.write([folder], folder / "page.html")


def call(**given):
    from chroma_jax import evaluate

    values = flags.FlagValues()
    evaluate.define_flags("speech", values)
    values(["evaluate", *(f"--{k}={v}" for k, v in given.items() if v is not None)])
    evaluate.main("speech", values)


BAD = {
    "no_list": (dict(list=None), "no --list"),
    "no_out": (dict(out=None), "no --out"),
    "no_wavs": (dict(wavs=None), "no --wavs"),
    "absent_list": (dict(list="absent.lst"), "no such file: absent.lst"),
    "absent_wavs": (dict(wavs="absent"), "no such folder: absent"),
    "foreign_wavs": (dict(wavs="."), "has none of the list's 4 sounds"),
    "unknown_judge": (dict(words="ears"), "no judge 'ears'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_told(folder, change, message, monkeypatch):
    monkeypatch.chdir(folder / "wavs")
    given = dict(list=folder / "meta.lst", wavs=folder / "wavs", out=folder / "out", words="none", speaker="none", mos="none")  # fmt: skip
    if change == dict(wavs="."):
        monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        call(**(given | change))
    assert not (folder / "out").exists()


def test_a_text_without_words(folder):
    (folder / "meta.lst").write_text("a|?!")
    with pytest.raises(ValueError, match="the text of a has no words"):
        call(list=folder / "meta.lst", wavs=folder / "wavs", out=folder / "out")


@pytest.mark.slow  # Whisper on busy cores
def test_with_real_judges(voice_path, voice_text, question_path, tmp_path):
    from chroma_jax.evaluation import judges
    from chroma_jax.evaluation.scoring import Ears, Names

    try:
        ears = Ears(Names())
    except judges.MissingJudge as e:
        pytest.skip(str(e))
    (tmp_path / "meta.lst").write_text(f"{voice_path.stem}|words|{question_path}|{voice_text}")
    found = speech.run(
        tmp_path / "meta.lst", voice_path.parent, tmp_path / "out", ears, system="human"
    )
    assert found["wer"] <= 0.05
    assert 0.8 < found["sim"] < 1
    assert found["mos"] > 2.5
