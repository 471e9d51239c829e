"""Config reader: the golden file, both rope spellings, errors by name, and a fuzz of it all."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chroma_jax.config import Llama3Rope, chroma_4b, hf, tiny

GOLDEN = Path(__file__).parent / "data" / "chroma-tiny" / "config.json"
HF = json.loads(GOLDEN.read_text())


def edited(path: str, value=None, *, remove: bool = False) -> dict:
    """The golden dictionary with one dotted key set or removed."""
    config = copy.deepcopy(HF)
    *parents, key = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    if remove:
        del section[key]
    else:
        section[key] = value
    return config


def test_golden_is_tiny():
    assert hf.load(GOLDEN) == tiny()


@pytest.mark.parametrize("config", [chroma_4b(), tiny()], ids=["chroma_4b", "tiny"])
def test_round_trip(config):
    assert hf.read(json.loads(json.dumps(hf.write(config)))) == config


def test_published_sizes():
    config = chroma_4b()
    assert config.codec.frame_samples == 1920
    assert config.codec.downsample == 2
    assert config.reasoner.audio.chunk_frames == 200
    assert config.num_codebooks == 8
    # 2 s give 50 features; whole chunks pool alone.
    assert [config.reasoner.audio.num_features(m) for m in (0, 1, 2, 3, 4, 5, 200, 201, 937)] == [
        0,
        0,
        0,
        1,
        1,
        1,
        50,
        50,
        234,
    ]


@pytest.mark.parametrize("stack", ["backbone_config", "decoder_config"])
def test_old_rope_spelling_equals_new(stack):
    config = copy.deepcopy(HF)
    rope = config[stack].pop("rope_parameters")
    config[stack]["rope_theta"] = rope.pop("rope_theta")
    config[stack]["rope_scaling"] = rope
    assert hf.read(config) == tiny()
    rope["type"] = rope.pop("rope_type")  # the oldest name of the type
    assert hf.read(config) == tiny()


def test_old_mrope_spelling():
    config = copy.deepcopy(HF)
    text = config["thinker_config"]["text_config"]
    del text["rope_parameters"]
    text |= {"rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    assert hf.read(config) == tiny()


def test_plain_theta():
    config = copy.deepcopy(HF)
    del config["backbone_config"]["rope_parameters"]
    config["backbone_config"]["rope_theta"] = 12345.0
    rope = hf.read(config).backbone.llama.rope
    assert rope.theta == 12345.0
    assert rope.llama3 is None


def test_theta_inside_rope_parameters_wins():
    config = edited("backbone_config.rope_theta", 7.0)
    assert hf.read(config).backbone.llama.rope == dataclasses.replace(
        tiny().backbone.llama.rope,
        theta=500000.0,
        llama3=Llama3Rope(
            factor=32.0, low_freq_factor=0.125, high_freq_factor=0.5, original_max_positions=1024
        ),
    )


REQUIRED = [
    "audio_frame_freq",
    "audio_num_codebooks",
    "text_start_token_id",
    "im_end_token_id",
    "codebook_eos_token_id",
    "thinker_config",
    "thinker_config.text_config",
    "thinker_config.text_config.hidden_size",
    "thinker_config.text_config.rms_norm_eps",
    "thinker_config.text_config.vocab_size",
    "thinker_config.audio_config.n_window",
    "thinker_config.audio_config.num_mel_bins",
    "thinker_config.audio_start_token_id",
    "thinker_config.audio_token_index",
    "backbone_config.max_position_embeddings",
    "backbone_config.vocab_size",
    "backbone_config.rope_parameters.factor",
    "decoder_config.audio_embedding_dim",
    "decoder_config.num_attention_heads",
    "codec_config.upsampling_ratios",
    "codec_config.sliding_window",
    "codec_config.rope_parameters.rope_theta",
]


@pytest.mark.parametrize("path", REQUIRED)
@pytest.mark.parametrize("how", ["removed", "null"])
def test_missing_key_is_named(path, how):
    config = edited(path, None, remove=how == "removed")
    with pytest.raises(ValueError, match=f"missing key {path}$"):
        hf.read(config)


@pytest.mark.parametrize("how", ["removed", "null"])
def test_what_follows_from_the_rest_may_be_left_out(how):
    """transformers' own MimiConfig writes no frame rate, and Qwen's Thinker has no padding token of its own."""
    config = edited("codec_config._frame_rate", None, remove=how == "removed")
    assert hf.read(config) == tiny()
    config = edited("thinker_config.pad_token_id", None, remove=how == "removed")
    reasoner = dataclasses.replace(tiny().reasoner, pad_token_id=tiny().im_end_token_id)
    assert hf.read(config) == dataclasses.replace(tiny(), reasoner=reasoner)


def test_audio_token_has_two_names():
    config = edited("thinker_config.audio_token_index", remove=True)
    config["thinker_config"]["audio_token_id"] = 499
    assert hf.read(config).reasoner.audio_token_id == 499


def test_head_dim_is_derived_only_where_it_is_whole():
    config = edited("backbone_config.head_dim", remove=True)
    assert hf.read(config) == tiny()
    config["backbone_config"]["num_attention_heads"] = 6
    with pytest.raises(ValueError, match=r"backbone_config.hidden_size 64 is no multiple"):
        hf.read(config)


WRONG = [
    ("model_type", "llama", "not a Chroma checkpoint: model_type is 'llama'"),
    ("architectures", ["LlamaForCausalLM"], "unknown architecture: .*LlamaForCausalLM"),
    ("architectures", 5, "architectures must be a list"),
    ("architectures", "ChromaForConditionalGeneration", "architectures must be a list"),
    ("thinker_config", [], None),
    ("thinker_config", "x", "thinker_config must be an object, got str"),
    (
        "backbone_config.rope_parameters.rope_type",
        "yarn",
        "backbone_config.rope_parameters.*'yarn'",
    ),
    (
        "codec_config.rope_parameters.rope_type",
        "dynamic",
        "codec_config.rope_parameters.*'dynamic'",
    ),
    ("backbone_config.rope_parameters.rope_theta", -1, "rope_theta must be positive"),
    ("backbone_config.hidden_size", 64.5, "backbone_config.hidden_size must be a positive integer"),
    ("backbone_config.hidden_size", True, "backbone_config.hidden_size must be a positive integer"),
    ("backbone_config.hidden_size", "64", "backbone_config.hidden_size must be a positive integer"),
    ("backbone_config.hidden_size", math.inf, "backbone_config.hidden_size must be a positive"),
    ("backbone_config.hidden_size", math.nan, "backbone_config.hidden_size must be a positive"),
    (
        "backbone_config.hidden_size",
        10**400,
        "hidden_size must be a positive integer, got 1000",
    ),
    (
        "backbone_config.rms_norm_eps",
        10**400,
        "backbone_config.rms_norm_eps must be a finite number",
    ),
    (
        "backbone_config.rms_norm_eps",
        math.nan,
        "backbone_config.rms_norm_eps must be a finite number",
    ),
    ("backbone_config.rms_norm_eps", 0, "backbone_config.rms_norm_eps must be positive"),
    ("backbone_config.hidden_act", "gelu", "backbone_config.hidden_act must be 'silu', got 'gelu'"),
    ("backbone_config.attention_bias", True, "backbone_config.attention_bias must be False"),
    ("backbone_config.num_key_value_heads", 3, "num_attention_heads 4 is no multiple"),
    ("backbone_config.head_dim", 15, "head_dim must be even"),
    ("thinker_config.text_config.rope_parameters.mrope_section", [2, 3], "must have 3 entries"),
    (
        "thinker_config.text_config.rope_parameters.mrope_section",
        [2, 3, 4],
        "must sum to head_dim / 2",
    ),
    ("thinker_config.tie_word_embeddings", "false", "tie_word_embeddings must be true or false"),
    (
        "thinker_config.audio_token_index",
        512,
        "audio_token_id 512 lies outside the text vocabulary",
    ),
    ("thinker_config.pad_token_id", -1, "pad_token_id -1 lies outside"),
    ("im_end_token_id", 9999, "im_end_token_id 9999 lies outside the text vocabulary of 512"),
    ("codebook_eos_token_id", 67, "codebook_eos_token_id 67 lies outside the audio vocabulary"),
    ("thinker_config.audio_config.d_model", 45, "d_model 45 is no multiple"),
    ("thinker_config.audio_config.n_window", 7, "n_window must be even"),
    ("audio_frame_freq", 960, "audio_frame_freq is 960 but codec_config gives 1920"),
    (
        "audio_num_codebooks",
        4,
        "backbone_config.audio_num_codebooks is 8 but audio_num_codebooks is 4",
    ),
    ("codec_config._frame_rate", 0, "codec_config._frame_rate must be positive"),
    ("codec_config._frame_rate", 1e-320, "do not fit"),
    ("codec_config._frame_rate", 12.3, "do not fit"),
    ("codec_config.upsampling_ratios", [8, 6, 5, 10**400], "upsampling_ratios must be a list"),
    ("codec_config.upsampling_ratios", 8, "upsampling_ratios must be a list"),
    ("codec_config.head_dim", 7, "codec head_dim must be even"),
    ("codec_config.upsample_groups", 5, "no multiple of upsample_groups"),
    ("codec_config.use_causal_conv", False, "use_causal_conv must be True"),
    ("codec_config.num_quantizers", 7, "num_quantizers 7 is less than audio_num_codebooks 8"),
    ("codec_config.num_semantic_quantizers", 8, "must lie between 0 and"),
    ("codec_config.codebook_size", 68, "backbone vocab_size 67 is less than"),
    ("decoder_config.vocab_size", 68, "decoder vocab_size is 68 but backbone vocab_size is 67"),
    ("decoder_config.audio_embedding_dim", 32, "must be equal"),
    ("decoder_config.max_position_embeddings", 7, "decoder max_position_embeddings 7 is less"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), WRONG, ids=[f"{p}={str(v)[:20]}" for p, v, _ in WRONG]
)
def test_wrong_value_is_named(path, value, message):
    with pytest.raises(ValueError, match=message) as error:
        hf.read(edited(path, value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("config", [None, [], "chroma", 3, {}], ids=repr)
def test_not_a_config(config):
    with pytest.raises(ValueError, match=r"config must be an object|not a Chroma checkpoint"):
        hf.read(config)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "\xff", "[" * 100_000],
    ids=["empty", "open", "list", "latin-1", "deep"],
)
def test_load_names_the_file(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        hf.load(path)


def test_load_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        hf.load(tmp_path / "config.json")


def test_with_dtype_leaves_the_codec():
    config = tiny().with_dtype("bfloat16", "float32")
    assert config.reasoner.text.dtype == config.decoder.llama.dtype == "bfloat16"
    assert config.reasoner.audio.param_dtype == "float32"
    assert config.codec == tiny().codec
    with pytest.raises(ValueError, match="got 'int8'"):
        tiny().with_dtype("int8")


def _paths(value: dict, prefix: tuple = ()) -> list[tuple]:
    found = []
    for key, inner in value.items():
        found.append((*prefix, key))
        if isinstance(inner, dict):
            found += _paths(inner, (*prefix, key))
    return found


# vision_config and the like are never read: leave them alone.
PATHS = [p for p in _paths(HF) if "vision_config" not in p and "id2label" not in p]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 130),
    st.integers(),
    st.just(10**400),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(
        [0, 0.0, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, "", "llama3", "default"]
    ),
    st.text(max_size=5),
    st.lists(st.integers(-1, 9), max_size=4),
    st.dictionaries(
        st.sampled_from(["rope_type", "rope_theta", "factor"]), st.floats(), max_size=3
    ),
)


@given(st.lists(st.tuples(st.sampled_from(PATHS), st.booleans(), VALUES), min_size=1, max_size=4))
@example([(("codec_config", "_frame_rate"), False, 0)])
@example([(("backbone_config", "hidden_size"), False, math.inf)])
@example([(("architectures",), False, 5)])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_fuzz(edits):
    """Any mutation of the golden dictionary is a valid config that survives a round trip, or a ValueError."""
    config = copy.deepcopy(HF)
    for path, remove, value in edits:
        section = config
        for key in path[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        if remove:
            section.pop(path[-1], None)
        else:
            section[path[-1]] = value
    try:
        read = hf.read(config)
    except ValueError as error:
        assert str(error)
        return
    assert hf.read(hf.write(read)) == read
    assert read.codec.frame_samples == config["audio_frame_freq"]
    assert read.reasoner.audio_token_id is not None
    assert min(read.backbone.llama.head_dim, read.decoder.llama.head_dim, read.codec.head_dim) > 0


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_fuzz_load(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"config\.json"):
        hf.load(path)
