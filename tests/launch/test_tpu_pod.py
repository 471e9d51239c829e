"""Cloud TPU pods: the exact gcloud commands, what the workers' shells make of them, and every state of a pod."""

import os
import shlex
import subprocess

import pytest
from launching import ROOT, is_shell, launch, program, refused, shown

WHERE = ["--name=chroma", "--zone=us-east5-b"]
POD = [*WHERE, "--accelerator=v6e-64"]
TPUS = "gcloud compute tpus"


def words(text):
    return shlex.split(text)


def test_create_asks_the_queue(tmp_path):
    (line,) = shown(
        "tpu_pod",
        "create",
        *POD,
        "--project=mine",
        "--spot",
        "--gcloud=--network=a b",
        "--dry_run",
        cwd=tmp_path,
    )
    assert line == (
        f"{TPUS} queued-resources create chroma --zone=us-east5-b --project=mine --accelerator-type=v6e-64 "
        "--runtime-version=v2-alpha-tpuv6e --node-id=chroma --spot '--network=a b'"
    )


KINDS = {
    "v5litepod-16": "v2-alpha-tpuv5-lite",
    "v5p-32": "v2-alpha-tpuv5",
    "v6e-256": "v2-alpha-tpuv6e",
    "v4-32": "tpu-ubuntu2204-base",
}


@pytest.mark.parametrize(("accelerator", "runtime"), KINDS.items(), ids=KINDS)
def test_create_directly(accelerator, runtime):
    (line,) = shown(
        "tpu_pod",
        "create",
        *WHERE,
        f"--accelerator={accelerator}",
        "--direct",
        "--reserved",
        "--dry_run",
    )
    assert line == (
        f"{TPUS} tpu-vm create chroma --zone=us-east5-b --accelerator-type={accelerator} --version={runtime} --reserved"
    )


def test_a_newer_generation_in_a_zone_for_accelerators():
    """Both were refused by their spelling; the runtime of a generation that is not known here must be named."""
    where = ["--name=chroma", "--zone=us-south1-ai1b"]
    kind = ["--accelerator=tpu7x-64", "--runtime=some-runtime"]
    (line,) = shown("tpu_pod", "create", *where, *kind, "--direct", "--dry_run")
    assert line == (
        f"{TPUS} tpu-vm create chroma --zone=us-south1-ai1b --accelerator-type=tpu7x-64 --version=some-runtime"
    )


def test_create_several_slices():
    (line,) = shown("tpu_pod", "create", *POD, "--slices=4", "--runtime=own", "--dry_run")
    assert "--runtime-version=own --node-count=4 --node-prefix=chroma" in line


def test_small_actions():
    assert shown("tpu_pod", "wait", *WHERE, "--dry_run") == [
        f"{TPUS} queued-resources describe chroma --zone=us-east5-b '--format=value(state.state)'"
    ]
    assert shown("tpu_pod", "delete", *WHERE, "--dry_run") == [
        f"{TPUS} queued-resources delete chroma --zone=us-east5-b --force --quiet"
    ]
    assert shown("tpu_pod", "delete", *WHERE, "--direct", "--dry_run") == [
        f"{TPUS} tpu-vm delete chroma --zone=us-east5-b --quiet"
    ]
    assert shown("tpu_pod", "stop", *WHERE, "--dry_run") == [
        f"{TPUS} tpu-vm ssh chroma --zone=us-east5-b --worker=all '--command=sudo systemctl stop chroma_jax'"
    ]
    (line,) = shown("tpu_pod", "logs", *WHERE, "--slices=2", "--dry_run")
    assert line == (
        f"{TPUS} queued-resources ssh chroma --zone=us-east5-b --node=0 --worker=0 '--command=tail -n 200 -F chroma_jax.log'"
    )
    describe, ssh = shown("tpu_pod", "status", *WHERE, "--dry_run")
    assert " describe " in describe and "systemctl show" in ssh and "--worker=all" in ssh


def test_setup():
    archive, copy, ssh = shown("tpu_pod", "setup", *WHERE, "--nfs=10.0.0.2:/share", "--dry_run")
    assert archive.startswith(f"git -C {ROOT} archive --format=tar.gz --prefix=chroma_jax/")
    assert words(copy)[3:5] == ["tpu-vm", "scp"] and words(copy)[-1] == "--worker=all"
    assert words(archive)[-2] == f"--output={words(copy)[5]}"
    command = words(ssh)[-1].removeprefix("--command=")
    assert is_shell(command)
    assert "-e 'chroma_jax[tpu,train]'" in command and "10.0.0.2:/share /mnt/chroma nfs" in command
    assert "mount" not in shown("tpu_pod", "setup", *WHERE, "--dry_run")[-1]


ARGUMENTS = ["train", "--config=configs/chroma_4b.py", "--workdir=/mnt/chroma/a run", "--x=it's $HOME"]  # fmt: skip


def remote(tmp_path, command, state):
    """(exit code, what the worker ran) of a line of shell, with a service in a state."""
    path = program(
        tmp_path / "bin",
        "sudo",
        f'printf "%s\\n" "$*" >> {tmp_path}/ran\n[ "$1" = systemctl ] && exit 1\nprintf "%s\\n" "$@" > {tmp_path}/argv',
    )
    program(path, "systemctl", f"echo {state}")
    (tmp_path / "ran").write_text("")
    environment = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": "/home/me"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    return done.returncode, (tmp_path / "ran").read_text().splitlines()


