"""Export: PyTorch reads it, and it is bit by bit what was converted."""

import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_checkpoints import (
    GOLDEN,
    assert_same_model,
    assert_same_tensors,
    mixed_dtype,
    random_ours,
    random_tensors,
    read_checkpoint,
    write_checkpoint,
)

from chroma_jax.checkpoint import CheckpointError, convert, export, load_torch, save
from chroma_jax.checkpoint.safetensors_io import Writer
from chroma_jax.config import hf, tiny


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The golden checkpoint, there and back."""
    directory = tmp_path_factory.mktemp("golden")
    convert(GOLDEN, directory / "converted")
    export(directory / "converted", directory / "exported")
    return directory / "exported"


def without_vision(tensors):
    return {name: x for name, x in tensors.items() if not name.startswith("thinker.visual.")}


def test_golden_comes_back_bit_by_bit(exported):
    assert sorted(os.listdir(exported)) == ["config.json", "model.safetensors"]
    assert_same_tensors(read_checkpoint(exported), without_vision(read_checkpoint(GOLDEN)))
    assert (exported / "config.json").read_bytes() == (GOLDEN / "config.json").read_bytes()


def test_reimport_is_the_same_model(exported, tmp_path):
    assert_same_model(load_torch(exported)[1], load_torch(GOLDEN)[1])
    convert(exported, tmp_path / "again")


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 300_000])
def test_mixed_dtypes_come_back_bit_by_bit(tmp_path, shard_bytes):
    tensors = random_tensors(tiny(), mixed_dtype)
    source = write_checkpoint(tmp_path / "it", tensors, shards=3)
    convert(source, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "out", shard_bytes=shard_bytes)
    assert_same_tensors(read_checkpoint(tmp_path / "out"), tensors)
    assert_same_model(load_torch(tmp_path / "out")[1], load_torch(source)[1])
    index = tmp_path / "out" / "model.safetensors.index.json"
    if shard_bytes == 300_000:
        index = json.loads(index.read_text())
        files = set(index["weight_map"].values())
        assert len(files) > 2
        assert f"model-00001-of-{len(files):05}.safetensors" in files
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    else:
        assert not index.exists()


def test_what_was_converted_to_bfloat16_comes_back_in_bfloat16(tmp_path):
    convert(GOLDEN, tmp_path / "converted", "bfloat16")
    export(tmp_path / "converted", tmp_path / "out")
    want = {
        name: x if name.startswith("codec_model.") else x.astype(ml_dtypes.bfloat16)
        for name, x in without_vision(read_checkpoint(GOLDEN)).items()
    }
    assert_same_tensors(read_checkpoint(tmp_path / "out"), want)


@pytest.mark.parametrize(
    "flags", [(True, None), (False, None), (None, True), (None, False), (False, True), (None, None)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_tied_flag_is_right_and_otherwise_left_alone(tmp_path, tied, flags):
    tensors = random_tensors(tiny())
    if tied:
        del tensors["thinker.lm_head.weight"]
    config = hf.write(tiny())
    thinker = config["thinker_config"]
    for section, flag in zip((thinker, thinker["text_config"]), flags, strict=True):
        section.pop("tie_word_embeddings", None)
        if flag is not None:
            section["tie_word_embeddings"] = flag
    source = write_checkpoint(tmp_path / "it", tensors, config)
    convert(source, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "out")
    assert_same_tensors(read_checkpoint(tmp_path / "out"), tensors)
    assert hf.load(tmp_path / "out" / "config.json").reasoner.tie_embeddings == tied
    said = flags[1] if flags[0] is None else flags[0]
    if bool(said) == tied:
        assert (tmp_path / "out" / "config.json").read_bytes() == (
            source / "config.json"
        ).read_bytes()


def test_a_model_made_here_can_be_exported(tmp_path):
    cfg = tiny()
    model = random_ours(cfg, seed=1)
    save(tmp_path / "saved", cfg, model)
    export(tmp_path / "saved", tmp_path / "out")
    assert_same_model(load_torch(tmp_path / "out")[1], model)


def test_side_files_come_along(golden, tmp_path):
    (golden / "preprocessor_config.json").write_text('{"feature_size": 128}')
    convert(golden, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"feature_size": 128}'
    assert not (tmp_path / "out" / "chroma_jax.json").exists()


def test_only_a_converted_directory_is_exported(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"is no converted checkpoint: it has no chroma_jax\.json"
    ):
        export(GOLDEN, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such directory"):
        export(tmp_path / "gone", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    convert(GOLDEN, tmp_path / "converted")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "converted", tmp_path / "out")
    assert os.listdir(tmp_path) == ["converted"]


def torch_state(directory, prefix):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    state = load_file(directory / "model.safetensors")
    assert all(x.dtype == torch.float32 for x in state.values())
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def test_pytorch_reads_the_codec(exported, tmp_path):
    """As a checkpoint of its own, because newer versions of transformers rename its tensors while loading."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    state = torch_state(exported, "codec_model.")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((exported / "config.json").read_text())["codec_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    codec, info = transformers.MimiModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info

    codes = np.random.default_rng(0).integers(0, 64, (1, 8, 5))
    with torch.no_grad():
        want = codec.eval().decode(torch.tensor(codes)).audio_values.numpy()[:, 0]
    _, model = load_torch(exported)
    got = model.codec.decode(jnp.asarray(codes.transpose(0, 2, 1)))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_pytorch_reads_the_thinker_and_computes_the_same(exported):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
    from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configuration

    config = json.loads((exported / "config.json").read_text())["thinker_config"]
    text = modeling.Qwen2_5OmniThinkerTextModel(
        configuration.Qwen2_5OmniTextConfig(**config["text_config"])
    )
    missing, unexpected = text.load_state_dict(
        torch_state(exported, "thinker.model."), strict=False
    )
    assert not unexpected
    assert not missing
    tower = modeling.Qwen2_5OmniAudioEncoder(
        configuration.Qwen2_5OmniAudioEncoderConfig(**config["audio_config"])
    )
    missing, unexpected = tower.load_state_dict(
        torch_state(exported, "thinker.audio_tower."), strict=False
    )
    assert not unexpected
    assert all("positional_embedding" in name for name in missing)

    ids = np.random.default_rng(0).integers(0, 400, (1, 9))
    with torch.no_grad():
        want = text.eval()(input_ids=torch.tensor(ids)).last_hidden_state.numpy()
    _, model = load_torch(exported)
    np.testing.assert_allclose(
        model.reasoner(jnp.asarray(ids)), want, atol=1e-4 * np.abs(want).max()
    )


@pytest.mark.parametrize("stage", ["backbone", "decoder"])
def test_pytorch_reads_the_llamas_and_computes_the_same(exported, stage):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = json.loads((exported / "config.json").read_text())[f"{stage}_config"]
    config.pop("model_type")
    llama = transformers.LlamaModel(transformers.LlamaConfig(**config))
    state = torch_state(exported, f"{stage}.model.")
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == ["embed_tokens.weight"]  # Chroma embeds frames and text itself

    x = np.random.default_rng(0).standard_normal((1, 7, config["hidden_size"])).astype(np.float32)
    with torch.no_grad():
        want = llama.eval()(inputs_embeds=torch.tensor(x)).last_hidden_state.numpy()
    _, model = load_torch(exported)
    got = getattr(model, stage).llama(jnp.asarray(x))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
