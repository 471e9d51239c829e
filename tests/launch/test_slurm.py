"""The batch script: its options, its quoting, and what it does when a run was stopped, failed or done."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from launching import ROOT, is_shell, launch, program, refused, shown

JOB = ["--nodes=2", "--gpus_per_node=4", "--time=24:00:00"]


def test_the_script(tmp_path):
    lines = shown(
        "slurm",
        *JOB,
        "--partition=gpu",
        "--cpus_per_task=8",
        "--sbatch=--mem=0",
        "--dry_run",
        "train",
        "--workdir=my run",
        cwd=tmp_path,
    )
    assert is_shell("\n".join(lines))
    assert lines[:15] == [
        "#!/bin/bash",
        "#SBATCH --job-name=chroma",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --time=24:00:00",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@300",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --partition=gpu",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=0",
        "set -euo pipefail",
        "status=0",
    ]
    want = [
        "srun",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=8",
        sys.executable,
        "-m",
        "chroma_jax.train",
        "--distributed",
        "--workdir=my run",
    ]
    assert shlex.split(lines[15].removesuffix(" || status=$?")) == want
    assert not any("JAX_LOCAL_DEVICE_IDS" in line for line in lines)


def test_one_process_per_node_has_all_its_gpus():
    lines = shown("slurm", *JOB, "--per=node", "--dry_run", "prepare")
    assert "#SBATCH --ntasks-per-node=1" in lines
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3" in lines


def test_without_gpus():
    lines = shown("slurm", "--gpus_per_node=0", "--time=60", "--dry_run", "convert", "--out=x")
    assert "#SBATCH --ntasks-per-node=1" in lines
    assert not any("gpu" in line or "DEVICE" in line or "--distributed" in line for line in lines)


MISTAKES = {
    "required: --gpus_per_node, --time, COMMAND": [],
    "--time must be as in": ["--gpus_per_node=1", "--time=tomorrow", "train"],
    "a whole number from 1 on is wanted, got '-1'": [*JOB, "--nodes=-1", "train"],
    "--partition must have no spaces or quotes, got 'a b'": [*JOB, "--partition=a b", "train"],
    "--sbatch wants an option of sbatch": [*JOB, "--sbatch=mem", "train"],
    "generate runs in one process": [*JOB, "generate"],
    "--coordinator is set by the launcher": [*JOB, "train", "--coordinator=x:1"],
    "--dry_run stands before": [*JOB, "train", "--dry_run"],
}


@pytest.mark.parametrize(("message", "arguments"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(message, arguments):
    assert message in refused("slurm", *arguments)


def test_sbatch_gets_the_script(tmp_path):
    path = program(tmp_path / "bin", "sbatch", f"cat > {tmp_path}/script; echo Submitted 7")
    done = launch("slurm", *JOB, "train", "--workdir=my run", path=path)
    assert (done.returncode, done.stdout) == (0, "Submitted 7\n")
    script = "\n".join(shown("slurm", *JOB, "--dry_run", "train", "--workdir=my run")) + "\n"
    assert (tmp_path / "script").read_text() == script
    program(tmp_path / "bin", "sbatch", "exit 3")
    assert launch("slurm", *JOB, "train", path=path).returncode == 3


def test_without_slurm(tmp_path):
    done = launch("slurm", *JOB, "train", path=tmp_path)
    assert done.returncode == 2 and "sbatch is not installed" in done.stderr


ENDS = {
    "done": (0, 0, False),
    "stopped": (143, 0, True),
    "stopped_too_often": (143, 5, False),
    "failed": (1, 0, False),
    "called_wrongly": (2, 0, False),
}


@pytest.mark.parametrize(("code", "restarts", "again"), ENDS.values(), ids=ENDS)
def test_what_was_stopped_queues_again(tmp_path, code, restarts, again):
    setup = ["--setup=export WHERE='a b'", '--setup=echo "$UNSET$WHERE"']
    script = "\n".join(shown("slurm", *JOB, *setup, "--requeues=5", "--dry_run", "train"))
    path = program(tmp_path, "srun", f'echo run; [ "$WHERE" = "a b" ] && exit {code}')
    program(tmp_path, "scontrol", 'echo "$@"')
    slurm = {"PATH": f"{path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    if restarts:
        slurm["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, env=slurm)
    assert done.returncode == code
    assert done.stdout.splitlines() == ["a b", "run"] + (["requeue 7"] if again else [])


# Two tasks on this machine, with the variables by which JAX recognises SLURM.
SRUN = """
shift 1
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""


@pytest.mark.slow
def test_processes_find_each_other(tmp_path):
    row = {
        "question_text": "What is %d?",
        "answer_text": "and mister john",
        "answer_audio": str(ROOT / "tests/data/voice_librivox_0870.wav"),
    }
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) % i + "\n" for i in range(2)))
    script = "\n".join(
        shown("slurm", "--gpus_per_node=2", "--time=10", "--dry_run", "prepare", "--manifest=data.jsonl",
              f"--checkpoint={ROOT / 'tests/data/chroma-tiny'}", "--out=my data", "--shard_size=1", "--batch_seconds=16")
    )  # fmt: skip
    path = program(tmp_path / "bin", "srun", SRUN)
    slurm = os.environ | {"PATH": f"{path}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid())}
    slurm |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache/xla")}
    done = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, env=slurm, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 records in" in done.stderr
    assert done.stderr.count("shards of other processes are missing") <= 1
