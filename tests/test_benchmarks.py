"""The programs in benchmarks/ run on a tiny model and write what they measured."""

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chroma_jax.config import tiny
from chroma_jax.engine.state import Finish
from chroma_jax.model.chroma import abstract_model

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
PROGRAMS = ("all", "latency", "peers", "roofline", "start_up", "training")


@pytest.fixture(scope="module", autouse=True)
def folder():
    """The programs import each other by their bare names, as they do when they are run."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def program(name):
    """Not by its bare name, which a folder of tests may have, too."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subject(folder):
    common = importlib.import_module("common")
    return common.open_subject(common.parser("").parse_args(["--size=tiny"]))


@pytest.fixture
def quick(subject, monkeypatch, tmp_path):
    """Runs a program on the one tiny model and returns its tables."""
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "open_subject", lambda args: subject)

    def run(name, *flags):
        program(name).main(["--size=tiny", "--quick", f"--out={tmp_path}", *flags])
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"versions", "device", "commit", "command", "notes", "peak memory"} <= content.keys()
        return content["tables"]

    return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        program(name).main(["--help"])
    assert stopped.value.code == 0
    assert "--size" in capsys.readouterr().out


def test_made_up_weights_have_the_model_s_shapes(subject):
    want = jax.tree.leaves(abstract_model(tiny()).codec)
    got = jax.tree.leaves(subject.model.codec)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]
    table = np.asarray(subject.model.reasoner.embedding[...])
    assert 0.015 < table.std() < 0.025
    assert abs(table.mean()) < 1e-3
    assert len(np.unique(table)) > 0.9 * table.size


def test_a_forced_reply_neither_ends_its_text_nor_stops(subject):
    hidden = np.random.default_rng(0).standard_normal((4096, 64), np.float32)
    text = jnp.argmax(subject.model.reasoner.logits(jnp.asarray(hidden)), axis=-1)
    codes = jnp.argmax(subject.model.backbone.logits(jnp.asarray(hidden)), axis=-1)
    assert subject.config.im_end_token_id not in np.asarray(text)
    assert subject.config.codebook_eos_token_id not in np.asarray(codes)
    assert len(np.unique(text)) > 100


def test_latency_and_roofline(quick, subject):
    common = importlib.import_module("common")
    tables = quick("latency", "--only=start_up", "--only=streams", "--streams=1")
    (start,) = tables["Start-up"]["rows"]
    assert start["second beat, s"] > 0
    (streams,) = (t["rows"] for name, t in tables.items() if name.startswith("Streams"))
    assert [row["streams"] for row in streams] == [1]
    assert streams[0]["beat, p95 ms"] >= streams[0]["beat, median ms"] > 0
    # The text ends where it is told to, and the speech goes on.
    live = common.Live(subject, common.make_prompt(subject.config, 1, 2.0, 2.0), 10)
    live.run(5, text_beats=2)
    assert int(live.state.num_tokens[0]) == 2
    assert live.state.finish[0] == Finish.LENGTH
    tables = quick("roofline")
    (beat,) = (t["rows"] for name, t in tables.items() if name.startswith("One beat"))
    assert [row["stage"] for row in beat[:4]] == ["Reasoner", "Backbone", "Decoder", "Codec"]
    assert beat[4]["MB"] == pytest.approx(sum(row["MB"] for row in beat[:4]))
    # A beat reads all weights of the Backbone's layers twice.
    layers = sum(x.nbytes for x in jax.tree.leaves(subject.model.backbone.llama))
    assert beat[1]["MB"] * 1e6 > 2 * layers
    assert all(row["GFLOP"] > 0 for row in beat)


def test_first_sound(quick):
    flags = ("--only=first_sound", "--spoken=2", "--question=2", "--voice=2")
    table, pieces = quick("latency", *flags).values()
    assert [row["how"].split(",")[0] for row in table["rows"]] == [
        "whole recording",
        "whole recording",
        "heard while it is spoken",
    ]
    assert all(row["p95, ms"] >= row["median, ms"] > 0 for row in table["rows"])
    work = [row["work while it is spoken, ms per s"] for row in table["rows"]]
    assert work[:2] == [0, 0]
    assert work[2] > 0
    assert len(pieces["rows"]) == 4


def test_growth(quick, subject):
    parts = ("--only=replies", "--only=questions", "--only=memory")
    tables = quick("latency", *parts, "--replies=0.5,8", "--questions=1,2,4", "--streams=1,3")
    replies, by_size, questions, memory = (table["rows"] for table in tables.values())
    assert [row["beats"] for row in replies] == [3, 50]
    assert sum(row["beats"] for row in by_size) + len(by_size) == 50
    assert [row["positions"] for row in questions] == [70, 95, 145]
    assert "A straight line through them" in tables["Longer questions, one stream"]["note"]
    for row, streams in zip(memory, (1, 3), strict=True):
        assert row["counted, state, MB"] == pytest.approx(row["live arrays, more by, MB"])
        assert row["Backbone's cache, MB"] == pytest.approx(streams * 0.131072)  # 256 positions


def test_spans_are_counted_once():
    spans = [(5.0, 6.0), (0.0, 2.0), (0.5, 1.0), (1.5, 3.0)]
    assert program("start_up")._covered(spans) == 4.0


@pytest.mark.slow
def test_training(quick):
    ((step,),) = (table["rows"] for table in quick("training", "--rows=2").values())
    assert step["Backbone positions per s"] > 0
    assert step["TFLOP of a step"] > 0


@pytest.mark.slow
def test_peers(quick):
    pytest.importorskip("torch")
    pytest.importorskip("transformers.models.csm")
    flags = ("--frames=4", "--rounds=1", "--threads=1")
    (table,) = quick("peers", *flags).values()
    assert "did not run" not in table["note"]
    assert len(table["rows"]) == 5
    assert all(row["median, ms"] > 0 for row in table["rows"])


def test_all_goes_on_when_a_part_fails_or_hangs(tmp_path):
    everything = program("all")
    ends = [
        everything.run("part", [sys.executable, "-c", code], seconds, {})["ended"]
        for code, seconds in (("", 20), ("raise SystemExit(3)", 20), ("while True: pass", 0.2))
    ]
    assert ends[:2] == ["done", "failed with exit code 3"]
    assert ends[2].startswith("stopped after")


@pytest.mark.slow
def test_all_on_a_tiny_model(tmp_path):
    call = [sys.executable, FOLDER / "all.py", "--size=tiny", "--quick", f"--out={tmp_path}"]
    done = subprocess.run([*call, "--seconds=900"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("all", "latency", "roofline", "parity", "start_up", "training"):
        assert json.loads((tmp_path / f"{name}.json").read_text())
