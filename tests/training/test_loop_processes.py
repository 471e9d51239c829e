"""Two processes on one machine train and save; one process goes on from there on another mesh."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
import small_run

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
            sys.executable, "-u", "-m", "chroma_jax.train", f"--config={config_file}", f"--workdir={workdir}",
            "--export=never", *arguments,
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


def finish(*processes):
    """What the first said; the others are silent."""
    ends = [process.communicate(timeout=240) for process in processes]
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, err
    assert not any("step" in out for out, _ in ends[1:])
    return ends[0][0]


def losses(said):
    found = re.findall(r"^step (\d+)/\d+  loss ([\d.]+)", said, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def test_two_processes_are_one_and_resume_as_one(config_file, tmp_path):
    alone = losses(finish(start(config_file, tmp_path / "alone")))
    said = finish(*start_two(config_file, tmp_path / "two", "--config.steps=3"))
    together = losses(said)
    rest = finish(start(config_file, tmp_path / "two"))
    assert "resuming after step 3" in rest
    together |= losses(rest)
    assert sorted(together) == sorted(alone) == [1, 2, 3, 4, 5, 6]
    assert together == pytest.approx(alone, abs=2e-4)


def test_sigterm_to_two_processes(config_file, tmp_path):
    forever = ["--config.steps=1000000", "--config.save_every=1000000"]
    processes = start_two(config_file, tmp_path / "run", *forever)
    for line in processes[0].stdout:
        if line.startswith("step 2/"):
            break
    time.sleep(0.2)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    said = finish(*processes)
    (step,) = small_run.saved_steps(tmp_path / "run")
    assert f"stopped by SIGTERM after step {step}, which is saved" in said
