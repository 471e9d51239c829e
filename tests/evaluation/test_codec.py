"""What a Codec leaves of speech: which sounds go through it, and how they are laid out for the judges."""

import json

import jax
import numpy as np
import pytest
import soundfile
from flax import nnx
from model.codec.codec_oracle import small_config

from chroma_jax.audio.wav import load_audio
from chroma_jax.checkpoint.codec_files import save_codec
from chroma_jax.evaluation import codec as task
from chroma_jax.evaluation.lists import read_list
from chroma_jax.model.codec import Codec


class Judges:
    """Stands in for judges: what it was asked is seen in what `speech.run` is given."""

    language = "en"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    cfg = small_config()
    save_codec(folder / "codec", cfg, Codec(cfg, rngs=nnx.Rngs(0)))
    rows = []
    for i in range(5):
        tone = 0.3 * np.sin((0.05 + 0.02 * i) * np.arange(1000 + 100 * i))
        soundfile.write(folder / f"{i}.wav", tone, 24000)
        rows.append(dict(id=f"s{i}", audio=f"{i}.wav", text=f"word {i}", speaker="ab"[i % 2]))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("books", [None, 2], ids=["all", "two"])
def test_sounds_go_through_and_are_listed(folder, tmp_path, monkeypatch, books):
    asked = {}

    def run(listed, wavs, out, ears, **kwargs):
        asked.update(listed=listed, wavs=wavs, **kwargs)
        return {"n": 4}

    monkeypatch.setattr(task.speech, "run", run)
    source = str(folder / "codec")
    given = dict(per_speaker=2, num_codebooks=books, seed=3)
    assert task.run(source, folder / "rows.jsonl", tmp_path, Judges(), **given) == {"n": 4}
    assert asked["seed"] == 3 and asked["system"] == f"codec, {books or 5} codebooks"
    items = read_list(asked["listed"])
    # The last two of each speaker; the original is what is compared with, in words and in voice.
    assert [(i.name, i.speaker) for i in items] == [
        ("s2", "a"),
        ("s4", "a"),
        ("s1", "b"),
        ("s3", "b"),
    ]
    cfg, codec = task.load_any_codec(source)
    for item in items:
        assert item.prompt == item.recording == (folder / f"{item.name[1]}.wav").resolve()
        wave = load_audio(str(item.recording), 24000)
        made = load_audio(str(asked["wavs"] / f"{item.name}.wav"), 24000)
        filled = np.pad(wave, (0, -len(wave) % cfg.frame_samples))[None]
        want = jax.jit(lambda c, w: c.decode(c.encode(w, None, books)))(codec, filled)[0]
        np.testing.assert_allclose(made, np.clip(want[: len(wave)], -1, 1), atol=1e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": "a"}', "rows.jsonl:1: audio is missing"), ('{"audio": "x.wav", "text": " "}', "text is missing"),
     ('{"audio": "x.wav", "text": "a"}', "x.wav")],
    ids=["no audio", "no text", "no file"],
)  # fmt: skip
def test_manifests_that_cannot_be(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError) as error:
        task.read_manifest(tmp_path / "rows.jsonl", 3)
    assert message in str(error.value)


def test_what_is_no_codec(tmp_path):
    with pytest.raises(ValueError):
        task.load_any_codec(tmp_path)
