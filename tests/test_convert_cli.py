"""The command: what it prints, what it returns."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parent / "data" / "chroma-tiny"


def command(*args):
    return [sys.executable, "-m", "chroma_jax.convert", *map(str, args)]


def run(*args):
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=300)


def test_there_and_back(tmp_path):
    there = run(f"--source={GOLDEN}", f"--out={tmp_path}/converted")
    assert there.returncode == 0, there.stderr
    lines = there.stderr.strip().splitlines()
    assert lines[0] == "skipped the vision tower, which Chroma never uses: 22 tensors, 0.3 MB saved"
    assert lines[-1].startswith(f"wrote {tmp_path}/converted in ")
    assert len(lines) == 2  # not a word of Orbax's

    back = run("--export", f"--source={tmp_path}/converted", f"--out={tmp_path}/exported")
    assert back.returncode == 0, back.stderr
    got = safetensors.numpy.load_file(tmp_path / "exported" / "model.safetensors")
    want = safetensors.numpy.load_file(GOLDEN / "model.safetensors")
    assert set(want) - set(got) == {name for name in want if name.startswith("thinker.visual.")}
    assert all(np.array_equal(x, want[name]) for name, x in got.items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--source is missing"),
        (["--source=x"], "--out is missing"),
        (["--source=x", "--out={tmp}/out", "--export", "--dtype=bfloat16"], "it takes no --dtype"),
        (["--source=x", "--out={tmp}/out", "--export", "--quantize=fp8"], "it takes no --quantize"),
        (["--source=x", "--out={tmp}/out", "--dtype=int8"], "dtype"),
        (["--source={tmp}/gone", "--out={tmp}/out"], "no such directory: {tmp}/gone"),
        (["--source=" + str(GOLDEN), "--out=/dev/null/out"], "cannot write to /dev/null/out"),
    ],
    ids=[
        "nothing",
        "no_out",
        "export_dtype",
        "export_quantize",
        "odd_dtype",
        "no_source",
        "unwritable",
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, args, message):
    got = run(*(arg.format(tmp=tmp_path) for arg in args))
    assert got.returncode == 2
    assert got.stdout == ""
    assert len(got.stderr.splitlines()) == 1
    assert got.stderr.startswith("error: ")
    assert message.format(tmp=tmp_path) in got.stderr
    assert os.listdir(tmp_path) == []


def test_many_problems_are_listed_before_the_error(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    tensors = {"a": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    got = run(f"--source={source}", f"--out={tmp_path}/out")
    lines = got.stderr.splitlines()
    assert got.returncode == 2
    assert lines[-1] == f"error: {source}: 254 problems with its tensors:"
    assert len(lines) == 7
    assert lines[-2].strip() == "... and 249 more"
    assert os.listdir(tmp_path) == ["source"]


def test_sigterm_sweeps_up(tmp_path):
    """The source is a pipe that never ends: the process is caught at work, its stage made."""
    source = tmp_path / "source"
    source.mkdir()
    os.mkfifo(source / "config.json")
    with subprocess.Popen(command(f"--source={source}", f"--out={tmp_path}/out")) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / ".out.incomplete").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / ".out.incomplete").exists()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == ["source"]
