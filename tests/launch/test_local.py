"""Processes on one machine: their command lines and environments, signals, exit codes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from launching import LAUNCH, ROOT, launch, refused, shown
from training import small_run

CPU = ["--processes=2", "--cpu_devices=1"]


def test_dry_run_of_one_process(tmp_path):
    (line,) = shown("local", "--dry_run", "train", "--config=a", "--workdir=my run", cwd=tmp_path)
    want = [sys.executable, "-m", "chroma_jax.train", "--config=a", "--workdir=my run"]
    assert shlex.split(line) == want


def test_dry_run_of_two_on_cpu():
    for i, line in enumerate(shown("local", *CPU, "--port=1234", "--dry_run", "prepare", "--out=my data")):  # fmt: skip
        assert shlex.split(line) == [
            "env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=1",
            sys.executable, "-m", "chroma_jax.prepare", "--distributed", "--coordinator=localhost:1234",
            "--num_processes=2", f"--process_id={i}", "--out=my data",
        ]  # fmt: skip
    assert i == 1


def test_gpus_are_divided():
    lines = shown("local", "--processes=2", "--gpus=4,5,6,7", "--dry_run", "train")
    assert [shlex.split(line)[1] for line in lines] == ["CUDA_VISIBLE_DEVICES=4,5", "CUDA_VISIBLE_DEVICES=6,7"]  # fmt: skip
    ports = {word for line in lines for word in shlex.split(line) if "--coordinator" in word}
    assert len(ports) == 1


MISTAKES = {
    "required: COMMAND": [],
    "invalid choice: 'trai'": ["trai"],
    "a whole number from 1 on is wanted, got '0'": ["--processes=0", "train"],
    "does not divide the 3 of --gpus": ["--processes=2", "--gpus=0,1,2", "train"],
    "different numbers with commas": ["--gpus=0,0", "train"],
    "numbers with commas between them, got 'all'": ["--gpus=all", "train"],
    "need --gpus or --cpu_devices": ["--processes=2", "train"],
    "not allowed with argument --gpus": ["--gpus=0", "--cpu_devices=1", "train"],
    "generate runs in one process": [*CPU, "generate"],
    "--distributed is set by the launcher": ["train", "--distributed"],
    "--process_id is set by the launcher": [*CPU, "prepare", "--process_id=1"],
    "--dry_run stands before train": ["train", "--dry_run"],
    "unrecognized": ["--proc=2", "train"],
}


@pytest.mark.parametrize(("message", "arguments"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(message, arguments):
    if message == "unrecognized":  # an option cut short is none
        assert "--proc" in refused("local", *arguments)
    else:
        assert message in refused("local", *arguments)


@pytest.mark.parametrize("script", ["local", "slurm", "tpu_pod", "gke"])
def test_help(script, tmp_path):
    done = launch(script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and f"launch/{script}.py" in done.stdout


# Stands in for chroma_jax: says how it was called, then does as its first argument says.
STUB = """
import json, os, signal, sys, time
process = next((a[-1] for a in sys.argv if "process_id" in a), "0")
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, f"{process} saved\\n".encode()), sys.exit(143)))
os.write(1, (json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if "JAX" in k}]) + "\\n").encode())
if "--fail" in sys.argv and process == "1":
    sys.exit(7)
if "--wait" in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "chroma_jax").mkdir()
    (tmp_path / "chroma_jax/__init__.py").touch()
    (tmp_path / "chroma_jax/train.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_processes_run_as_shown(stub):
    done = launch("local", *CPU, "--port=1", "train", "--workdir=my run", cwd=stub)
    assert done.returncode == 0
    said = sorted(json.loads(line) for line in done.stdout.splitlines())
    for i, (arguments, environment) in enumerate(said):
        assert arguments[-2:] == [f"--process_id={i}", "--workdir=my run"]
        assert environment["JAX_PLATFORMS"] == "cpu" and environment["JAX_NUM_CPU_DEVICES"] == "1"
    assert len(said) == 2


def test_one_that_fails_ends_the_others(stub, monkeypatch):
    quick = f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); import local; local._GRACE_SECONDS = 0.3; sys.exit(local.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", quick, *CPU, "--port=1", "train", "--fail", "--wait"],
        capture_output=True, text=True, cwd=stub, timeout=30,
    )  # fmt: skip
    assert done.returncode == 7
    assert "saved" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signals_are_passed_on(stub, number):
    process = subprocess.Popen(
        [sys.executable, LAUNCH / "local.py", *CPU, "--port=1", "train", "--wait"],
        stdout=subprocess.PIPE, text=True, cwd=stub,
    )  # fmt: skip
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert sorted(said.splitlines()) == ["0 saved", "1 saved"]


CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({values!r})
"""


@pytest.mark.slow
def test_two_processes_prepare_and_train(tmp_path, golden_dir):
    """From sound files to a trained model, stopped in between."""
    sound = str(ROOT / "tests/data/voice_librivox_0870.wav")
    rows = [
        {"question_text": f"What is {i}?", "answer_text": "and mister john", "answer_audio": sound}
        for i in range(4)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mesh = dict(data=1, fsdp=-1, tensor=1)
    values = small_run.values("my data", golden_dir, train__mesh=mesh, log_every=1)
    (tmp_path / "config.py").write_text(CONFIG.format(values=values))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache/xla")}

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-u", LAUNCH / "local.py", *CPU, *arguments],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    prepare = start(
        "prepare",
        "--manifest=data.jsonl",
        f"--checkpoint={golden_dir}",
        "--out=my data",
        "--shard_size=1",
        "--batch_seconds=16",
    )
    _, errors = prepare.communicate(timeout=300)
    assert prepare.returncode == 0, errors
    assert "4 records in" in errors
    train = ["train", "--config=config.py", "--workdir=a run"]
    forever = start(*train, "--config.steps=1000000", "--config.save_every=1000000")
    for line in forever.stdout:
        if line.startswith("step 2/"):
            break
    forever.send_signal(signal.SIGTERM)
    said, errors = forever.communicate(timeout=300)
    assert forever.returncode == 143, errors
    step = int(re.search(r"stopped by SIGTERM after step (\d+), which is saved", said)[1])
    rest = start(*train, f"--config.steps={step + 2}")
    said, errors = rest.communicate(timeout=300)
    assert rest.returncode == 0, errors
    assert f"resuming after step {step}" in said
    assert (tmp_path / "a run/model/chroma_jax.json").exists()
