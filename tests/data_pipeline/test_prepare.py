"""prepare: the records' arrays are the models' own, every interruption is made good, every mistake told."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpus import OPTIONS, read_records, same, write_corpus

from chroma_jax.audio.wav import load_audio
from chroma_jax.checkpoint.torch_files import TorchFiles
from chroma_jax.data import metadata as md
from chroma_jax.data import shards
from chroma_jax.data.manifest import read_manifest
from chroma_jax.data.prepare import BadRowsError, Options, prepare
from chroma_jax.engine import programs

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(manifest):
    return read_manifest(manifest).rows


@pytest.fixture(scope="module")
def prepared(dataset_dir):
    return read_records(dataset_dir)


def test_records_hold_what_the_processor_and_the_codec_make(prepared, rows, golden):
    assert [record.id for record in prepared] == [f"r{i}" for i in range(10)]
    for record, row in zip(prepared, rows, strict=True):
        question = golden.processor.question(list(row.turns))
        np.testing.assert_array_equal(record.question_ids, question.ids)
        np.testing.assert_array_equal(
            record.mel, np.concatenate([np.zeros((0, 128)), *question.mels])
        )
        assert golden.processor.tokenizer.decode(record.text[:-1]) == row.answer_text
        assert record.text[-1] == golden.config.im_end_token_id
        wave = load_audio(row.answer_audio, 24000)
        # Encoded in a batch of mixed lengths, equal to encoding alone.
        np.testing.assert_array_equal(record.codes[:-1], programs.encode_voice(golden.model, wave))
        assert not record.codes[-1].any()
        assert record.speaker == row.speaker
        assert record.answer_seconds == len(wave) / 24000
        assert record.reference_frames == len(record.codes) - 1
        np.testing.assert_array_equal(record.reference_ids, record.text[:-1])
    six = prepared[6]
    assert golden.processor.tokenizer.decode(six.voice_ids) == "then leisure"
    np.testing.assert_array_equal(six.voice_codes, prepared[2].codes[:-1])
    assert not any(len(r.voice_ids) for r in prepared if r.id != "r6")


def test_metadata_and_index(dataset_dir, prepared, golden):
    metadata = md.read_metadata(dataset_dir)
    tokenizer = md.tokenizer_fingerprint(golden.processor.tokenizer)
    codec = md.weights_fingerprint(golden.model.codec)
    md.check_made_for(metadata, golden.config, codec=codec, tokenizer=tokenizer)
    assert metadata.speakers == ("ada", "bob", "eve")
    assert [shard["records"] for shard in metadata.shards] == [3, 3, 3, 1]
    index = md.read_index(dataset_dir, metadata)
    for i, record in enumerate(prepared):
        row = {name: int(column[i]) for name, column in index.items()}
        assert row["question"] == len(record.question_ids)
        assert row["chunks"] == len(record.chunks(200)[1])
        assert (row["text"], row["frames"]) == (len(record.text), len(record.codes))
        assert (row["reference_ids"], row["reference_frames"]) == (len(record.reference_ids), record.reference_frames)  # fmt: skip
        assert (row["voice_ids"], row["voice_frames"]) == (len(record.voice_ids), len(record.voice_codes))  # fmt: skip
        name = metadata.speakers[row["speaker"]] if row["speaker"] >= 0 else None
        assert name == record.speaker
    assert len(set(index["utterance"].tolist())) == 10
    assert metadata.statistics["voices"] == {
        "another utterance of the speaker": 9,
        "a recording of the row's own": 1,
        "the answer itself": 0,
    }
    assert metadata.statistics["lengths"]["frames"]["max"] == 16


def test_hidden_states_are_the_reasoners(hidden_dir, prepared, golden):
    metadata = md.read_metadata(hidden_dir)
    assert metadata.hidden["width"] == 64
    reasoner = golden.model.reasoner
    md.check_made_for(metadata, golden.config, reasoner=md.weights_fingerprint(reasoner))

    @jax.jit
    def think(ids, chunks, lengths):
        return reasoner(ids, reasoner.encode_audio(chunks, lengths))

    for record, plain in zip(read_records(hidden_dir), prepared, strict=True):
        assert record.mel.shape == (0, 128)
        assert record.question_seconds == plain.question_seconds
        # Alone, in one padded shape for all: what lies behind is not seen.
        n, text = len(plain.question_ids), len(plain.text)
        ids, chunks, lengths = (
            np.zeros((1, 320), np.int32),
            np.zeros((1, 2, 200, 128), np.float32),
            np.zeros((1, 2), np.int32),
        )
        ids[0, : n + text] = np.concatenate([plain.question_ids, plain.text])
        cut, cut_lengths = plain.chunks(200)
        if len(cut):
            chunks[0, : len(cut)], lengths[0, : len(cut)] = cut, cut_lengths
        want = np.asarray(think(ids, chunks, lengths))[0, n - 1 : n - 1 + text]
        assert record.hidden.shape == (text, 64)
        np.testing.assert_allclose(record.hidden, want, rtol=0, atol=2e-5 * np.abs(want).max())
        assert np.ptp(record.hidden, axis=0).min() > 1e-3


def test_hidden_states_in_half_precision(tmp_path, clip, golden_dir, hidden_dir, one_device):
    manifest = write_corpus(tmp_path / "c", clip, 3)
    options = dataclasses.replace(OPTIONS, precompute_hidden=True)
    prepare(manifest, golden_dir, tmp_path / "o", options, devices=one_device)
    for got, want in zip(read_records(tmp_path / "o"), read_records(hidden_dir), strict=False):
        assert got.hidden.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.hidden.astype(np.float32), want.hidden, rtol=2**-8)


@pytest.mark.parametrize("precompute", [False, True], ids=["codes", "states"])
def test_only_what_runs_is_read(tmp_path, clip, golden_dir, one_device, monkeypatch, precompute):
    names, read = [], TorchFiles.read

    def spy(files, name, *rest, **more):
        names.append(name)
        return read(files, name, *rest, **more)

    monkeypatch.setattr(TorchFiles, "read", spy)
    manifest = write_corpus(tmp_path / "c", clip, 3)
    options = dataclasses.replace(OPTIONS, precompute_hidden=precompute)
    prepare(manifest, golden_dir, tmp_path / "o", options, devices=one_device)
    stages = {"codec_model", "thinker"} if precompute else {"codec_model"}
    assert {name.split(".")[0] for name in names} == stages


def test_batches_over_eight_devices(tmp_path, clip, golden_dir, prepared):
    manifest = write_corpus(tmp_path / "c", clip)
    prepare(manifest, golden_dir, tmp_path / "o", dataclasses.replace(OPTIONS, batch_seconds=2.6))
    for got, want in zip(read_records(tmp_path / "o"), prepared, strict=True):
        same(got, want)


def test_two_processes_make_what_one_makes(tmp_path, manifest, golden_dir, dataset_dir, one_device):
    out, said = tmp_path / "o", []
    request = dict(num_processes=2, devices=one_device, say=said.append)
    assert prepare(manifest, golden_dir, out, OPTIONS, process_id=1, **request) is None
    assert "2 shards of other processes are missing" in said[-1]
    with pytest.raises(md.DatasetError, match="unfinished"):
        md.read_metadata(out)
    with pytest.raises(
        md.DatasetError, match="2 of 4 shards are missing, the first is records-00000"
    ):
        prepare(manifest, golden_dir, out, OPTIONS, only_finish=True)  # fmt: skip
    assert prepare(manifest, golden_dir, out, OPTIONS, process_id=0, **request).num_records == 10
    assert (out / "dataset.json").read_bytes() == (dataset_dir / "dataset.json").read_bytes()
    for got, want in zip(read_records(out), read_records(dataset_dir), strict=True):
        same(got, want)
    os.unlink(out / "dataset.json")
    assert prepare(manifest, golden_dir, out, OPTIONS, only_finish=True).num_records == 10
    # More processes than shards: those without work need no weights.
    assert prepare(manifest, golden_dir, out, OPTIONS, process_id=9, num_processes=10).num_records


BROKEN = dict(
    row1={"answer_audio": "absent.wav"}, row4={"answer_text": ""}, row5={"anser": "x"}
)  # fmt: skip


def test_bad_rows(tmp_path, clip, golden_dir, prepared, one_device):
    manifest = write_corpus(tmp_path / "c", clip, 7, **BROKEN)
    (tmp_path / "c/a0.wav").write_bytes((tmp_path / "c/a0.wav").read_bytes()[:30])
    said = []
    with pytest.raises(BadRowsError, match="4 bad rows, the first on line 1") as caught:
        prepare(manifest, golden_dir, tmp_path / "o", OPTIONS, say=said.append)
    assert [row.line for row in caught.value.rows] == [1, 2, 5, 6]
    assert f"{manifest}:2: {tmp_path / 'c/absent.wav'}: no such file" in said
    assert os.listdir(tmp_path / "o") == []
    options = dataclasses.replace(OPTIONS, on_bad_row="skip")
    out = prepare(manifest, golden_dir, tmp_path / "o", options, devices=one_device)
    assert [row["line"] for row in out.skipped] == [1, 2, 5, 6]
    assert "unknown key" in out.skipped[3]["reason"]
    kept = read_records(tmp_path / "o")
    assert [record.id for record in kept] == ["r2", "r3", "r6"]
    for got, i in zip(kept, (2, 3, 6), strict=True):
        same(got, prepared[i])
    # Nothing has come: nothing to do, whatever the files' times.
    os.utime(tmp_path / "c/a0.wav")
    prepare(manifest, golden_dir, tmp_path / "o", options, say=said.append)
    assert "is complete" in said[-1]
    # One has come, one has changed: their shard is made again, no other, and it is another dataset.
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "o").glob("records-*")}
    write_corpus(tmp_path / "d", clip, 7)
    shutil.copy(tmp_path / "d/a0.wav", tmp_path / "c/a0.wav")
    shutil.copy(tmp_path / "d/a1.wav", tmp_path / "c/absent.wav")
    again = prepare(
        manifest, golden_dir, tmp_path / "o", options, devices=one_device, say=said.append
    )
    assert any("1 shards are made again: files of rows that were left out" in line for line in said)
    assert [row["line"] for row in again.skipped] == [5, 6] and again.key != out.key
    kept = read_records(tmp_path / "o")
    assert [record.id for record in kept] == ["r0", "r1", "r2", "r3", "r6"]
    for got, i in zip(kept, (0, 1, 2, 3, 6), strict=True):
        same(got, prepared[i])
    after = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "o").glob("records-*")}
    assert {name for name in before if before[name] != after[name]} == {
        "records-00000.array_record",
        "records-00000.json",
    }


def test_characters_that_no_file_holds(tmp_path, clip, golden_dir, one_device):
    changes = {
        "row0": {"answer_text": "half \ud83d"},
        "row1": {"answer_audio": "\udcff.wav"},
        "row2": {"turns": [{"role": "user", "text": "\ude00"}]},
        "row3": {"speaker": "ada \U0001f600"},
    }
    manifest = write_corpus(tmp_path / "c", clip, 4, **changes)
    options = dataclasses.replace(OPTIONS, on_bad_row="skip")
    out = prepare(manifest, golden_dir, tmp_path / "o", options, devices=one_device)
    assert out.speakers == ("ada \U0001f600",) and out.num_records == 1
    for row, key in zip(out.skipped, ("answer_text", "answer_audio", "text"), strict=True):
        assert row["reason"].startswith(f"{key} has half a character, '\\u")


def test_a_folder_whose_name_is_no_text(tmp_path, golden_dir, clip, one_device):
    """Rows in it can be read or are told; either way the dataset is completed."""
    folder = os.path.join(os.fsencode(tmp_path), b"\xff")
    folder = pathlib.Path(os.fsdecode(folder))
    manifest = write_corpus(folder, clip, 2, row1={"answer_audio": "absent.wav"})
    options = dataclasses.replace(OPTIONS, on_bad_row="skip")
    try:
        out = prepare(manifest, golden_dir, tmp_path / "o", options, devices=one_device)
    except md.DatasetError as e:
        assert "not one row of the manifest could be used" in str(e)
    else:
        assert [row["line"] for row in out.skipped] in ([2], [1, 2])
        json.dumps(md.read_metadata(tmp_path / "o").skipped).encode()


def test_bad_rows_found_late(tmp_path, clip, golden_dir, one_device):
    manifest = write_corpus(tmp_path / "c", clip, 4, row1={"answer_text": "x" * 4000})
    options = dataclasses.replace(OPTIONS, check="headers")
    with pytest.raises(BadRowsError, match="line 2: too long"):
        prepare(manifest, golden_dir, tmp_path / "o", options, devices=one_device)
    options = dataclasses.replace(options, on_bad_row="skip")
    out = prepare(manifest, golden_dir, tmp_path / "o", options, devices=one_device)
    assert (out.num_records, [row["line"] for row in out.skipped]) == (3, [2])
    # The rows that were skipped are not forgotten by a run that goes on.
    os.unlink(tmp_path / "o/dataset.json")
    with pytest.raises(BadRowsError, match="line 2: too long"):
        prepare(manifest, golden_dir, tmp_path / "o", OPTIONS)


def test_no_usable_row(tmp_path, clip, golden_dir, one_device):
    manifest = write_corpus(tmp_path / "c", clip, 1, row0={"answer_audio": "absent.wav"})
    options = dataclasses.replace(OPTIONS, on_bad_row="skip")
    with pytest.raises(md.DatasetError, match="not one row"):
        prepare(manifest, golden_dir, tmp_path / "o", options, devices=one_device)
    with pytest.raises(md.DatasetError):
        md.read_metadata(tmp_path / "o")


def test_going_on(tmp_path, clip, golden_dir, dataset_dir, monkeypatch, one_device):
    manifest, out, said = write_corpus(tmp_path / "c", clip), tmp_path / "o", []
    request = dict(devices=one_device, say=said.append)
    write = shards._write_records

    def disk_fills_up(path, rows):
        if "00002" in path:
            raise OSError(28, "No space left on device", path)
        return write(path, rows)

    monkeypatch.setattr(shards, "_write_records", disk_fills_up)
    with pytest.raises(OSError, match="No space left"):
        prepare(manifest, golden_dir, out, OPTIONS, **request)
    monkeypatch.setattr(shards, "_write_records", write)
    before = {f.name: f.stat().st_mtime_ns for f in out.glob("records-*")}
    assert sorted(before) == [f"records-0000{i}.{kind}" for i in (0, 1) for kind in ("array_record", "json")]  # fmt: skip
    # What a killed process leaves: half a shard, a shard without its note.
    (out / ".records-00002.array_record.host.1.tmp").write_bytes(b"half")
    (out / ".records-00002.json.1.tmp").write_bytes(b"half")
    (out / "records-00003.array_record").write_bytes(b"half")
    with pytest.raises(md.DatasetError, match="max_voice_tokens was 40, now it is 41"):
        other = dataclasses.replace(OPTIONS, max_voice_tokens=41)
        prepare(manifest, golden_dir, out, other, **request)
    with pytest.raises(
        md.DatasetError, match="other settings: hidden was None|hidden/arithmetic was None"
    ):
        prepare(manifest, golden_dir, out, dataclasses.replace(OPTIONS, precompute_hidden=True))
    prepare(manifest, golden_dir, out, OPTIONS, **request)
    assert "resuming: 6 of 10 rows are done" in said
    assert before.items() <= {f.name: f.stat().st_mtime_ns for f in out.glob("records-*")}.items()
    assert not list(out.glob(".*"))
    for got, want in zip(read_records(out), read_records(dataset_dir), strict=True):
        same(got, want)
    # Once more: nothing to do. Another manifest: not here.
    prepare(manifest, golden_dir, out, OPTIONS, **request)
    assert "is complete" in said[-1]
    write_corpus(tmp_path / "c", clip, 9)
    with pytest.raises(md.DatasetError, match="another manifest"):
        prepare(manifest, golden_dir, out, OPTIONS)
    # An unfinished dataset follows its manifest: only shards whose rows changed are made again.
    os.unlink(out / "dataset.json")
    write_corpus(tmp_path / "c", clip, 9, row4={"speaker": "new"})
    assert prepare(manifest, golden_dir, out, OPTIONS, **request).num_records == 9
    assert [r.speaker for r in read_records(out)][3:6] == ["ada", "new", "eve"]
    after = {f.name: f.stat().st_mtime_ns for f in out.glob("records-*")}
    assert {name for name in before if before[name] == after[name]} == {
        "records-00000.array_record",
        "records-00000.json",
    }
    assert not list(out.glob("records-00003*"))


def test_what_does_not_read_back_is_no_shard(tmp_path, clip, golden_dir, monkeypatch, one_device):
    from array_record.python import array_record_module

    real = array_record_module.ArrayRecordReader
    manifest = write_corpus(tmp_path / "c", clip, 2)

    class Forgetful:
        def __init__(self, path):
            self._reader = real(path)

        def num_records(self):
            return self._reader.num_records()

        def read_all(self):
            return [data[:-1] + b"?" for data in self._reader.read_all()]

        def close(self):
            self._reader.close()

    monkeypatch.setattr(array_record_module, "ArrayRecordReader", Forgetful)
    with pytest.raises(md.DatasetError, match="does not read back"):
        prepare(manifest, golden_dir, tmp_path / "o", OPTIONS, devices=one_device)
    assert os.listdir(tmp_path / "o") == ["prepare.json"]


def test_outputs_that_cannot_be_written(tmp_path, manifest, golden_dir):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file/below", pathlib.Path("/proc/none")):
        with pytest.raises(md.DatasetError, match=f"{out} cannot be written"):
            prepare(manifest, golden_dir, out, OPTIONS)


def test_an_output_with_other_things_in_it(tmp_path, manifest, golden_dir):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(md.DatasetError, match="not empty"):
        prepare(manifest, golden_dir, tmp_path, OPTIONS)


def test_one_process_at_a_time(tmp_path, manifest, golden_dir):
    (tmp_path / "o").mkdir()
    with (
        shards.exclusive(str(tmp_path / "o"), 0, print),
        pytest.raises(md.DatasetError, match="another process is preparing"),
    ):
        prepare(manifest, golden_dir, tmp_path / "o", OPTIONS)


BAD_OPTIONS = {
    "hidden_dtype": "int8",
    "dtype": "int8",
    "on_bad_row": "shrug",
    "check": "none",
    "shard_size": 0,
    "max_voice_seconds": -1.0,
    "threads": 0,
}


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS.items(), ids=BAD_OPTIONS.keys())
def test_options(name, value):
    with pytest.raises(ValueError, match=name):
        Options(**{name: value})


def test_without_array_record(tmp_path, manifest, golden_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(md.DatasetError, match=r"pip install 'chroma_jax\[train\]'"):
        prepare(manifest, golden_dir, tmp_path / "o")


def test_process_ids(tmp_path, manifest, golden_dir):
    with pytest.raises(ValueError, match="from 0 to num_processes - 1 = 1, got 2"):
        prepare(manifest, golden_dir, tmp_path / "o", process_id=2, num_processes=2)


def command(*arguments):
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache/xla")}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    return subprocess.Popen(
        [sys.executable, "-m", "chroma_jax.prepare", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=env,
    )


FLAGS = (
    "--max_voice_seconds=1.6",
    "--max_voice_tokens=40",
    "--batch_seconds=11",
    "--shard_size=1",
    "--threads=2",
)


@pytest.mark.parametrize(
    "kills", [1, pytest.param(8, marks=pytest.mark.slow)], ids=["once", "eight_times"]
)
def test_killed_at_random_moments(tmp_path, manifest, golden_dir, dataset_dir, kills):
    out, rng = tmp_path / "o", random.Random(kills)
    request = (f"--manifest={manifest}", f"--checkpoint={golden_dir}", f"--out={out}", *FLAGS)
    done: dict[str, int] = {}
    for kill in range(kills):
        process = command(*request)
        goal = 1 + (8 * kill) // kills
        while process.poll() is None and len(list(out.glob("records-*.json"))) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = {f.name: f.stat().st_mtime_ns for f in out.glob("records-*.json")}
        assert done.items() <= now.items()  # nothing was made twice
        done = now
        if process.returncode == -signal.SIGKILL and not (out / "dataset.json").exists():
            with pytest.raises(md.DatasetError, match="unfinished"):
                md.read_metadata(out)
    process = command(*request)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert done.items() <= {f.name: f.stat().st_mtime_ns for f in out.glob("records-*.json")}.items()  # fmt: skip
    for got, want in zip(read_records(out), read_records(dataset_dir), strict=True):
        same(got, want)
    assert not list(out.glob(".records*"))


def test_the_command_tells_mistakes_in_one_line(tmp_path, manifest, golden_dir, clip):
    bad = write_corpus(tmp_path / "c", clip, 2, row1={"answer_audio": "absent.wav"})
    target = (f"--checkpoint={golden_dir}", f"--out={tmp_path / 'o'}")
    calls = {
        "--out is missing": (f"--manifest={manifest}", f"--checkpoint={golden_dir}"),
        "the first on line 2": (f"--manifest={bad}", *target),
    }
    running = {message: command(*arguments) for message, arguments in calls.items()}
    for message, process in running.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2
        last = errors.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert message in last
        assert "Traceback" not in errors


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path, manifest, golden_dir):
    limited = (
        "import resource, runpy, sys;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "sys.argv[0] = 'prepare'; runpy.run_module('chroma_jax.prepare', run_name='__main__')"
    )
    request = [f"--manifest={manifest}", f"--checkpoint={golden_dir}", f"--out={tmp_path / 'o'}"]
    done = subprocess.run(
        [sys.executable, "-c", limited, *request, *FLAGS, "--shard_size=5"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "records-00000.array_record cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert [f for f in os.listdir(tmp_path / "o") if "records" in f] == []


@pytest.fixture
def job():
    """Flags of the processes of one job on this machine."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return ("--distributed", f"--coordinator=localhost:{port}", "--num_processes=2")


