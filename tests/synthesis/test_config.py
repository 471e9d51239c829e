"""A configuration is refused, naming the key, before any work."""

import copy

import pytest

from chroma_jax.synthesis.config import SynthesisConfig


def test_it_reads_nested_mappings(values):
    config = SynthesisConfig.from_dict(values)
    assert config.rows.train == 18 and config.voices[1].name == "high"
    assert SynthesisConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows", "train"), "many", "rows.train must be int, got 'many'"),
        (("rows", "trian"), 1, "unknown key rows.trian"),
        (("writer", "kind"), "poet", "writer.kind must be one of world, endpoint, local, got 'poet'"),
        (("writer",), dict(kind="endpoint", model="m", topics=["sea"], url="localhost"), "writer.url must be an address"),
        (("writer",), dict(kind="local", topics=["sea"]), "writer.model is missing"),
        (("writer",), dict(kind="local", model="m"), "writer.questions"),
        (("voices", 1, "name"), "low", "two are called 'low'"),
        (("voices", 1, "says"), "nothing", r"voices\[1\]: says must be one of"),
        (("voices", 1, "licence"), " ", r"voices\[1\]: licence of a voice must not be empty"),
        (("voices",), [], "voices: none may answer in train"),
        (("sound", "speed"), 0.7, "sound.speed must be at most 0.5"),
        (("filters", "max_wer"), 0.1, "filters.max_wer is set but filters.words names no judge"),
        (("shard_size",), 0, "shard_size must be at least 1, got 0"),
        (("voice_prompts",), "some", "voice_prompts must be one of"),
    ],
    ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else None,
)  # fmt: skip
def test_refused(values, path, value, message):
    values = copy.deepcopy(values)
    at = values
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        SynthesisConfig.from_dict(values)


def test_nobody_answers_what_only_itself_asks(values):
    values["voices"] = [values["voices"][0], {**values["voices"][1], "says": "questions"}]
    SynthesisConfig.from_dict(values)
    values["voices"] = values["voices"][:1]
    with pytest.raises(ValueError, match="nobody else may ask what 'low' answers"):
        SynthesisConfig.from_dict(values)
