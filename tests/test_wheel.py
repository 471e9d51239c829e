"""The package as people get it: a wheel, in an environment with nothing but what it asks for, away from this repository."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What is asked for under a name that differs from the module's.
MODULES = {"absl-py": "absl", "etils": "etils", "orbax-checkpoint": "orbax"}


def requirements() -> dict[str, str]:
    """Package -> its requirement, of `pip install chroma_jax` without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {re.match(r"[\w.-]+", wanted)[0]: wanted for wanted in project["dependencies"]}


def test_nothing_is_asked_for_that_inference_does_not_import():
    """Rooms that are for training, evaluation or synthesis do not count."""
    rooms = ("audio", "checkpoint", "config", "engine", "generation", "model")
    files = [f for room in rooms for f in (ROOT / "chroma_jax" / room).rglob("*.py")]
    files += [ROOT / "chroma_jax" / f for f in ("cli.py", "generate.py", "convert.py", "locks.py")]
    source = "\n".join(file.read_text("utf-8") for file in files if file.exists())
    for package in requirements():
        module = MODULES.get(package, package)
        assert re.search(rf"^\s*(import|from) {module}\b", source, re.MULTILINE), package


@pytest.mark.slow
def test_a_wheel_speaks(tmp_path):
    """Most of its minutes are the installation. Packages come from where pip finds them."""
    here = tmp_path / "elsewhere"
    here.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*command: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, timeout=3000
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    run(sys.executable, "-m", "venv", "venv")
    python = str(here / "venv" / "bin" / "python")
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "wheels", str(ROOT))
    (wheel,) = (here / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "chroma_jax/generate.py" in names and not any(n.startswith("tests/") for n in names)
    run(python, "-m", "pip", "install", "--quiet", str(wheel))
    where = run(python, "-c", "import chroma_jax; print(chroma_jax.__file__)").stdout
    assert where.startswith(str(here / "venv"))
    installed = run(python, "-m", "pip", "list", "--format=freeze").stdout.lower()
    for heavy in ("torch==", "transformers==", "tensorflow==", "grain==", "optax=="):
        assert f"\n{heavy}" not in installed or heavy == "optax=="  # flax asks for optax itself
    spoken = run(python, "-m", "chroma_jax.generate", "--config=tiny", "--compilation_cache=")
    assert "random weights (--config=tiny): what follows is noise" in spoken.stderr
    assert "audio: 2.00 s -> reply.wav" in spoken.stderr
    assert (here / "reply.wav").stat().st_size == 44 + 2 * 2 * 24000
