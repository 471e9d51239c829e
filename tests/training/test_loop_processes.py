"""Two processes on one machine train and save; one process goes on from there on another mesh."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small_run

from chroma_jax.audio.wav import load_audio
from chroma_jax.checkpoint import load, params

pytestmark = pytest.mark.slow

CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({values!r})
"""


@pytest.fixture
def config_file(dataset, golden_dir, tmp_path):
    path = tmp_path / "config.py"
    mesh = dict(data=1, fsdp=-1, tensor=1)
    values = small_run.values(dataset, golden_dir, train__mesh=mesh, log_every=1)
    path.write_text(CONFIG.format(values=values))
    return path


def start(config_file, workdir, *arguments):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    return subprocess.Popen(
        [
            sys.executable, "-u", "-m", "chroma_jax.train", f"--config={config_file}", f"--workdir={workdir}", *arguments,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def start_two(config_file, workdir, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = ["--distributed", f"--coordinator=localhost:{port}", "--num_processes=2"]
    return [
        start(config_file, workdir, *cluster, f"--process_id={i}", *arguments) for i in range(2)
    ]


def finish(*processes, code=0):
    """What the first said; the others are silent. All end with the same exit code."""
    ends = [process.communicate(timeout=900) for process in processes]
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == code, err
    assert not any("step" in out for out, _ in ends[1:])
    return ends[0][0]


def losses(said):
    found = re.findall(r"^step (\d+)/\d+  loss ([\d.]+)", said, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def test_two_processes_are_one_and_resume_as_one(config_file, tmp_path):
    flags = ["--export=never", "--config.sample_every=3"]
    straight = finish(start(config_file, tmp_path / "alone", *flags))
    alone = losses(straight)
    said = finish(*start_two(config_file, tmp_path / "two", "--config.steps=3", *flags))
    together = losses(said)
    # The Reasoner's words, spoken by all processes and written by one.
    words = re.compile(r'^step 3/\d+  (reply to r\d: ".*" \()', re.MULTILINE)
    assert words.findall(said) == words.findall(straight) and len(words.findall(said)) == 2
    for folder in ("record", "step_000003"):
        heard = [
            load_audio(tmp_path / run / "samples" / folder / "0.wav", 24000)
            for run in ("two", "alone")
        ]
        assert len(heard[0]) and np.isfinite(heard[0]).all()
        if folder == "record":
            np.testing.assert_allclose(*heard, rtol=0, atol=1e-4)
    rest = finish(start(config_file, tmp_path / "two", "--export=never"))
    assert "resuming after step 3" in rest
    together |= losses(rest)
    assert sorted(together) == sorted(alone) == [1, 2, 3, 4, 5, 6]
    assert together == pytest.approx(alone, abs=2e-4)


def test_two_processes_write_the_model_that_one_writes(config_file, tmp_path, golden_dir):
    said = finish(*start_two(config_file, tmp_path / "run", "--config.steps=3"))
    model = tmp_path / "run" / "model"
    assert f"the trained model is in {model}" in said
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "model", "tensorboard"]
    os.rename(model, tmp_path / "by_two")
    finish(start(config_file, tmp_path / "run", "--config.steps=3", "--export=now"))
    (sizes, two, _), (_, one, _) = load(tmp_path / "by_two"), load(model)
    _, before, _ = load(golden_dir)
    two, one, before = (params.flatten(of) for of in (two, one, before))
    assert two.keys() == one.keys() == before.keys()
    for path, array in two.items():
        np.testing.assert_array_equal(array, one[path], err_msg=path)
    assert (two["backbone/head"] != before["backbone/head"]).mean() > 0.9
    # Written again over what is there, by two processes, without a step.
    said = finish(*start_two(config_file, tmp_path / "run", "--export=now"))
    assert load(model).config == sizes


def test_sigterm_to_two_processes(config_file, tmp_path):
    forever = ["--config.steps=1000000", "--config.save_every=1000000"]
    processes = start_two(config_file, tmp_path / "run", *forever)
    for line in processes[0].stdout:
        if line.startswith("step 2/"):
            break
    time.sleep(0.2)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    said = finish(*processes, code=128 + signal.SIGTERM)
    (step,) = small_run.saved_steps(tmp_path / "run")
    assert f"stopped by SIGTERM after step {step}, which is saved" in said
