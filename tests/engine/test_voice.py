"""Saved voices: what is read is what was written, whoever else writes, and codes that cannot be the recording's are told."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from chroma_jax import Voice
from chroma_jax.engine.voice import codec_name

NAME = "0123abcd-1920x8x64"
CODES = np.arange(24, dtype=np.int32).reshape(3, 8)
WAVE = np.linspace(-0.5, 0.5, 3 * 1920 - 5, dtype=np.float32)


def made(codes=CODES, name=NAME) -> Voice:
    voice = Voice((WAVE, 24000), "Three frames.")
    voice._codes[name] = codes
    return voice


def test_the_name_says_what_the_codes_are(golden):
    assert codec_name("0123abcd", golden.config) == NAME


def test_a_voice_comes_back(tmp_path):
    made().save(tmp_path / "v.npz")
    loaded = Voice.load(tmp_path / "v.npz")
    np.testing.assert_array_equal(loaded.wave, WAVE)
    np.testing.assert_array_equal(loaded.codes(NAME), CODES)
    assert loaded.text == "Three frames."
    assert loaded.codes("4567abcd-1920x8x64") is None


def test_bytes_say_whether_a_file_is_a_saved_voice(tmp_path, voice_path):
    made().save(tmp_path / "ada")
    (tmp_path / "sound.npz").write_bytes(voice_path.read_bytes())
    assert Voice.is_saved(tmp_path / "ada")
    assert not Voice.is_saved(tmp_path / "sound.npz")
    assert Voice.is_saved(tmp_path / "absent.npz")
    assert not Voice.is_saved(tmp_path / "absent.wav")


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (CODES[:2], r"are \[3, 8\] frames and codebooks, found \[2, 8\]"),
        (np.tile(CODES, (2, 1)), r"found \[6, 8\]"),
        (CODES[:, :7], r"found \[3, 7\]"),
        (CODES[0], r"codes_0123abcd-1920x8x64 has shape \[8\]"),
        (CODES / 2, "not a saved voice"),
        (CODES + 41, "codes must be from 0 to 63, found 41 to 64"),
        (CODES - 1, "codes must be from 0 to 63, found -1 to 22"),
    ],
    ids=["short", "long", "narrow", "flat", "floats", "too_large", "negative"],
)
def test_codes_that_cannot_be_the_recordings(tmp_path, codes, message):
    made(codes).save(tmp_path / "v.npz")
    with pytest.raises(ValueError, match=message) as error:
        Voice.load(tmp_path / "v.npz")
    assert "v.npz: " in str(error.value)


def test_codes_of_unknown_width_are_made_again(tmp_path):
    """As earlier versions saved them: under a fingerprint alone."""
    made(name="0123abcd").save(tmp_path / "v.npz")
    assert not Voice.load(tmp_path / "v.npz")._codes


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_told(tmp_path, damage):
    path = tmp_path / "v.npz"
    made().save(path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-100]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"v\.npz: not a saved voice"):
        Voice.load(path)


def test_a_voice_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"v\.npz: no such file"):
        Voice.load(tmp_path / "v.npz")
    with pytest.raises(ValueError, match=r"cannot be saved: No such file or directory"):
        made().save(tmp_path / "absent" / "v.npz")


WRITER = """
import sys
from chroma_jax import Voice
voice = Voice.load(sys.argv[1])
for _ in range(30):
    voice.save(sys.argv[1])
"""


def test_threads_and_processes_save_one_voice(tmp_path):
    """None fails, and whoever reads finds a whole voice at every moment."""
    path, failed = tmp_path / "v.npz", []
    voice = made()
    voice.save(path)

    def save() -> None:
        try:
            for _ in range(20):
                voice.save(path)
        except ValueError as e:
            failed.append(e)

    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or process.poll() is None:
        np.testing.assert_array_equal(Voice.load(path).codes(NAME), CODES)
    for thread in threads:
        thread.join()
    assert process.returncode == 0
    assert not failed
    assert os.listdir(tmp_path) == ["v.npz"]
