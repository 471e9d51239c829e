"""A whole synthesis: manifests that `prepare` reads, the same after ten kills and on two workers of Beam."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from chroma_jax.data.manifest import BadRow, check_files, read_manifest
from chroma_jax.synthesis import runner, shards
from chroma_jax.synthesis.config import SynthesisConfig
from chroma_jax.synthesis.judging import Heard, Judges

ROOT = pathlib.Path(__file__).parents[2]


def content(directory) -> dict[str, bytes]:
    """All that a synthesis leaves, by name."""
    files = pathlib.Path(directory).rglob("*")
    return {str(f.relative_to(directory)): f.read_bytes() for f in files if f.is_file()}


def lines(directory, name):
    with open(os.path.join(directory, name)) as f:
        return [json.loads(line) for line in f]


@pytest.fixture
def config(values):
    return SynthesisConfig.from_dict(values)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """Where the first test that wants it makes a whole synthesis."""
    return tmp_path_factory.mktemp("whole") / "made"


@pytest.fixture
def made(tmp_path, made_once, config):
    """A copy of it."""
    if not made_once.exists():
        runner.run(made_once, config)
    return pathlib.Path(shutil.copytree(made_once, tmp_path / "made"))


def test_prepare_reads_its_manifests(made):
    for split, rows in (("train", 18), ("validation", 6)):
        found = read_manifest(made / f"{split}.jsonl").rows
        assert 0.8 * rows <= len(found) <= rows
        assert not [row for row in found if isinstance(row, BadRow)]
        for row in found:
            check_files(row)
            assert (row.voice_audio is not None) == (split == "validation")
            assert row.answer_audio != row.voice_audio and row.answer_text != row.voice_text


def test_an_answer_is_not_in_the_voice_that_asks(made):
    for record in lines(made, "records.jsonl"):
        assert record["voices"]["answer"] != record["voices"]["question"]
        assert record["licences"] == ["none needed"]


def test_the_clips_for_a_codec(made):
    sounds = lines(made, "sounds.jsonl")
    assert len({row["id"] for row in sounds}) == len(sounds) > 18
    for row in sounds:
        assert soundfile.info(made / row["audio"]).samplerate == 16000
        assert row["speaker"] in ("low", "high", "other") and row["text"]


def test_a_second_run_has_nothing_to_do(made, config):
    before = content(made)
    said = []
    report = runner.run(made, config, say=said.append)
    assert said == ["resuming: 24 of 24 rows are done"]
    assert content(made) == before
    assert report["train"]["rows"] == 18
    assert "train: " in runner.describe(report)


def test_other_settings_are_refused(made, values):
    values["sound"]["gain"] = 3.0
    with pytest.raises(ValueError, match=r"begun with other settings: sound.gain was 6.0, now it is 3.0"):  # fmt: skip
        runner.run(made, SynthesisConfig.from_dict(values))


def test_manifests_of_what_is_done_so_far(made, config):
    whole = lines(made, "train.jsonl")
    last = shards.plan(config)[-1]
    os.unlink(made / last.file)
    with pytest.raises(ValueError, match=r"1 shards are missing, the first is shards.train-00004.jsonl"):  # fmt: skip
        shards.finish(made, config)
    shards.finish(made, config, partly=True)
    some = lines(made, "train.jsonl")
    assert some == whole[: len(some)] and len(some) < len(whole)


def test_refusals_are_counted_by_reason(tmp_path, values):
    heard = {"calls": 0}

    def words(wave, rate):
        heard["calls"] += 1
        return "nothing"

    values |= dict(rows=dict(train=12), voice_prompts="both")
    values["filters"] |= dict(max_wer=0.1, words="made up", attempts=2)
    config = SynthesisConfig.from_dict(values)
    # A voice whose first clips are all refused can say nothing.
    judges = Judges(words=words, compare=lambda said, heard: Heard(1.0, False))
    with pytest.raises(ValueError, match="voice .*: none of its first 6 clips stays: words"):
        runner.run(tmp_path / "none", config, judges=judges)
    assert heard["calls"] == 12
    compare = lambda said, heard: Heard(float("is" in said.split()), True)  # noqa: E731
    report = runner.run(tmp_path / "some", config, judges=Judges(words=words, compare=compare))
    found = report["train"]
    assert found["refused"]["words"] >= 3 and found["kept"] >= 1
    assert found["kept"] + sum(found["refused"].values()) == 12
    answers = [row["answer_text"] for row in lines(tmp_path / "some", "train.jsonl")]
    assert not [text for text in answers if "is" in text.split()]


def test_splits_twins_and_lone_voices(tmp_path, values):
    config = SynthesisConfig.from_dict({**values, "rows": dict(train=8, validation=4)})
    directory = tmp_path / "out"
    runner.run(directory, config)
    first, second, held, *_ = shards.plan(config)[1:] + shards.plan(config)[:1]
    train = shards.read(directory, first)
    # A row of validation that asks what training asks, and a row that another one repeats.
    validation = shards.read(directory, held)
    validation[0] = {**train[0], "split": "validation", "id": "validation-0000000", "apart": "fact"}
    shards.write(directory, held, validation)
    again = shards.read(directory, second)
    again[0] = {**train[1], "id": again[0]["id"]}
    shards.write(directory, second, again)
    report = shards.finish(directory, config)
    assert report["validation"]["refused"]["split"] == 1
    assert report["train"]["refused"]["twin"] == 1
    # Without prompts of its own, a voice with one answer has no other to be prompted with.
    alone = [{**train[0], "manifest": {**train[0]["manifest"], "speaker": "alone"}}, *train[1:]]
    shards.write(directory, first, alone)
    assert shards.finish(directory, config)["train"]["refused"]["lone"] >= 1
    assert train[0]["id"] not in [row["id"] for row in lines(directory, "train.jsonl")]


def test_a_voice_that_fails_loses_nothing(tmp_path, config, made, monkeypatch):
    import tones

    true = tones.low
    calls = {"left": 12}

    def failing(text, seed):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise OSError("low is hoarse")
        return true(text, seed)

    monkeypatch.setattr(tones, "low", failing)
    with pytest.raises(OSError, match="hoarse"):
        runner.run(tmp_path / "out", config)
    monkeypatch.setattr(tones, "low", true)
    runner.run(tmp_path / "out", config)
    assert content(tmp_path / "out") == content(made)


KILLED = """
import json, os, signal, sys
from chroma_jax.synthesis import runner
from chroma_jax.synthesis.config import SynthesisConfig
import tones
values, directory = json.loads(sys.argv[1]), sys.argv[2]
config = SynthesisConfig.from_dict(values)
rename = os.replace

