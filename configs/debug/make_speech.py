"""Speaks the questions and answers of the debug data: makes the sound files beside it and data.jsonl.

    pip install hibari-tts soundfile soxr; apt-get install flite; python configs/debug/make_speech.py

Questions are spoken by hibari-tts's voice "heart", answers by flite's slt, rms and awb, in turns. The sound files are part of the
repository: this needs to run again only when a text changes.
"""

import json
import pathlib
import subprocess
import tempfile

import numpy as np
import soundfile
import soxr
from hibari import Hibari

FOLDER = pathlib.Path(__file__).parent
RATE = 16000
SPEAKERS = ("slt", "rms", "awb")
# No two answers of a speaker begin with the same word: the first frames are spoken when no other word is known yet.
PAIRS = (
    ("What color is the sky?", "In the day the sky is blue."),
    ("How many legs has a spider?", "The spider walks on eight legs."),
    ("What do bees make?", "Honey is made by bees."),
    ("When does the sun rise?", "The sun comes up in the morning."),
    ("What happens in the winter?", "Cold water turns into ice."),
    ("Where do fish live?", "Fish live in rivers and in the sea."),
    ("Who paints pictures?", "Artists paint with a brush."),
    ("What is two plus three?", "Two and three make five."),
    ("How long is a week?", "The week has seven days."),
    ("What is there in the meadow?", "Many cows eat green grass."),
    ("Where does bread come from?", "Bread comes from the oven."),
    ("What is the moon?", "Our moon is made of rock."),
    ("Why do we sleep?", "Sleep gives us strength again."),
    ("Why do we need a clock?", "It shows the time of day."),
    ("How do birds fly?", "Birds fly with feathers and wings."),
    ("What grows on trees?", "Leaves and apples grow on trees."),
    ("When does the snow fall?", "Snow falls in the cold winter."),
    ("What is a library?", "It is a house full of books."),
    ("Who drives a train?", "A driver drives the train."),
    ("Which things taste sweet?", "Candy and cake taste sweet."),
    ("Where is the kitchen?", "Go through the green door."),
    ("What opens a lock?", "Only the right key opens a lock."),
    ("How does rain start?", "Our rain falls from clouds."),
    ("What sails over the water?", "Sailors sail over the sea."),
)


def flite(text: str, voice: str) -> np.ndarray:
    """What a voice of flite says, at 16 kHz."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/out.wav"
        subprocess.run(
            ["flite", "-voice", voice, "--setf", "duration_stretch=1.1", "-t", text, "-o", file],
            check=True,
        )
        wave, rate = soundfile.read(file, dtype="float32")
    return soxr.resample(wave, rate, RATE)


def write(name: str, wave: np.ndarray) -> str:
    """Without the silence around it, and as loud as the others."""
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    wave = wave[max(0, loud[0] - 800) : loud[-1] + 1600]
    soundfile.write(FOLDER / name, 0.7 * wave / np.abs(wave).max(), RATE, subtype="PCM_16")
    return name


def main() -> None:
    heart = Hibari()
    rows = []
    for i, (question, answer) in enumerate(PAIRS):
        speaker = SPEAKERS[i % len(SPEAKERS)]
        heard = soxr.resample(heart(question, seed=0), 24000, RATE)
        row = {
            "id": f"{i:02d}",
            "question": write(f"{i:02d}-question.flac", heard),
            "answer_text": answer,
            "answer_audio": write(f"{i:02d}-{speaker}.flac", flite(answer, speaker)),
            "speaker": speaker,
        }
        rows.append(json.dumps(row) + "\n")
    (FOLDER / "data.jsonl").write_text("".join(rows))


if __name__ == "__main__":
    main()
