"""Speech for the judges: two LibriVox clips that lie here, and flite's voices where it is installed."""

import shutil
import subprocess

import numpy as np
import pytest

from chroma_jax.evaluation import judges
from chroma_jax.evaluation.judges import sound


def opened(open_judge, name):
    """The judge, or a skipped test that says what to install."""
    try:
        return open_judge(name)
    except judges.MissingJudge as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def words():
    return opened(judges.recognizer, "whisper-base")


@pytest.fixture(scope="session")
def voices():
    return opened(judges.speaker, "resemblyzer")


@pytest.fixture(scope="session", params=["distillmos", "dnsmos"])
def opinion(request):
    return opened(judges.mos, request.param)


@pytest.fixture(scope="session")
def reader(voice_path):
    """(samples, rate) of a LibriVox reader."""
    return sound.read(voice_path)


@pytest.fixture(scope="session")
def reader_again(question_path):
    """The same reader, another sentence."""
    return sound.read(question_path)


@pytest.fixture(scope="session")
def flite(tmp_path_factory):
    """flite(voice, text) -> the path of a WAV; made once a session."""
    if not shutil.which("flite"):
        pytest.skip("flite is not installed: apt-get install flite")
    folder = tmp_path_factory.mktemp("flite")

    def speak(voice, text):
        path = folder / f"{voice}-{abs(hash(text))}.wav"
        if not path.exists():
            subprocess.run(["flite", "-voice", voice, "-t", text, "-o", path], check=True)
        return path

    return speak


class FakeJudge:
    """Hears what a sound's first sample was made to mean."""

    digest, scale = "0" * 12, "made up"

    def __init__(self, name, meanings):
        self.name, self.meanings, self.calls = name, meanings, 0

    def __call__(self, samples, rate):
        self.calls += 1
        return self.meanings[round(float(samples[0]) * 100)]


@pytest.fixture
def fake_ears(monkeypatch):
    """fake_ears(words={1: "a b"}, voices={1: [1, 0]}, mos={1: 4.0}) -> `Ears` that hear by the hundredths of the first sample."""
    from chroma_jax.evaluation import scoring

    def make(words=None, voices=None, mos=None):
        for name, kind, meanings in (
            ("recognizer", "ASR", words),
            ("speaker", "SV", voices),
            ("mos", "OPINION", mos),
        ):
            judge = FakeJudge(kind, meanings)
            monkeypatch.setattr(judges, name, lambda *_, judge=judge: judge)
        names = [("given" if m else "none") for m in (words, voices, mos)]
        return scoring.Ears(scoring.Names(*names))

    return make


@pytest.fixture
def write_sound():
    """write_sound(path, number, seconds=0.1): a sound whose first sample is that many hundredths."""
    from chroma_jax.audio import save_wav

    def write(path, number, seconds=0.1):
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = np.zeros(round(16000 * seconds), np.float32)
        samples[0] = number / 100
        save_wav(path, samples, 16000)
        return path

    return write


class FakeChroma:
    """Answers by the text of the last turn: `answers[text]` is (its own text, the number that its sound carries), or an error."""

    sample_rate = 16000

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def stream(self, conversation, *, voice, **_):
        self.asked.append(conversation)
        given = self.answers[conversation[-1].text]
        if isinstance(given, Exception):
            raise given
        return FakeStream(*given)


class FakeStream:
    finish_reason, sample_rate = "stop", 16000
    tokens, frames = np.zeros(1, np.int32), np.zeros((1, 8), np.int32)

    def __init__(self, text, number):
        self.text, self.audio = text, np.zeros(1600, np.float32)
        self.audio[0] = number / 100

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return iter([self])

    def reply(self):
        return self


@pytest.fixture
def fake_chroma():
    """The class."""
    return FakeChroma
