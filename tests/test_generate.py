"""The command: a reply from the tiny checkpoint, and one line and exit code 2 for every mistake, before any long work."""

import filecmp
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from chroma_jax import Chroma, Sampling, Voice, generate
from chroma_jax.audio.wav import load_audio


def call(**given):
    """The command's `main` with these flags; None leaves a flag out."""
    values = flags.FlagValues()
    generate.define_flags(values)
    values(
        ["generate", *(f"--{name}={value}" for name, value in given.items() if value is not None)]
    )
    generate.main(values)


@pytest.fixture
def request_flags(golden_dir, question_path, voice_path, voice_text, tmp_path):
    return {
        "checkpoint": str(golden_dir),
        "question": str(question_path),
        "voice": str(voice_path),
        "voice_text": voice_text,
        "out": str(tmp_path / "reply.wav"),
        "max_seconds": 0.5,
    }


def test_a_reply_and_a_report(request_flags, golden, question_path, voice, capsys):
    call(**request_flags, seed=3, temperature=0.8, top_k=30)
    out, report = capsys.readouterr()
    sampling = Sampling(temperature=0.8, top_k=30)
    want = golden.reply(question_path, voice=voice, max_seconds=0.5, seed=3, sampling=sampling)
    assert out == want.text + "\n"
    written = load_audio(request_flags["out"], 24000)
    np.testing.assert_allclose(written, np.clip(want.audio, -1, 1), rtol=0, atol=1e-4)
    for line in (
        "time to first sound: ",
        "real-time factor with codec: ",
        "real-time factor without codec: ",
        "audio: 0.56 s",
        "finish reason: length",
    ):
        assert report.count(line) == 1


def test_random_weights_say_so(request_flags, capsys, monkeypatch, golden):
    monkeypatch.setattr(Chroma, "random", lambda config, seed: golden)
    call(**(request_flags | {"checkpoint": None}), config="tiny")
    assert "random weights" in capsys.readouterr().err


def test_random_weights_need_nothing(capsys, monkeypatch, golden, tmp_path):
    """As `python -m chroma_jax.generate --config=tiny` after an installation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Chroma, "random", lambda config, seed: golden)
    call(config="tiny", max_seconds=0.5)
    report = capsys.readouterr().err
    assert (
        "; --text='Can you hear me?'; --out='reply.wav'; --voice_text='a second of noise'" in report
    )
    assert len(load_audio("reply.wav", 24000)) == 7 * 1920


def test_paths_in_the_home_directory(request_flags, golden_dir, tmp_path, monkeypatch, golden):
    """Every path of a whole call begins with ~, and so does that of a saved voice."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(Chroma, "from_pretrained", lambda path, **_: golden)
    (home / "model").symlink_to(golden_dir)
    for name in ("question", "voice"):
        shutil.copy(request_flags[name], home / f"{name}.wav")
    Voice("~/voice.wav", request_flags["voice_text"]).save("~/voice.npz")
    paths = dict(
        checkpoint="~/model", question="~/question.wav", voice="~/voice.npz", out="~/reply.wav"
    )
    monkeypatch.chdir(tmp_path)
    call(**(request_flags | paths | dict(voice_text=None)))
    assert sorted(os.listdir(home)) == [
        "model",
        "question.wav",
        "reply.wav",
        "voice.npz",
        "voice.wav",
    ]
    assert os.listdir(tmp_path) == ["home"]


def test_text_alone_is_a_question(request_flags, golden, voice):
    call(**(request_flags | {"question": None}), text="Hello?")
    assert len(load_audio(request_flags["out"], 24000)) == 7 * 1920


def test_words_are_said(request_flags, golden, voice, capsys):
    call(**(request_flags | {"question": None}), say="Good morning.", seed=2)
    want = golden.say("Good morning.", voice=voice, max_seconds=0.5, seed=2)
    assert capsys.readouterr().out == want.text + "\n"
    written = load_audio(request_flags["out"], 24000)
    np.testing.assert_allclose(written, np.clip(want.audio, -1, 1), rtol=0, atol=1e-4)


BAD = {
    "no_checkpoint": (dict(checkpoint=None), "FlashLabs/Chroma-4B"),
    "both_checkpoint_and_config": (dict(config="tiny"), "exclude each other"),
    "no_question": (dict(question=None), "no question"),
    "no_voice": (dict(voice=None), "no --voice"),
    "voice_without_transcript": (dict(voice_text=None), "no --voice_text"),
    "transcript_without_voice": (dict(voice=None, voice_text="words"), "no --voice"),
    "no_out": (dict(out=None), "no --out"),
    "out_in_no_directory": (dict(out="absent/reply.wav"), "absent"),
    "missing_question": (dict(question="absent.wav"), "absent.wav"),
    "question_is_no_sound": (dict(question=__file__), "test_generate.py"),
    "missing_voice": (dict(voice="nobody.wav"), "nobody.wav"),
    "missing_saved_voice": (dict(voice="nobody.npz"), "nobody.npz"),
    "out_is_the_question": (dict(question="OUT"), "is one of the inputs"),
    "out_is_the_voice": (dict(voice="OUT"), "is one of the inputs"),
    "out_name_too_long": (dict(out="n" * 300 + ".wav"), "File name too long"),
    "question_is_a_data_url": (
        dict(question="data:audio/wav;base64," + "UklGR" * 10_000),
        "data: URL",
    ),
    "zero_seconds": (dict(max_seconds=0.0), "max_seconds"),
    "temperature": (dict(temperature=-1.0), "temperature"),
    "too_many_seconds": (dict(max_seconds=1000.0), "max_seconds 1000.0 is 12500 frames"),
    "question_too_long": (dict(text="word " * 900), "question too long"),
    "endless_seconds": (dict(max_seconds=float("inf")), "max_seconds must be a positive, finite"),
    "top_k_beyond_int32": (dict(top_k=2**31), "top_k must be a whole number"),
    "nothing_to_say": (dict(say=" "), "nothing to say"),
    "too_much_to_say": (dict(say="word " * 900), "too much to say"),
    "missing_directory": (dict(checkpoint="./absent"), "absent"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_named_before_the_weights_are_read(
    request_flags, change, message, monkeypatch
):
    loading = lambda *_, **__: pytest.fail("the weights were read")  # noqa: E731
    monkeypatch.setattr(Chroma, "from_pretrained", loading)
    out = request_flags["out"]
    if "OUT" in change.values():
        change = {name: out for name in change}
        shutil.copy(request_flags["voice"], out)
    with pytest.raises(ValueError, match=message) as error:
        call(**(request_flags | change))
    assert len(str(error.value)) <= 200
    if os.path.exists(out):
        assert filecmp.cmp(out, request_flags["voice"])


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "chroma_jax.generate", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=pathlib.Path(__file__).parents[1],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "no --checkpoint"), (("--nonsense=1",), "nonsense"), (("--top_k=many",), "top_k"), (("stray",), "stray")],
    ids=["nothing", "unknown_flag", "bad_value", "stray_word"],
)  # fmt: skip
def test_exit_code_2_and_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_help_lists_the_flags():
    done = run("--help")
    assert done.returncode == 0
    for flag in ("--checkpoint", "--question", "--voice_text", "--max_seconds", "--seed"):
        assert flag in done.stdout
