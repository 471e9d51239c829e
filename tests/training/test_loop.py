"""Runs: from files to a model that replies, interrupted in every way, with the bits of a run that was not."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small_run
from absl import flags
from data_pipeline.corpus import read_records

from chroma_jax import Chroma, checkpoint, train
from chroma_jax.audio.wav import load_audio
from chroma_jax.checkpoint import load
from chroma_jax.checkpoint.torch_files import side_files
from chroma_jax.data.metadata import read_metadata, write_metadata
from chroma_jax.data.pipeline import BatchIterator
from chroma_jax.training import dialogue_run, loop, run, selection
from chroma_jax.training.run_config import RunConfig
from chroma_jax.training.step import Trainer, build

pytest.importorskip("grain")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, dataset, golden_dir):
    """Six steps without an incident, with samples, as no run that is compared with it has: workdir, outcome, lines."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    return workdir, *small_run.run(dataset, golden_dir, workdir, export="end", sample_every=4)


def test_a_run_trains_tests_and_saves(straight, dataset):
    workdir, outcome, lines = straight
    assert (outcome.step, outcome.signal) == (6, None)
    assert small_run.saved_steps(workdir) == [3, 6]
    said = "\n".join(lines)
    for text in ("backbone/.*", "6 records, weight 1", "first step: ", "step 2/6  loss", "s/step", "held out: loss"):  # fmt: skip
        assert text in said
    first = float(next(line for line in lines if line.startswith("step 2/6")).split()[3])
    assert outcome.train["loss"] < first
    assert outcome.evaluation["loss"] < first
    assert outcome.evaluation["frames"] == sum(
        len(record.codes) for record in read_records(dataset)
    )


def test_the_model_is_written_and_replies(straight, golden_dir, question_path, voice):
    _, outcome, _ = straight
    chroma = Chroma.from_pretrained(outcome.model)
    reply = chroma.reply(question_path, voice=voice, max_seconds=0.5)
    assert np.isfinite(reply.audio).all() and reply.finish_reason in ("length", "stop")
    before, after = load(golden_dir).model, load(outcome.model).model
    frozen = [before.reasoner.embedding, after.reasoner.embedding]
    np.testing.assert_array_equal(*(np.asarray(x[...]) for x in frozen))
    trained = [np.asarray(m.backbone.head[...]) for m in (before, after)]
    assert (trained[0] != trained[1]).mean() > 0.9


def test_samples_are_spoken_and_written(straight, dataset):
    workdir, _, lines = straight
    told = [line for line in lines if "reply to" in line]
    assert [line.split(": ")[0] for line in told] == [
        f"step {step}/6  reply to r{record}" for step in (4, 6) for record in (0, 1)
    ]
    folder = workdir / run.SAMPLES
    assert sorted(os.listdir(folder)) == ["record", "step_000004", "step_000006"]
    written = (folder / "step_000006" / "replies.txt").read_text().splitlines()
    assert [line.split("reply to ")[1] for line in told[2:]] == [w[3:] for w in written]  # fmt: skip
    # The records' own answers, whole; replies of at most sample_seconds.
    sounds = {path: load_audio(path, 24000) for path in folder.rglob("*.wav")}
    for number, record in enumerate(read_records(dataset)[:2]):
        answer = sounds[folder / "record" / f"{number}.wav"]
        assert len(answer) == (len(record.codes) - 1) * 1920 and np.ptp(answer) > 0.01
        for step in (4, 6):
            assert len(sounds[folder / f"step_00000{step}" / f"{number}.wav"]) <= 0.8 * 24000
    assert len(sounds) == 6


def test_resuming_gives_the_same_bits(straight, dataset, golden_dir, tmp_path):
    small_run.run(dataset, golden_dir, tmp_path, steps=3)
    assert small_run.saved_steps(tmp_path) == [3]
    (tmp_path / run.SAMPLES).write_text("a file in the way")
    _, lines = small_run.run(dataset, golden_dir, tmp_path, sample_every=6)
    assert "resuming after step 3" in lines and "changed since then: steps: 3 -> 6" in lines
    small_run.assert_same_bits(small_run.state(tmp_path, 6), small_run.state(straight[0], 6))
    # Samples that cannot be written end nothing.
    assert sum("samples could not be written to " in line for line in lines) == 2
    assert sum("reply to r" in line for line in lines) == 2


