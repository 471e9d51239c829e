"""What the commands share: paths in flags, errors of one short line, and outputs that nobody reads or that lack letters."""

import errno
import importlib
import io
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from chroma_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "chroma_jax").glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text("utf-8")
)


def flags_of(command: str) -> list[flags.FlagValues]:
    """The flags of a command, or of each of its tasks."""
    module, found = importlib.import_module(f"chroma_jax.{command}"), []
    for task in getattr(module, "TASKS", [None]):
        found.append(flags.FlagValues())
        module.define_flags(*filter(None, [task]), values=found[-1])
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_that_take_a_path_open_a_tilde(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for values in flags_of(command):
        names = {name: values[name].flag_type() for name in values}
        paths = [name for name, kind in names.items() if kind == "path"]
        several = [name for name, kind in names.items() if kind.endswith("list of paths")]
        assert paths
        values(
            [
                command,
                *(f"--{name}=~/x" for name in paths),
                *(f"--{name}=~/x,y,~/z" for name in several),
            ]
        )
        assert {values[name].value for name in paths} == {"/home/ada/x"}
        for name in several:
            assert values[name].value == ["/home/ada/x", "y", "/home/ada/z"]


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_that_speak_of_files_take_paths(command):
    for values in flags_of(command):
        wrong = [
            name
            for name in values
            if values[name].flag_type() in ("string", "comma separated list of strings")
            and not name.startswith("config")
            and {"file", "directory", "directories", "folder", "folders", "path"}
            & set(values[name].help.lower().split())
        ]
        assert not wrong


@pytest.mark.parametrize("form", ["one word", "two words"])
def test_a_config_file_in_the_home_directory(tmp_path, monkeypatch, form):
    from chroma_jax import train

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.py").touch()
    argv = (
        ["train", "--config=~/run.py:big"]
        if form == "one word"
        else ["train", "--config", "~/run.py:big"]
    )
    train.check_config_file(argv)
    assert "=".join(argv[1:]).replace("--config=", "") == f"{tmp_path}/run.py:big"


@pytest.mark.parametrize("message", ["x" * 10_000, "first\nsecond\n" * 100], ids=["wide", "tall"])
def test_an_error_is_one_short_line(capsys, message):
    with pytest.raises(SystemExit) as stop:
        cli.fail(message)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert len(line) <= 201


def test_letters_that_the_encoding_lacks_are_escaped():
    raw = io.BytesIO()
    out = cli.LastingOutput(io.TextIOWrapper(raw, encoding="ascii"))
    print("caf\u00e9 \u4f60 \U0001f600", file=out, flush=True)
    assert raw.getvalue() == b"caf\\xe9 \\u4f60 \\U0001f600\n"
    assert out.lost is None


def test_output_that_nobody_reads_is_dropped():
    reading, writing = os.pipe()
    out = cli.LastingOutput(os.fdopen(writing, "w"))
    os.close(reading)
    for _ in range(3):
        print("text", file=out, flush=True)
    assert out.lost.errno == errno.EPIPE
    out.close()  # nothing is left in its buffer


COMMAND = """
import sys
from chroma_jax import cli
def main():
    for _ in range(20000):
        print("text \\u00e9", flush=True)
        print("report", file=sys.stderr)
    open(sys.argv[0] + ".made", "w").close()
cli.run(main)
"""


def run(tmp_path, shell: str, **environment: str) -> tuple[int, str]:
    """Runs COMMAND as $RUN in a line of the shell: what it says, and whether it did its work."""
    program = tmp_path / "program.py"
    program.write_text(COMMAND)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}"],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ
        | {"RUN": f"{sys.executable} {program}", "PYTHONPATH": str(ROOT)}
        | environment,
    )
    assert (tmp_path / "program.py.made").exists()
    return done


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("$RUN 2>/dev/null | head -n 1", 0),
        ("$RUN 2>&1 | head -n 1", 0),
        ("$RUN >&- 2>&-", 0),
        ("$RUN 2>/dev/full >/dev/null", 0),
        ("$RUN 2>/dev/null | grep -c text", 0),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii"])
def test_work_is_done_whoever_reads(tmp_path, shell, code, encoding):
    done = run(tmp_path, shell, PYTHONIOENCODING=encoding)
    assert done.returncode == code
    assert done.stdout.strip() in ("", "text \\xe9", "report", "20000")
    assert not done.stderr


def test_a_full_disk_is_told(tmp_path):
    done = run(tmp_path, "$RUN 2>/dev/stdout >/dev/full | tail -n 1")
    assert done.returncode == 2
    assert done.stdout == "error: standard output could not be written: No space left on device\n"
