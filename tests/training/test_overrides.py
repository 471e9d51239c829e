"""Every field of a configuration can be set and cleared from a command line; a key that is none names near ones."""

import dataclasses
import re

import pytest
import small_run

from chroma_jax.training.overrides import keys, override, split
from chroma_jax.training.run_config import RunConfig


def changed(*changes, drop=()):
    """A run's configuration, of a file without the keys `drop`, after `changes`."""
    values = small_run.values("data", "start")
    for key in drop:
        node = values
        *parents, name = key.split(".")
        for parent in parents:
            node = node[parent]
        node.pop(name, None)
    override(RunConfig, values, changes)
    return RunConfig.from_dict(values)


def test_arguments_are_told_apart():
    argv = [
        "train",
        "--config=a.py",
        "--config.steps=3",
        "-config.seed",
        "4",
        "--workdir=w",
        "--config.data.train=a=0.5,b",
        "--",
    ]
    assert split([*argv, "--config.keep=1"]) == (
        ["train", "--config=a.py", "--workdir=w", "--", "--config.keep=1"],
        [("steps", "3"), ("seed", "4"), ("data.train", "a=0.5,b")],
    )
    assert split(["--config.data.evaluation="])[1] == [("data.evaluation", "")]
    with pytest.raises(ValueError, match="--config.seed has no value"):
        split(["train", "--config.seed"])


def get(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


SET = {
    "data.evaluation": ("held/out", "held/out"),
    "data.max_frames": ("512", 512),
    "data.on_long": ("drop", "drop"),
    "data.threads": ("3", 3),
    "model.checkpoint": ("7", "7"),
    "sample_seconds": ("4", 4.0),
    "train.accumulation": ("2", 2),
    "train.decoder_fraction": ("0.5", 0.5),
    "train.mesh": ("{'fsdp': 8}", {"fsdp": 8}),
    "train.mesh.tensor": ("4", {"tensor": 4}),
    "train.optimizer.clip_norm": ("2", 2.0),
    "train.optimizer.final_fraction": ("1e-1", 0.1),
    "train.trains": ("[['.*', 'train']]", ((".*", "train"),)),
}


@pytest.mark.parametrize("key", SET)
def test_a_field_that_the_file_leaves_out_is_set(key):
    text, value = SET[key]
    field = "train.mesh" if "mesh" in key else key
    required = ("train.optimizer.clip_norm", "train.trains")
    config = changed((key, text), drop=() if field in required else [field])
    assert get(config, field) == value and type(get(config, field)) is type(value)


def test_what_stands_in_no_file_is_built():
    config = changed(("train.lora.rank", "8"), ("train.lora.alpha", "16"))
    assert dataclasses.asdict(config.train.lora) == dict(rank=8, alpha=16.0)
    assert changed(("train.lora", "{'rank': 2, 'alpha': 1}")).train.lora.rank == 2
    with pytest.raises(ValueError, match="missing key train.lora.alpha"):
        changed(("train.lora.rank", "8"))


CLEARED = {
    "train.optimizer.clip_norm": None,
    "train.mesh": None,
    "train.lora": None,
    "model.checkpoint": None,
    "data.max_text": None,
    "data.evaluation": "",
    "data.threads": 8,
    "keep": 3,
}


@pytest.mark.parametrize("key", CLEARED)
def test_a_field_is_cleared(key):
    assert get(changed((key, "None")), key) == CLEARED[key]


def test_the_last_one_counts():
    assert changed(("seed", "1"), ("seed", "2")).seed == 2


MISTAKES = {
    "of_another_room": (("evaluation", "x"), "no key evaluation; near it are data.evaluation"),
    "misspelt": (("train.optimizer.learning_rat", "1"), "near it are train.optimizer.learning_rate"),
    "of_a_number": (("steps.x", "1"), "the configuration has no key steps.x"),
    "no_whole_number": (("steps", "2.5"), "steps must be a whole number, got '2.5'"),
    "no_number": (("train.optimizer.eps", "tiny"), "train.optimizer.eps must be a number, got 'tiny'"),
    "no_literal": (("train.trains", "(("), "train.trains must be a Python literal, got '(('"),
    "no_default": (("steps", "None"), "steps cannot be None: it has no default"),
    "of_a_wrong_value": (("log_every", "0"), "log_every must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_the_key(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        changed(change)


def test_a_config_dict_keeps_its_references():
    ml_collections = pytest.importorskip("ml_collections")
    values = ml_collections.ConfigDict(small_run.values("data", "start"))
    values.train.optimizer.total_steps = values.get_ref("steps")
    values.lock()
    override(RunConfig, values, [("steps", "9"), ("data.max_text", "5"), ("train.optimizer.clip_norm", "None")])  # fmt: skip
    config = RunConfig.from_dict(values)
    assert (config.steps, config.train.optimizer.total_steps, config.data.max_text) == (9, 9, 5)
    assert config.train.optimizer.clip_norm is None and values.is_locked


def test_every_key_is_known():
    assert {"steps", "data.train", "train.optimizer.clip_norm", "train.lora.rank"} <= set(keys(RunConfig))  # fmt: skip
