"""Crops of sound: a function of the batch's number, from any point on, in any number of processes."""

import json

import numpy as np
import pytest
import soundfile

from chroma_jax.data.crops import CropLimits, Sounds, crop_evaluation, crop_pipeline
from chroma_jax.data.mixture import Source
from chroma_jax.data.pipeline import Reading

pytest.importorskip("grain")

RATE = 24000
LIMITS = CropLimits(seconds=0.04)
SIZE = 960


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sounds whose samples count up, of 3000, 500 and 2000 samples; the last at half the rate, in two channels."""
    folder = tmp_path_factory.mktemp("sounds")
    for name, size, first in (("a.wav", 3000, 0), ("b.flac", 500, 4000)):
        soundfile.write(folder / name, np.arange(first, first + size, dtype=np.int16), RATE)
    t = np.arange(2000) / 12000
    tone = 0.5 * np.sin(2 * np.pi * 300 * t)
    soundfile.write(folder / "c.wav", np.stack([tone, 0 * t], 1), 12000, subtype="FLOAT")
    (folder / "notes.txt").write_text("no sound")
    rows = [{"audio": "a.wav"}, {"answer_audio": "b.flac", "question": "a.wav"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def names(sounds):
    return [file.rpartition("/")[2] for file in sounds.files]


def numbers(row):
    return np.round(row * 32768).astype(int)


def test_directories_and_manifests(folder):
    sounds = Sounds([str(folder), Source(directory=str(folder / "rows.jsonl"), weight=2.0)], RATE)
    assert names(sounds) == ["a.wav", "b.flac", "c.wav", "a.wav", "b.flac"]
    np.testing.assert_allclose(sounds.seconds[:3], [3000 / RATE, 500 / RATE, 2000 / 12000])
    assert sounds.describe()[1].endswith("rows.jsonl: 2 sounds, 0.0 min, weight 2")


def test_a_crop_is_what_the_file_holds(folder):
    sounds = Sounds([str(folder / "rows.jsonl")], RATE)
    found = [sounds.read(sounds.draw(n, 4, LIMITS, seed=0), LIMITS) for n in range(8)]
    for crops in found:
        for wave, length, number in zip(*crops[:3], strict=True):
            first = numbers(wave)[0]
            assert length == (SIZE if number == 0 else 500)
            assert 0 <= first <= 2040 if number == 0 else first == 4000
            np.testing.assert_array_equal(numbers(wave)[:length], first + np.arange(length))
            assert not wave[length:].any()
    share = np.mean([crops.record_ids == 1 for crops in found])
    assert 0 < share < 0.4  # a seventh of the sound


def test_other_rates_channels_and_speeds(folder):
    sounds = Sounds([str(folder / "c.wav")], RATE)
    fast = CropLimits(seconds=0.04, speed=0.2)
    draw = sounds.draw(0, 3, fast, seed=1)
    crops = sounds.read(draw, fast)
    assert np.ptp(draw.speeds) > 0.01 and (np.abs(draw.speeds - 1) < 0.2).all()
    for wave, speed, start in zip(crops.wave, draw.speeds, draw.starts, strict=True):
        t = round(start * 12000) / 12000 + np.arange(SIZE) * speed / RATE
        want = 0.25 * np.sin(2 * np.pi * 300 * t)
        np.testing.assert_allclose(wave[100:-100], want[100:-100], atol=0.01)
    assert np.isfinite(crops.wave).all()


def test_loudness(folder):
    sounds = Sounds([str(folder / "a.wav")], RATE)
    loud = CropLimits(seconds=0.04, gain_db=6.0)
    draw = sounds.draw(0, 50, loud, seed=0)
    assert 10 ** (-6 / 20) <= draw.gains.min() < 0.7 and 1.4 < draw.gains.max() <= 10 ** (6 / 20)
    plain = sounds.read(draw._replace(gains=np.ones(50)), loud)
    np.testing.assert_allclose(
        sounds.read(draw, loud).wave, plain.wave * draw.gains[:, None], rtol=1e-5
    )


def test_it_goes_on_from_any_state(folder):
    sounds = Sounds([str(folder)], RATE)
    make = lambda **changes: crop_pipeline(  # noqa: E731
        sounds,
        LIMITS,
        **dict(batch_size=4, seed=3, reading=Reading(threads=2, prefetch=2)) | changes,
    )
    straight = make()
    batches = [next(straight) for _ in range(6)]
    resumed = make()
    resumed.set_state({"position": 3, "plan": straight.get_state()["plan"]})
    for want in batches[3:]:
        got = next(resumed)
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert np.array_equal(straight.batch(2).wave, batches[2].wave)
    assert any((a.wave != batches[0].wave).any() for a in batches[1:])
    for other in (make(seed=4), make(batch_size=2)):
        with pytest.raises(ValueError, match="belongs to other data, seed, batch size"):
            other.set_state(straight.get_state())


def test_processes_share_the_rows(folder):
    sounds = Sounds([str(folder)], RATE)
    whole = crop_pipeline(sounds, LIMITS, batch_size=4).batch(5)
    parts = [
        crop_pipeline(sounds, LIMITS, batch_size=4, process_index=i, process_count=2).batch(5)
        for i in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate([p.wave for p in parts]), whole.wave)
    with pytest.raises(ValueError, match="batch_size 3 does not divide over 2 processes"):
        crop_pipeline(sounds, LIMITS, batch_size=3, process_count=2)


def test_evaluation_has_the_middle_of_every_sound_once(folder):
    sounds = Sounds([str(folder)], RATE)
    batches = list(crop_evaluation(sounds, LIMITS, batch_size=2))
    assert [b.record_ids.tolist() for b in batches] == [[0, 1], [2, -1]]
    assert [b.lengths.tolist() for b in batches] == [[SIZE, 500], [SIZE, 0]]
    assert numbers(batches[0].wave[0])[0] == (3000 - SIZE) // 2
    assert not batches[1].wave[1].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: [], "no sound: name a directory or a manifest"),
        (lambda d: [str(d / "none.jsonl")], "none.jsonl: cannot be read"),
        (lambda d: [str(d / "notes.txt")], "notes.txt: cannot be read"),
        (lambda d: [str(d / "empty")], "empty: names no sound files"),
        (lambda d: [str(d / "bad")], "x.wav: not a sound file that can be read"),
    ],
    ids=["nothing", "missing", "no JSON", "empty", "no sound"],
)
def test_sources_that_cannot_be(folder, tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.wav").write_text("hello")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError) as error:
        Sounds(make(tmp_path), RATE)
    assert message in str(error.value)


@pytest.mark.parametrize("changes", [dict(seconds=0), dict(gain_db=-1), dict(speed=1.0)], ids=str)
def test_limits(changes):
    with pytest.raises(ValueError, match=f"data.*{next(iter(changes))}"):
        CropLimits(**dict(seconds=1.0) | changes)
