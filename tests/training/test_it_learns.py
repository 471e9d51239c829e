"""From sound files to sound files: a model of random weights learns 24 spoken answers and speaks them back.

Everything is what `make demo` runs: the commands' functions, the configurations of configs/, the data that ships with them.
"""

import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

from chroma_jax import Chroma, Voice
from chroma_jax.config import debug
from chroma_jax.data import metadata, records
from chroma_jax.data.prepare import prepare
from chroma_jax.training.creation import create
from chroma_jax.training.loop import train
from chroma_jax.training.run_config import RunConfig

pytest.importorskip("ml_collections")

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DATA = CONFIGS / "debug" / "data.jsonl"
ROWS = [json.loads(line) for line in DATA.read_text().splitlines()]


def run(name, workdir, **paths):
    """A configuration of configs/, with other places for what it reads."""
    values = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]().to_dict()
    values["model"]["checkpoint"] = str(paths["checkpoint"])
    values["data"]["train"] = str(paths["data"])
    return train(RunConfig.from_dict(values), workdir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the metrics of both stages, the trained model's directory, the dataset's)."""
    folder = tmp_path_factory.mktemp("whole")
    create(folder / "start", debug(), DATA, say=print)
    prepare(DATA, folder / "start", folder / "data", devices=jax.devices()[:1])
    reasoner = run(
        "debug_reasoner", folder / "reasoner", checkpoint=folder / "start", data=folder / "data"
    )
    speech = run("debug", folder / "speech", checkpoint=reasoner.model, data=folder / "data")
    return reasoner.train | speech.train, speech.model, folder / "data"


def same_frames(got, want):
    """The share of frames that are equal and in their places."""
    both = min(len(got), len(want))
    return float((got[:both] == want[:both]).all(axis=1).sum() / max(len(got), len(want)))


@pytest.mark.slow
def test_every_answer_is_spoken_back(trained):
    """In the voice of another utterance of the same speaker, greedily; the stop frame ends it where the recording ends."""
    from array_record.python.array_record_module import ArrayRecordReader

    metrics, model, data = trained
    print({name: round(value, 5) for name, value in metrics.items() if "loss" in name})
    assert metrics["text_loss"] < 0.05
    assert metrics["backbone_loss"] < 0.02 and metrics["decoder_loss"] < 0.05
    (shard,) = metadata.read_metadata(data).shards
    reader = ArrayRecordReader(str(data / shard["name"]))
    taught = {record.id: record for record in map(records.decode, reader.read_all())}
    reader.close()
    assert len(taught) == len(ROWS) == 24
    speakers = {name: [r for r in ROWS if r["speaker"] == name] for name in ("slt", "rms", "awb")}
    chroma = Chroma.from_pretrained(model)
    shares = []
    for row in ROWS:
        other = next(r for r in speakers[row["speaker"]] if r is not row)
        voice = Voice(DATA.parent / other["answer_audio"], other["answer_text"])
        reply = chroma.reply(DATA.parent / row["question"], voice=voice, max_seconds=5)
        want = taught[row["id"]].codes[:-1]  # the last one is the stop frame
        shares.append(same_frames(reply.frames, want))
        print(f"{row['id']} {shares[-1]:.1%} of {len(want)} frames  {reply.text}")
        assert reply.text == row["answer_text"]
        assert reply.finish_reason == "stop"
        assert len(reply.frames) == len(want)
        assert len(reply.audio) == 1920 * len(want)
    assert min(shares) >= 0.95, shares


@pytest.mark.slow
def test_another_question_gives_another_answer(trained):
    """What it says is not the same whatever it hears, and not what the voice says."""
    chroma = Chroma.from_pretrained(trained[1])
    voice = Voice(DATA.parent / ROWS[0]["answer_audio"], ROWS[0]["answer_text"])
    texts = [
        chroma.reply(DATA.parent / row["question"], voice=voice, max_seconds=5).text
        for row in ROWS[:6]
    ]
    assert texts == [row["answer_text"] for row in ROWS[:6]]


def test_the_data_is_small_and_fits():
    """24 questions of one speaker, answers of three; every word has room in the speech, at a token for two frames."""
    files = [DATA.parent / row[key] for row in ROWS for key in ("question", "answer_audio")]
    assert len(set(files)) == 48 and sum(file.stat().st_size for file in files) < 3e6
    assert len({row["answer_text"] for row in ROWS}) == 24
    assert np.unique([row["speaker"] for row in ROWS], return_counts=True)[1].tolist() == [8, 8, 8]