def until(last, after):
    # Ends this process, as kill -9 does, when a file gets its name for the `last` time: just before, or just after.
    def replace(source, target):
        nonlocal last
        last -= 1
        if not last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if not last:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace

killed = 0
for i in range(10):
    child = os.fork()
    if not child:
        os.replace = until(5 + i % 4, after=i % 2)
        runner.run(directory, config)
        os._exit(0)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
print(killed)
"""


@pytest.mark.slow
def test_ten_kills_lose_and_repeat_nothing(tmp_path, values, config, tones, made):
    directory = tmp_path / "killed"
    run = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(values), str(directory)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tones}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) == 10
    assert list(directory.glob("shards/*.jsonl"))  # some of the work was done between
    runner.run(directory, config)
    found = {name: data for name, data in content(directory).items() if not name.endswith(".tmp")}
    assert found == content(made)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs apache-beam")
def test_two_workers_of_beam_make_the_same(tmp_path, config, tones, made, monkeypatch):
    path = os.pathsep.join([str(ROOT), str(tones), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    directory = tmp_path / "beam"
    runner.run(directory, config, runner="DirectRunner", runner_options=["--direct_num_workers=2"])
    assert content(directory) == content(made)


def test_without_beam_it_says_so(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "chroma_jax.synthesis.on_beam", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'chroma_jax\[synthesis\]'"):
        runner.run(tmp_path / "out", config, runner="DirectRunner")


def test_takes_are_other_sounds(tmp_path, values):
    values["sound"] |= dict(takes=3)
    values["rows"] = dict(train=8)
    runner.run(tmp_path / "out", SynthesisConfig.from_dict(values))
    assert np.all([row["reason"] is None for row in shards.read(tmp_path / "out", shards.plan(SynthesisConfig.from_dict(values))[0])])  # fmt: skip