SIGNALS = [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_saves_between_checkpoints(straight, dataset, golden_dir, tmp_path, number):
    def interrupt(line):
        if line.startswith("step 2/6"):
            os.kill(os.getpid(), number)

    outcome, lines = small_run.run(dataset, golden_dir, tmp_path, say=interrupt, save_every=5)
    assert outcome.signal == number and outcome.model is None
    # The signal comes while step 2 is reported; step 3 is the one it ends after.
    assert small_run.saved_steps(tmp_path) == [outcome.step] == [3]
    assert f"stopped by {number.name} after step 3, which is saved; the same command" in lines[-1]
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    small_run.run(dataset, golden_dir, tmp_path, save_every=5)
    small_run.assert_same_bits(small_run.state(tmp_path, 6), small_run.state(straight[0], 6))


@pytest.mark.slow
def test_a_signal_during_an_evaluation_saves_at_once(
    straight, dataset, golden_dir, tmp_path, monkeypatch
):
    evaluated, evaluate = [], Trainer.eval_step

    def interrupted(trainer, state, frozen, batch):
        evaluated.append(batch)
        if len(evaluated) == 2:  # of three
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer, state, frozen, batch)

    monkeypatch.setattr(Trainer, "eval_step", interrupted)
    outcome, lines = small_run.run(dataset, golden_dir, tmp_path, save_every=5, eval_every=2)
    assert (outcome.signal, outcome.step, outcome.evaluation) == (signal.SIGTERM, 2, None)
    assert len(evaluated) == 2 and not any("held out" in line for line in lines)
    assert small_run.saved_steps(tmp_path) == [2]
    monkeypatch.setattr(Trainer, "eval_step", evaluate)
    small_run.run(dataset, golden_dir, tmp_path, save_every=5)
    small_run.assert_same_bits(small_run.state(tmp_path, 6), small_run.state(straight[0], 6))


def test_the_second_run_in_a_workdir_is_refused(straight, dataset, golden_dir, tmp_path):
    workdir = small_run.clone(straight[0], tmp_path / "run")
    with (
        loop.owned(str(workdir), print),
        pytest.raises(ValueError, match="run is being trained in by another process .process"),
    ):
        small_run.run(dataset, golden_dir, workdir, steps=100, say=pytest.fail)
    small_run.run(dataset, golden_dir, workdir)
    assert not (workdir / ".lock").exists()


