"""gs:// from manifest to model, on an emulator of Google's storage; and what is refused before any work.

Orbax's TensorStore, ArrayRecord and gcsfs each talk to the emulator as they talk to Google, over HTTP.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from absl import flags

from chroma_jax import cli, paths
from chroma_jax.data.prepare import prepare

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("path", ["gs://b/x", "s3://b", "memory://x/y"])
def test_schemes_are_no_paths(path):
    assert paths.is_remote(path) and not paths.is_remote(f"./{path}")


NO_SCHEMES = ["data/x", "/a:b//c", "C:/x", "hf/model", "a=0.5"]


@pytest.mark.parametrize("path", NO_SCHEMES)
def test_what_is_no_scheme(path):
    assert not paths.is_remote(path)
    paths.check_remote(path)


def test_what_is_not_supported_is_refused_at_once(tmp_path, monkeypatch, golden_dir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="s3://... is not supported: a path, or gs://"):
        prepare("data.jsonl", golden_dir, "s3://bucket/data")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gs:// needs gcsfs: pip install 'chroma_jax\[gcs\]'"):
        paths.absolute("gs://bucket/run")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("remote", "value", "message"),
    [
        (False, "gs://bucket/r.wav", "a path of a file system is wanted here"),
        (True, "s3://bucket/r", "s3://... is not supported"),
    ],
)
def test_flags(remote, value, message):
    values = flags.FlagValues()
    cli.path_flag("out", None, "where to", values, remote=remote)
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        values(["command", f"--out={value}"])
    values(["command", "--out=here"])
    assert values.out == "here"


SERVER = """
import sys, time
from gcp_storage_emulator.server import create_server
create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
print("up", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def store():
    """The environment of programs that are to use the emulator."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:  # fmt: skip
        assert server.stdout.readline() == "up\n"
        yield os.environ | dict(
            STORAGE_EMULATOR_HOST=address,  # gcsfs, google-cloud-storage
            TENSORSTORE_GCS_HTTP_URL=address,  # Orbax
            CLOUD_STORAGE_EMULATOR_ENDPOINT=address,  # ArrayRecord
            GOOGLE_CLOUD_PROJECT="test",
            JAX_PLATFORMS="cpu",
            JAX_COMPILATION_CACHE_DIR=str(ROOT / ".pytest_cache/xla"),
        )
        server.kill()


CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({values!r})
"""


@pytest.mark.slow
def test_from_sound_files_to_a_model(store, tmp_path, golden_dir, voice_path):
    """convert, prepare, train, train again, and the model's answer: everything that is written lies in gs://."""
    from training import small_run

    def run(command, *arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-m", f"chroma_jax.{command}", *arguments],
            capture_output=True, text=True, cwd=tmp_path, timeout=1200,
            env=store | dict(PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", XDG_CACHE_HOME=str(tmp_path / "cache")),
        )  # fmt: skip
        assert done.returncode == code, done.stderr[-4000:]
        return done.stdout + done.stderr

    rows = [
        {"question_text": f"What is {i}?", "answer_text": "and mister john", "answer_audio": str(voice_path)}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("convert", f"--source={golden_dir}", "--out=gs://bucket/start")
    said = run("convert", f"--source={golden_dir}", "--out=gs://bucket/start", code=2)
    assert "gs://bucket/start exists and is not empty; --overwrite replaces it" in said
    prepare = ["prepare", "--manifest=data.jsonl", "--checkpoint=gs://bucket/start", "--out=gs://bucket/data", "--shard_size=2", "--batch_seconds=16"]  # fmt: skip
    assert "4 records in gs://bucket/data" in run(*prepare)
    assert "gs://bucket/data is complete" in run(*prepare)
    values = small_run.values("gs://bucket/data", "gs://bucket/start", log_every=1, save_every=1, sample_every=2, sample_seconds=0.5)  # fmt: skip
    (tmp_path / "config.py").write_text(CONFIG.format(values=values))
    train = ["train", "--config=config.py", "--workdir=gs://bucket/run"]
    first = run(*train, "--config.steps=2", "--export=never")
    assert "step 2/2  loss" in first and "reply to line-" in first
    rest = run(*train, "--config.steps=3")
    assert (
        "resuming after step 2" in rest and "the trained model is in gs://bucket/run/model" in rest
    )
    assert "could not be written" not in first + rest
    straight = run("train", "--config=config.py", "--workdir=there", "--config.steps=3", "--export=never")  # fmt: skip

    def losses(text):
        return [line.split()[3] for line in text.splitlines() if line.startswith("step ") and " loss " in line]  # fmt: skip

    assert losses(first) + losses(rest) == losses(straight)
    run("generate", "--checkpoint=gs://bucket/run/model", f"--question={voice_path}", f"--voice={voice_path}",
        "--voice_text=and mister john", "--max_seconds=0.5", "--out=reply.wav")  # fmt: skip
    names = sorted(os.listdir(tmp_path))
    assert names == ["cache", "config.py", "data.jsonl", "reply.wav", "there"]