def test_run_starts_a_service(tmp_path):
    (line,) = shown("tpu_pod", "run", *WHERE, "--dry_run", *ARGUMENTS)
    assert words(line)[:-1] == [*TPUS.split(), "tpu-vm", "ssh", "chroma", "--zone=us-east5-b", "--worker=all"]  # fmt: skip
    command = words(line)[-1].removeprefix("--command=")
    code, ran = remote(tmp_path, command, "dead")
    assert code == 0 and len(ran) == 3
    argv = (tmp_path / "argv").read_text().splitlines()
    assert argv[:2] == ["systemd-run", "--unit=chroma_jax"]
    assert "--property=StandardOutput=append:/home/me/chroma_jax.log" in argv
    assert argv[argv.index("--") + 1 :] == [
        "/home/me/chroma_jax/.venv/bin/python", "-m", "chroma_jax.train", "--distributed",
        "--config=configs/chroma_4b.py", "--workdir=/mnt/chroma/a run", "--x=it's $$HOME",
    ]  # fmt: skip
    assert remote(tmp_path, command, "running") == (1, [])
    assert remote(tmp_path, command, "auto-restart") == (1, [])
    assert len(remote(tmp_path, command, "exited")[1]) == 3


def test_what_is_not_split_runs_on_the_first_worker():
    (line,) = shown("tpu_pod", "run", *WHERE, "--slices=2", "--dry_run", "convert", "--out=x")
    assert words(line)[6:-1] == ["--zone=us-east5-b", "--node=0", "--worker=0"]
    assert "--distributed" not in line


def test_resume_leaves_what_runs(tmp_path):
    lines = shown("tpu_pod", "resume", *POD, "--nfs=10.0.0.2:/share", "--dry_run", *ARGUMENTS)
    verbs = [words(line)[4] if line.startswith("gcloud") else line.split()[0] for line in lines]
    assert verbs == ["describe", "#", "delete", "create", "describe", "git", "scp", "ssh", "#", "ssh"]  # fmt: skip
    command = words(lines[-1])[-1].removeprefix("--command=")
    for state, runs in {"running": 0, "exited": 0, "dead": 3, "failed": 3}.items():
        code, ran = remote(tmp_path, command, state)
        assert (code, len(ran)) == (0, runs), state


GCLOUD = """
echo "$3 $4" >> {log}
[ "$4" = describe ] || exit 0
state=$(head -n 1 {states}); sed -i 1d {states}
[ "$state" = NOT_FOUND ] && echo "ERROR: NOT_FOUND: none" >&2 && exit 1
echo "$state"
"""
STATES = {
    "active": (["ACTIVE"], ["tpu-vm ssh"]),
    "preempted": (
        ["SUSPENDED", "ACTIVE"],
        ["queued-resources delete", "queued-resources create", "queued-resources describe", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"],
    ),
    "gone": (
        ["NOT_FOUND", "ACTIVE"],
        ["queued-resources create", "queued-resources describe", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"],
    ),
    "queued": (
        ["PROVISIONING", "ACTIVE"],
        ["queued-resources describe", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"],
    ),
}  # fmt: skip


@pytest.fixture
def google(tmp_path):
    log, states = tmp_path / "log", tmp_path / "states"
    path = program(tmp_path / "bin", "gcloud", GCLOUD.format(log=log, states=states))
    program(path, "git", "exit 0")

    def call(answers, *arguments):
        states.write_text("".join(answer + "\n" for answer in answers))
        done = launch("tpu_pod", *arguments, path=path)
        return done, log.read_text().splitlines()

    return call


@pytest.mark.parametrize(("states", "ran"), STATES.values(), ids=STATES)
def test_resume_puts_back_what_is_missing(google, states, ran):
    done, log = google(states, "resume", *POD, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert log == ["queued-resources describe", *ran]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "NOT_FOUND"])
def test_waiting_in_vain(google, state):
    done, log = google([state], "wait", *WHERE)
    assert done.returncode == 1 and log == ["queued-resources describe"]
    assert done.stderr == f"error: chroma will not come: it is {state.replace('NOT_FOUND', 'not there')}\n"  # fmt: skip


MISTAKES = {
    "required: ACTION": [],
    "required: --name, --zone": ["wait"],
    "--zone must be as in us-east5-b, got 'us east'": ["wait", "--name=a", "--zone=us east"],
    "lower-case letters, digits and hyphens": ["wait", "--name=My Pod", "--zone=us-east5-b"],
    "--accelerator must be a generation and a size, as in v6e-64, got 'v6e'": ["create", *WHERE, "--accelerator=v6e"],
    "--accelerator=v5e-16: the runtimes known here are for v4, v5litepod, v5p, v6e; for": ["create", *WHERE, "--accelerator=v5e-16"],
    "--accelerator=tpu7x-64: the runtimes known": ["create", *WHERE, "--accelerator=tpu7x-64"],
    "not allowed with": ["create", *POD, "--spot", "--reserved"],
    "several slices need queued resources": ["create", *POD, "--slices=2", "--direct"],
    "--gcloud wants a flag": ["create", *POD, "--gcloud=network"],
    "--nfs must be as in": ["setup", *WHERE, "--nfs=share; rm"],
    "required: COMMAND": ["run", *WHERE],
    "--distributed is set by the launcher": ["run", *WHERE, "train", "--distributed"],
    "--dry_run stands before train": ["run", *WHERE, "train", "--dry_run"],
}  # fmt: skip


@pytest.mark.parametrize(("message", "arguments"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(message, arguments):
    assert message in refused("tpu_pod", *arguments)