def everything(folder):
    """Paths and times of change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_an_export_leaves_a_run_that_goes_on_alone(straight, dataset, golden_dir, tmp_path):
    workdir = small_run.clone(straight[0], tmp_path / "run")
    shutil.rmtree(workdir / loop.MODEL)
    saving = workdir / loop.CHECKPOINTS / "9.orbax-checkpoint-tmp"
    shutil.copytree(workdir / loop.CHECKPOINTS / "6", saving)
    _truncate(workdir / loop.CHECKPOINTS / "6")
    with loop.owned(str(workdir), print):
        before = everything(workdir)
        outcome, _ = small_run.run(dataset, golden_dir, workdir, export="now")
        assert outcome.step == 3
        shutil.rmtree(workdir / loop.MODEL)
        after = everything(workdir)
    assert after.keys() == before.keys()
    assert {p for p in after if after[p] != before[p]} <= {workdir, workdir / ".lock"}


@pytest.mark.slow
def test_clipping_may_change_in_a_run_that_goes_on(straight, dataset, golden_dir, tmp_path):
    workdir = small_run.clone(straight[0], tmp_path / "run")
    _, lines = small_run.run(dataset, golden_dir, workdir, steps=7, train__optimizer__clip_norm=None)  # fmt: skip
    assert "changed since then: train.optimizer.clip_norm: 1.0 -> None" in lines
    assert small_run.saved_steps(workdir) == [6, 7]


def test_a_base_that_was_replaced(straight, dataset, golden_dir, tmp_path):
    """The data has no Reasoner states, so nothing else would notice another Reasoner."""
    loaded = checkpoint.load(golden_dir)
    embedding = loaded.model.reasoner.embedding
    embedding[...] = embedding[...].at[7, 3].add(0.25)
    other = tmp_path / "other"
    extra = [golden_dir / name for name in side_files(golden_dir) if name != "config.json"]
    checkpoint.save(other, loaded.config, loaded.model, extra)
    before = everything(straight[0])
    for export in ("end", "now"):
        with pytest.raises(ValueError, match=f"over other frozen weights than {other} holds now"):
            small_run.run(dataset, other, straight[0], export=export)
    assert everything(straight[0]).keys() == before.keys()


DUE = {
    "nothing": (1, False, ""),
    "its_interval": (2, False, "log"),
    "two_intervals": (4, False, "log sample"),
    "the_last": (6, False, "log save evaluate sample"),
    "a_signal": (1, True, "log save"),
    "a_signal_at_the_last": (6, True, "log save"),
}


@pytest.mark.parametrize(("step", "asked", "wanted"), DUE.values(), ids=DUE)
def test_what_follows_a_step(step, asked, wanted):
    config = RunConfig.from_dict(small_run.values("data", "start", sample_every=4))
    assert " ".join(name for name, is_due in run.due(config, step, asked)._asdict().items() if is_due) == wanted  # fmt: skip
    never = RunConfig.from_dict(small_run.values("data", "start", sample_every=0))
    assert not any(run.due(never, step).sample for step in range(1, 7))


def _truncate(folder):
    file = small_run.largest_file(folder)
    os.truncate(file, file.stat().st_size // 2)


def _remove(name):
    def do(folder):
        for file in folder.rglob(name):
            file.unlink()

    return do


DAMAGE = [
    pytest.param(_truncate, id="a_file_cut_short"),
    pytest.param(_remove("_CHECKPOINT_METADATA"), id="no_metadata"),
    pytest.param(_remove("manifest.ocdbt"), id="no_index", marks=pytest.mark.slow),
    pytest.param(_remove("_METADATA"), id="no_structure", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back(straight, dataset, golden_dir, tmp_path, damage, caplog):
    workdir = small_run.clone(straight[0], tmp_path / "run")
    damage(workdir / loop.CHECKPOINTS / "6")
    _, lines = small_run.run(dataset, golden_dir, workdir)
    assert "resuming after step 3" in lines
    assert "step 6 is damaged, going back to the one before it" in caplog.text
    assert os.listdir(workdir / "damaged") == ["6-0"]
    small_run.assert_same_bits(small_run.state(workdir, 6), small_run.state(straight[0], 6))


def test_nothing_readable_is_no_fresh_start(straight, dataset, golden_dir, tmp_path):
    workdir = small_run.clone(straight[0], tmp_path / "run")
    for step in ("3", "6"):
        _truncate(workdir / loop.CHECKPOINTS / step)
    with pytest.raises(ValueError, match="none of the 2 checkpoints in .* can be read"):
        small_run.run(dataset, golden_dir, workdir)
    assert sorted(os.listdir(workdir / "damaged")) == ["3-0", "6-0"]


OTHERS = {
    "stage": (
        dict(train__trains=selection.STAGE_2),
        r"another model, stage or LoRA rank \(train.trains: ",
    ),
    "order": (dict(seed=1), r"other data, seed, batch size or shapes \(.*seed: 0 -> 1\)"),
    "batch": (dict(data__batch_size=4), r"other data, .* \(data.batch_size: 2 -> 4"),
}


@pytest.mark.parametrize(("changes", "message"), OTHERS.values(), ids=OTHERS)
def test_checkpoints_of_another_run(straight, dataset, golden_dir, changes, message):
    before = small_run.saved_steps(straight[0])
    with pytest.raises(ValueError, match=message):
        small_run.run(dataset, golden_dir, straight[0], **changes)
    assert small_run.saved_steps(straight[0]) == before


def test_a_loss_that_is_not_finite_stops(dataset, golden_dir, tmp_path, monkeypatch):
    given = []
    following = BatchIterator.__next__

    def poisoned(self):
        batch = following(self)
        given.append(batch)
        if len(given) == 5:
            batch.chunks[:] = np.nan
        return batch

    monkeypatch.setattr(BatchIterator, "__next__", poisoned)
    with pytest.raises(run.NonFiniteError, match="^step 5: the loss is nan") as caught:
        small_run.run(dataset, golden_dir, tmp_path)
    for number in given[4].record_ids.tolist():
        assert f"{dataset}#{number} (r{number})" in str(caught.value)
    assert "the newest checkpoint is of step 3" in str(caught.value)
    assert small_run.saved_steps(tmp_path) == [3]


def test_no_checkpoint_no_model(dataset, golden_dir, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to write a model from"):
        small_run.run(dataset, golden_dir, tmp_path, export="now")


def test_the_model_can_be_written_at_any_time(straight, dataset, golden_dir, tmp_path):
    workdir = small_run.clone(straight[0], tmp_path / "run")
    outcome, lines = small_run.run(dataset, golden_dir, workdir, export="now", steps=100)
    assert outcome.step == 6 and not any(line.startswith("first step") for line in lines)
    got, want = (load(path).model for path in (outcome.model, straight[1].model))
    np.testing.assert_array_equal(*(np.asarray(m.decoder.heads[...]) for m in (got, want)))


@pytest.mark.slow
def test_what_trains_may_start_anew(dataset, golden_dir, tmp_path):
    config = RunConfig.from_dict(small_run.values(dataset, golden_dir, model__start="random"))
    trainer = build(checkpoint.read_config(golden_dir), config.train)
    state, frozen = dialogue_run.begin(config, trainer, str(golden_dir), [])
    model = load(golden_dir).model
    kept = frozen["reasoner"]["embedding"], model.reasoner.embedding[...]
    np.testing.assert_array_equal(*map(np.asarray, kept))
    drawn = state.params["backbone"]["head"], model.backbone.head[...]
    assert (np.asarray(drawn[0]) != np.asarray(drawn[1])).mean() > 0.9


@pytest.mark.slow
def test_lora_is_merged_into_the_model(dataset, golden_dir, tmp_path):
    changes = dict(train__trains=selection.LORA_FINE_TUNING, train__lora=dict(rank=2, alpha=4.0))
    outcome, _ = small_run.run(dataset, golden_dir, tmp_path, export="end", steps=2, **changes)
    before, after = load(golden_dir).model, load(outcome.model).model
    same = [np.asarray(m.backbone.head[...]) for m in (before, after)]
    np.testing.assert_array_equal(*same)
    kernels = [np.asarray(m.backbone.llama.layers.gate[...]) for m in (before, after)]
    assert (kernels[0] != kernels[1]).mean() > 0.9


CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({values!r})
"""


