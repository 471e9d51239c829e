"""Speech for the judges: two LibriVox clips that lie here, and flite's voices where it is installed."""

import shutil
import subprocess

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