@pytest.mark.slow
def test_a_distributed_job(tmp_path, manifest, golden_dir, dataset_dir, job):
    from chroma_jax.checkpoint import convert

    # Orbax checkpoints are read by all processes together, also by one that has nothing left to do.
    convert(golden_dir, tmp_path / "c")
    request = [
        f"--manifest={manifest}",
        f"--checkpoint={tmp_path / 'c'}",
        f"--out={tmp_path / 'o'}",
    ]
    request += [*FLAGS, "--shard_size=3"]
    alone = command(*request, "--num_processes=2", "--process_id=1")
    _, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0, errors
    assert "2 shards of other processes are missing" in errors
    together = [command(*request, *job, f"--process_id={i}") for i in range(2)]
    for process in together:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for got, want in zip(read_records(tmp_path / "o"), read_records(dataset_dir), strict=True):
        same(got, want)


@pytest.mark.slow
def test_a_distributed_job_ends_together(tmp_path, golden_dir, clip, job):
    bad = write_corpus(tmp_path / "c", clip, 4, row3={"answer_audio": "absent.wav"})
    request = (f"--manifest={bad}", f"--checkpoint={golden_dir}", f"--out={tmp_path / 'o'}", *FLAGS)
    both = [command(*request, *job, f"--process_id={i}") for i in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert "error: process 1 failed: " in said[0] and "Traceback" not in said[0] + said[1]
    for text in said:
        assert "1 bad rows, the first on line 4" in text.splitlines()[-1]


def test_rows_differ(prepared):
    assert len({json.dumps(record.codes.tolist()) for record in prepared}) == 10