@pytest.fixture
def config_file(dataset, golden_dir, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(values=small_run.values(dataset, golden_dir)))
    return path


def command(*arguments, **more):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "chroma_jax.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **more,
    )


@pytest.mark.slow
def test_sigterm_of_the_command(config_file, tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config.steps=1000000", "--config.save_every=1000000", "--config.log_every=1"]
    process = command(f"--config={config_file}", f"--workdir={workdir}", *flags)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    (step,) = small_run.saved_steps(workdir)
    assert step >= 2
    assert f"stopped by SIGTERM after step {step}, which is saved; the same command" in out


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="looks at Linux's shared memory")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_to_all_processes_of_a_run_with_reading_processes(config_file, tmp_path, number):
    before = set(os.listdir("/dev/shm"))
    workdir = tmp_path / "run"
    flags = ["--config.steps=1000000", "--config.save_every=1000000", "--config.log_every=1"]
    process = command(
        f"--config={config_file}", f"--workdir={workdir}", "--config.data.workers=2", *flags, start_new_session=True
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 2/"):
            os.killpg(process.pid, number)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    (step,) = small_run.saved_steps(workdir)
    assert f"stopped by {number.name} after step {step}, which is saved; the same command" in out
    assert set(os.listdir("/dev/shm")) <= before
    with pytest.raises(ProcessLookupError):  # nobody is left; Python's own trackers go last
        for _ in range(300):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


KILLS = 20


@pytest.mark.slow
def test_killed_at_random_moments(dataset, golden_dir, config_file, tmp_path):
    """kill -9 during steps, saves and samples; every start goes on, and the end is that of a run without an incident."""
    chance, workdir, many = random.Random(0), tmp_path / "killed", 1000000
    every = ["save", "log", "sample"]
    flags = [*(f"--config.{name}_every=1" for name in every), "--export=never"]
    start = [f"--config={config_file}", *flags]
    reached = []
    for _ in range(KILLS):
        process = command(*start, f"--workdir={workdir}", f"--config.steps={many}")
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(chance.uniform(0, 1))
        process.kill()
        _, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, err
        reached.append(max(small_run.saved_steps(workdir), default=0))
    assert reached == sorted(reached) and reached[-1] > 1
    last = reached[-1] + 2
    for folder in (workdir, tmp_path / "straight"):
        process = command(*start, f"--workdir={folder}", f"--config.steps={last}")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    want = small_run.state(tmp_path / "straight", last)
    small_run.assert_same_bits(small_run.state(workdir, last), want)


BAD = {
    "no_such_dataset": (["--config.data.train=/absent"], "/absent: no such dataset directory"),
    "unknown_key": (["--config.data.evaluatoin=x"], "has no key data.evaluatoin; near it are data.evaluation"),
    "no_config_file": (["--config=/absent.py", "--config.steps=3"], "--config: /absent.py: no such file"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_mistakes_end_the_command_with_2(config_file, tmp_path, arguments, message):
    process = command(f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in err and err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run").exists()


MISTAKES = {
    "no_config": (dict(config=None), "--config is missing"),
    "no_workdir": (dict(workdir=None), "--workdir is missing"),
    "half_a_cluster": (dict(coordinator="localhost:1"), "go together, with --distributed"),
    "compilation_of_no_size": (dict(compile_only="v5e:2x2"), "data.max_text"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_flags(config_file, tmp_path, changes, message):
    values = flags.FlagValues()
    train.define_flags(values)
    given = dict(config=config_file, workdir=tmp_path / "run") | changes
    values(["train", *(f"--{name}={value}" for name, value in given.items() if value is not None)])
    with pytest.raises(ValueError, match=message):
        train.main(values)


WRONG = {
    "rows_and_mesh": (dict(train__mesh={"data": 8}), "a batch of 2 rows must be a multiple of 8"),
    "mesh_and_devices": (dict(train__mesh={"data": 3}), "3 places for 8 devices"),
    "no_checkpoint": (dict(model__checkpoint="/absent"), "/absent"),
    "no_dataset": (dict(data__train=" , "), "data.train names no dataset"),
    "weight": (dict(data__train="a=x"), "the weight of 'a=x' must be a number"),
    "longest": (dict(data__max_frames=1), "beyond max_frames 1"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_mistakes_are_told_before_anything_is_made(dataset, golden_dir, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_run.run(dataset, golden_dir, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_run_does_not_write_over_the_model_that_it_begins_with(dataset, golden_dir, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / loop.MODEL).symlink_to(golden_dir)
    for checkpoint_ in (golden_dir, tmp_path / "run" / loop.MODEL):
        with pytest.raises(ValueError, match="where this run writes its own model"):
            small_run.run(dataset, checkpoint_, tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [loop.MODEL]


def test_data_of_another_codec(dataset, tmp_path, golden_dir):
    loaded = checkpoint.load(golden_dir)
    loaded.model.codec = jax.tree.map(lambda x: x + 1, loaded.model.codec)
    checkpoint.save(tmp_path / "other", loaded.config, loaded.model)
    with pytest.raises(ValueError, match="prepared with another Codec"):
        small_run.run(dataset, tmp_path / "other", tmp_path / "run")


DATASETS = {
    "other_configuration": (
        lambda m: dict(config=m.config | {"codebook_size": 7}),
        "was prepared for another configuration: its codebook_size is 7, the model's is",
    ),
    "other_codec": (
        lambda m: dict(codec="0" * 16),
        "was prepared with another Codec: 0000000000000000",
    ),
    "empty": (lambda m: dict(num_records=0), "is empty: it has no records"),
}


@pytest.mark.parametrize(("edit", "message"), DATASETS.values(), ids=DATASETS)
def test_data_that_will_not_do(dataset, golden_dir, tmp_path, edit, message):
    copy = small_run.clone(dataset, tmp_path / "data")
    metadata = read_metadata(copy)
    write_metadata(copy, dataclasses.replace(metadata, **edit(metadata)))
    with pytest.raises(ValueError, match=f"{copy} {message}"):
        small_run.run(copy, golden_dir, tmp_path / "run")
    assert not (tmp_path / "run" / loop.CHECKPOINTS).exists() or not small_run.saved_steps(tmp_path / "run")  # fmt: skip


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_workdir_that_cannot_be(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=f"--workdir: {tmp_path / name} cannot be written to: "):
        loop.make_workdir(str(tmp_path / name))
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(
    dataset, golden_dir, tmp_path, monkeypatch
):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    lines = []
    with pytest.raises(OSError, match="not enough space in .*/checkpoints for a checkpoint: .* GB"):
        small_run.run(dataset, golden_dir, tmp_path, say=lines.append)
    assert lines and not any("step" in line for line in lines)


@pytest.mark.slow
def test_a_disk_without_room_for_the_model_costs_no_checkpoint(
    straight, dataset, golden_dir, tmp_path, monkeypatch
):
    workdir = small_run.clone(straight[0], tmp_path / "run")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(
            OSError,
            match=f"could not be written to {workdir}/model: not enough .* free; its checkpoint",
        ):
            small_run.run(dataset, golden_dir, workdir, export="now")
    assert small_run.saved_steps(workdir) == [3, 6]
    load(workdir / loop.MODEL)  # the one of before is still whole
    outcome, _ = small_run.run(dataset, golden_dir, workdir, export="now")
    assert outcome.step == 6 and load(outcome.model)
