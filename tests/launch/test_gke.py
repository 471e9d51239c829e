"""GKE: the exact xpk commands, and what a container makes of them."""

import os
import shlex
import subprocess

import pytest
from launching import ROOT, launch, program, refused, shown

WHERE = ["--cluster=chroma", "--zone=us-east5-b"]
RUN = ["run", *WHERE, "--tpu_type=v6e-64", "--name=first"]


PRICES = {
    "on_demand": ([], "--on-demand"),
    "spot": (["--spot"], "--spot"),
    "reserved": (["--reservation=r"], "--reservation=r"),
}


@pytest.mark.parametrize(("price", "flag"), PRICES.values(), ids=PRICES)
def test_create(tmp_path, price, flag):
    lines = shown(
        "gke",
        "create",
        *WHERE,
        "--project=mine",
        "--tpu_type=v5p-32",
        "--slices=2",
        *price,
        "--xpk=--private",
        "--dry_run",
        cwd=tmp_path,
    )
    assert lines == [
        f"xpk cluster create --cluster=chroma --zone=us-east5-b --project=mine --tpu-type=v5p-32 --num-slices=2 {flag} --private"
    ]


def test_small_actions():
    for action, more, line in (
        ("status", [], "xpk workload list"),
        ("stop", ["--name=first"], "xpk workload delete"),
        ("delete", [], "xpk cluster delete"),
    ):
        want = " ".join([line, *WHERE, *(w.replace("--name", "--workload") for w in more)])
        assert shown("gke", action, *WHERE, *more, "--dry_run") == [want]


def test_run_with_an_image():
    (line,) = shown(
        "gke",
        *RUN,
        "--slices=2",
        "--image=gcr.io/mine/chroma",
        "--restarts=50",
        "--storage=share",
        "--dry_run",
        "prepare",
        "--out=/share/my data",
    )
    assert shlex.split(line) == [
        "xpk", "workload", "create", "--cluster=chroma", "--zone=us-east5-b", "--workload=first", "--tpu-type=v6e-64",
        "--num-slices=2", "--docker-image=gcr.io/mine/chroma", "--max-restarts=50", "--restart-on-exit-codes=1",
        "--termination-grace-period-seconds=300", "--priority=medium", "--storage=share",
        "--command=exec python -m chroma_jax.prepare --distributed '--out=/share/my data'",
    ]  # fmt: skip


# What xpk wraps around a command: SIGTERM goes to the shell that runs it.
CONTAINER = "({command}) & PID=$!; sleep 0.5; kill -TERM $PID; wait $PID; echo code $?"
PYTHON = """
[ "$2" = pip ] && echo "$@" && exit 0
trap 'echo saved; exit 143' TERM
printf '%s\\n' "$@"
for _ in $(seq 100); do sleep 0.05; done
"""


def test_run_puts_the_code_on_an_image(tmp_path):
    remove, copy, line = shown("gke", *RUN, "--dry_run", "train", "--workdir=/share/it's a run")
    folder = shlex.split(remove)[-1]
    assert shlex.split(copy) == ["git", "-C", str(ROOT), "checkout-index", "--all", f"--prefix={folder}/"]  # fmt: skip
    words = shlex.split(line)
    assert "--base-docker-image=python:3.12" in words and f"--script-dir={folder}" in words
    command = words[-1].removeprefix("--command=")
    path = program(tmp_path, "python", PYTHON)
    environment = {"PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", CONTAINER.format(command=command)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "-m pip install --quiet -e .[tpu,train]",
        "-m", "chroma_jax.train", "--distributed", "--workdir=/share/it's a run", "saved", "code 143",
    ]  # fmt: skip


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git repository")
def test_the_code_is_this_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = program(
        tmp_path / "bin",
        "xpk",
        'for word in "$@"; do case $word in --script-dir=*) ls "${word#*=}";; esac; done',
    )
    done = launch("gke", *RUN, "train", path=path)
    assert done.returncode == 0, done.stderr
    assert {"pyproject.toml", "chroma_jax", "configs"} <= set(done.stdout.split())
    assert ".git" not in done.stdout.split()


MISTAKES = {
    "required: ACTION": [],
    "required: --cluster, --zone": ["status"],
    "--zone must be as in": ["status", "--cluster=a", "--zone=b"],
    "got 'My_Cluster'": ["status", "--cluster=My_Cluster", "--zone=us-east5-b"],
    "--tpu_type must be as in": ["create", *WHERE, "--tpu_type=h100"],
    "not allowed with": ["create", *WHERE, "--tpu_type=v6e-64", "--spot", "--reservation=r"],
    "--xpk wants a flag": ["status", *WHERE, "--xpk=private"],
    "required: --name": ["run", *WHERE, "--tpu_type=v6e-64", "train"],
    "required: COMMAND": RUN,
    "generate runs in one process": [*RUN, "--slices=2", "generate"],
    "--distributed is set by the launcher": [*RUN, "train", "--distributed"],
    "--dry_run stands before train": [*RUN, "train", "--dry_run"],
}


@pytest.mark.parametrize(("message", "arguments"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(message, arguments):
    assert message in refused("gke", *arguments)
