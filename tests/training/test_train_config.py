"""Training configurations from nested mappings, and the errors of those that make no sense."""

import dataclasses
import re

import pytest
import small_training as small

from chroma_jax.training import selection
from chroma_jax.training.config import OptimizerConfig, TrainConfig


def values(**changes):
    """`small.lora_config` as a configuration file would spell it: mappings, lists, whole numbers."""
    out = dataclasses.asdict(small.lora_config(mesh={"data": 2}))
    out["trains"] = [list(rule) for rule in out["trains"]]
    out["optimizer"]["clip_norm"] = 1
    for key, value in changes.items():
        where, _, name = key.rpartition("__")
        (out[where] if where else out)[name] = value
    return out


def test_from_dict():
    config = TrainConfig.from_dict(values())
    assert config == small.lora_config(mesh={"data": 2})
    assert isinstance(config.optimizer.clip_norm, float)
    assert TrainConfig.from_dict(values(optimizer__clip_norm=None)).optimizer.clip_norm is None
    hash(OptimizerConfig(**dataclasses.asdict(config.optimizer)))


def test_from_an_ml_collections_config():
    config_dict = pytest.importorskip("ml_collections").ConfigDict(values())
    assert TrainConfig.from_dict(config_dict) == small.lora_config(mesh={"data": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr=1e-3), "unknown key lr; known are optimizer, trains"),
        (dict(optimizer__lr=1e-3), "unknown key optimizer.lr"),
        (dict(optimizer__b1="0.9"), "optimizer.b1 must be float, got '0.9'"),
        (dict(accumulation=2.5), "accumulation must be int, got 2.5"),
        (dict(accumulation=True), "accumulation must be int, got True"),
        (dict(optimizer=3), "optimizer must be a mapping, got 3"),
        (dict(trains=[["a"]]), "trains must be pairs of strings"),
        (dict(optimizer__schedule="linear"), "optimizer.schedule must be one of constant, cosine"),
        (dict(optimizer__learning_rate=-1.0), "optimizer.learning_rate must be at least 0.0, got -1.0"),
        (dict(optimizer__learning_rate=float("nan")), "optimizer.learning_rate must be at least"),
        (dict(optimizer__b2=1.0), "optimizer.b2 must be in [0, 1), got 1.0"),
        (dict(optimizer__clip_norm=0.0), "optimizer.clip_norm must be positive"),
        (dict(optimizer__eps=0.0), "optimizer.eps must be positive"),
        (dict(optimizer__schedule="cosine", optimizer__warmup_steps=100), "warmup_steps 100 must be less"),
        (dict(decoder_weight=1.5), "decoder_weight must be between 0.0 and 1.0, got 1.5"),
        (dict(decoder_fraction=0.0), "decoder_fraction must be above 0"),
        (dict(accumulation=0), "accumulation must be at least 1, got 0"),
        (dict(compute_dtype="fp8"), "compute_dtype must be one of float32, bfloat16, float16, got 'fp8'"),
        (dict(remat="some"), "remat must be one of none, full, dots, all_dots, got 'some'"),
        (dict(lora__rank=0), "lora.rank must be at least 1"),
    ],
)  # fmt: skip
def test_errors_name_the_key(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig.from_dict(values(**changes))


def test_missing_key():
    incomplete = values()
    del incomplete["optimizer"]["eps"]
    with pytest.raises(ValueError, match="missing key optimizer.eps"):
        TrainConfig.from_dict(incomplete)


PATHS = ["backbone/llama/layers/gate", "backbone/head", "decoder/projection", "codec/x"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("backbone/.*", "train")], "parameter decoder/projection is matched by no rule; exactly one"),
        ([(".*", "train"), ("codec/.*", "freeze")], "codec/x is matched by '.*' and 'codec/.*'"),
        ([(".*", "learn")], "'learn' must be train, freeze, lora or average"),
        ([("(", "train")], "rule '(' is no regular expression"),
        ([(".*", "train"), ("reasoner", "freeze")], "rule 'reasoner' matches no parameter"),
        ([(".*", "freeze")], "no parameter trains"),
        ([(".*/gate", "train"), (".*(head|projection|x)", "lora")], "backbone/head is under a lora rule"),
    ],
)  # fmt: skip
def test_rules_cover_every_parameter_exactly_once(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        selection.select(tuple(rules), PATHS)


def test_a_rule_matches_whole_paths():
    rules = ((r"backbone/.*", "train"), (r"decoder/.*", "freeze"), (r"codec/x", "freeze"))
    chosen = selection.select(rules, PATHS)
    assert chosen.paths("train") == PATHS[:2]
    assert chosen.rule["codec/x"] == r"codec/x"
    with pytest.raises(ValueError, match="no rule"):
        selection.select(((r"backbone/llama", "train"), *rules[1:]), PATHS)
