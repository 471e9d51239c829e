"""Every file of configs/ says what it is and gives a run that can be built; mistakes name the key."""

import pathlib
import re
import runpy

import pytest

from chroma_jax.training.config import CODEC, TrainConfig
from chroma_jax.training.run_config import RunConfig, parse_sources
from chroma_jax.training.selection import LORA, TRAIN
from chroma_jax.training.step import build

pytest.importorskip("ml_collections")

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.py"))


def read(path):
    return runpy.run_path(str(path))["get_config"]()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_configuration_builds(path):
    """With shapes alone: nothing of the model is made."""
    config = RunConfig.from_dict(read(path))
    alone = config.train.objective == CODEC
    trainer = build((config.model.codec_sizes if alone else config.model.sizes)(), config.train)
    summary = trainer.summary()
    assert "total trained" in summary
    trained = {path.split("/")[0] for path in trainer.selection.paths(TRAIN)}
    assert ("reasoner" in trained) == path.stem.endswith("_reasoner")
    assert ("codec" in trained) == alone
    trainer.check_rows(8 * trainer.train_cfg.accumulation)
    text = path.read_text()
    assert f"--config=configs/{path.name} --workdir=" in text.split('"""')[1]


def test_what_there_is():
    names = {path.stem for path in FILES}
    assert {"chroma_4b", "chroma_4b_lora", "chroma_4b_stage2", "debug", "debug_reasoner"} <= names
    assert {"mini_reasoner", "mini_speech", "mini_codec", "mimi_codec"} <= names


def test_the_ears_of_the_small_one_stay_a_whisper():
    config = RunConfig.from_dict(read(FOLDER / "mini_reasoner.py"))
    trained = build(config.model.sizes(), config.train).selection.paths(TRAIN)
    assert "reasoner/audio_encoder/projection" in trained and "reasoner/head" in trained
    ears = re.compile(r"reasoner/audio_encoder/(conv|layers).*")
    assert not [path for path in trained if ears.fullmatch(path)]


def test_the_paper():
    one, two, lora = (
        RunConfig.from_dict(read(FOLDER / f"chroma_4b{name}.py"))
        for name in ("", "_stage2", "_lora")
    )
    optimizer = one.train.optimizer
    assert (optimizer.learning_rate, optimizer.clip_norm) == (5e-5, 1.0)
    assert (one.steps, one.train.decoder_weight, one.data.batch_size) == (100_000, 0.5, 32)
    assert two.train.decoder_weight == 1.0
    assert [c.model.start for c in (one, two, lora)] == ["random", "checkpoint", "checkpoint"]
    trained = [build(c.model.sizes(), c.train).selection.paths(TRAIN) for c in (one, two)]
    assert {path.split("/")[0] for path in trained[0]} == {"backbone", "decoder"}
    assert {path.split("/")[0] for path in trained[1]} == {"decoder"}
    kernels = build(lora.model.sizes(), lora.train).selection.paths(LORA)
    assert len(kernels) == 14


def changed(**changes):
    config = read(FOLDER / "debug.py").to_dict()
    for key, value in changes.items():
        where, _, name = key.rpartition("__")
        (config[where] if where else config)[name] = value
    return config


def test_a_stage_alone_is_what_the_run_holds():
    config = changed()
    assert RunConfig.from_dict(config).train == TrainConfig.from_dict(config["train"])
    assert RunConfig.from_dict(config).to_dict()["train"]["optimizer"]["learning_rate"] == 5e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(workdir="x"), "unknown key workdir; known are model, data, train"),
        (dict(data__rows=3), "unknown key data.rows"),
        (dict(train__lr=1.0), "unknown key train.lr"),
        (
            dict(model__size="huge"),
            "model.size must be one of tiny, debug, mini, chroma_100m, chroma_4b, got 'huge'",
        ),
        (dict(model__start="new"), "model.start must be one of checkpoint, random, got 'new'"),
        (dict(data__batch_size=0), "data.batch_size must be at least 1, got 0"),
        (dict(data__max_frames=0), "data.max_frames must be at least 1, got 0"),
        (dict(data__on_long="cut"), "on_long must be error or drop"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(steps=1.5), "steps must be int, got 1.5"),
        (dict(log_every=0), "log_every must be at least 1"),
        (dict(steps=10_000), "steps 10000 go beyond train.optimizer.total_steps 220"),
    ],
)
def test_errors_name_the_key(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RunConfig.from_dict(changed(**changes))


def test_sources():
    one, two = parse_sources("data/a=0.25, data/b", "data.train")
    assert (one.directory, one.weight, two.directory, two.weight) == ("data/a", 0.25, "data/b", 1.0)


@pytest.mark.parametrize("text", ["", ",", "a=", "a=-1", "a=nan", "a=inf"])
def test_bad_sources(text):
    with pytest.raises(ValueError, match="data.train"):
        parse_sources(text, "data.train")
