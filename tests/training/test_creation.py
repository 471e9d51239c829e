"""The checkpoint that training from scratch begins with: a tokenizer of whole words, codebooks that are all used."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from chroma_jax import checkpoint
from chroma_jax import create as command
from chroma_jax.audio.prompt import Processor
from chroma_jax.audio.wav import load_audio, save_wav
from chroma_jax.checkpoint.params import flatten
from chroma_jax.config import chroma_4b, tiny
from chroma_jax.training import creation

DATA = pathlib.Path(__file__).parents[2] / "configs" / "debug" / "data.jsonl"
ROWS = [json.loads(line) for line in DATA.read_text().splitlines()]


@pytest.fixture(scope="module")
def created(tmp_path_factory):
    """(its directory, its configuration, what was said)."""
    out, lines = tmp_path_factory.mktemp("creation") / "start", []
    config = creation.create(out, tiny(), DATA, say=lines.append)
    return out, config, lines


def test_it_loads_as_what_it_is(created):
    out, config, lines = created
    loaded = checkpoint.load(out)
    assert loaded.config == config
    assert config.reasoner.vocab_size % 64 == 0
    processor = Processor.load(loaded.config, loaded.directory)
    question = processor.question(DATA.parent / ROWS[0]["question"])
    assert question.ids.max() < config.reasoner.vocab_size
    assert (question.ids == config.reasoner.audio_token_id).sum() > 20
    assert [line.split(":")[0] for line in lines] == ["tokenizer", "codebooks", str(out)]


def test_a_trained_codec_is_taken_as_it_is(created, tmp_path):
    """From its own directory or from a Chroma; its sizes count, not those that were asked for."""
    lines = []
    asked = dataclasses.replace(tiny(), codec=dataclasses.replace(tiny().codec, num_layers=1))
    config = creation.create(tmp_path / "new", asked, DATA, codec=str(created[0]), say=lines.append)
    assert config.codec == created[1].codec
    want, got = (
        checkpoint.load(d, stages=("codec",)).model for d in (created[0], tmp_path / "new")
    )
    for path, array in flatten(want.codec).items():
        np.testing.assert_array_equal(flatten(got.codec)[path], array, err_msg=path)
    assert [line.split(":")[0] for line in lines][1] == "codec"


def test_words_are_tokens_and_fit_the_speech(created):
    """A token, the final im_end among them, has two frames; the stop frame is one."""
    out, config, _ = created
    tokenizer = Processor.load(config, out).tokenizer
    for row in ROWS:
        ids = tokenizer.encode(row["answer_text"])
        assert tokenizer.decode(ids) == row["answer_text"]
        assert len(ids) <= len(row["answer_text"].split()) + 1  # the full stop
        samples = len(load_audio(DATA.parent / row["answer_audio"], 24000))
        frames = -(-samples // 1920) + 1
        assert len(ids) + 1 <= -(-frames // 2), row["id"]


def test_any_text_can_be_said_and_none_is_control(created):
    out, config, _ = created
    tokenizer = Processor.load(config, out).tokenizer
    text = "Ünïcode, 東京 and <|im_end|>."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert config.im_end_token_id not in ids
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [config.im_end_token_id]


def test_every_codebook_is_used(created):
    """By the real encoder, on a recording of each speaker: codes spread, and the decoder gives them a level."""
    codec = checkpoint.load(created[0]).model.codec
    files = [DATA.parent / row["answer_audio"] for row in ROWS[:3]]
    waves = np.stack([load_audio(file, 24000)[: 17 * 1920] for file in files])
    codes = jax.jit(lambda codec, waves: codec.encode(waves))(codec, waves)
    for book in range(8):
        assert len(np.unique(codes[..., book])) > 20, book
    wave = jax.jit(lambda codec, codes: codec.decode(codes))(codec, codes)
    assert 0.03 < float(jnp.sqrt(jnp.mean(wave**2))) < 0.3


def test_k_means_finds_clusters():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 3)).astype(np.float32) * 10
    x = np.repeat(centres, 40, axis=0) + 0.01 * rng.standard_normal((200, 3)).astype(np.float32)
    found = [creation.k_means(x, 5, np.random.default_rng(seed)) for seed in range(10)]
    errors = [np.abs(x[:, None] - c).sum(-1).min(1).mean() for c in found]
    assert min(errors) < 0.1
    assert all(np.isfinite(c).all() and c.shape == (5, 3) for c in found)


def test_a_vocabulary_takes_its_places_in_any_size():
    backend = creation.train_tokenizer(["a few words, a few more"], 300)
    config = creation.with_vocabulary(chroma_4b(), backend)
    assert config.reasoner.vocab_size == 320
    assert config.im_end_token_id == backend.token_to_id("<|im_end|>") < 300


def write(folder, **changes):
    save_wav(folder / "a.wav", np.sin(np.arange(24000) / 9).astype(np.float32), 24000)
    row = dict(question_text="Why?", answer_text="So it is.", answer_audio="a.wav") | changes
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "data.jsonl"


def test_mistakes(tmp_path, created):
    bad = write(tmp_path, answer_text="")
    with pytest.raises(ValueError, match=r"data.jsonl:1: answer_text must be text"):
        creation.create(tmp_path / "x", tiny(), bad)
    good = write(tmp_path)
    with pytest.raises(ValueError, match="vocab_size 200 is too small: 256 bytes and 8 control"):
        creation.create(tmp_path / "x", tiny(), good, vocab_size=200)
    with pytest.raises(ValueError, match="sound has 13 frames: 64 codewords want at least as many"):
        codec = checkpoint.load(created[0]).model.codec
        creation.fit_codebooks(
            codec, [load_audio(tmp_path / "a.wav", 24000)], np.random.default_rng(0)
        )
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="exists and is not empty; --overwrite replaces it"):
        creation.create(created[0], tiny(), good)
    for out in (tmp_path, tmp_path.parent):  # --overwrite would take the manifest away
        with pytest.raises(
            ValueError, match=r"holds an input, .*data\.jsonl; choose another --out"
        ):
            creation.create(out, tiny(), good, overwrite=True)


@pytest.mark.parametrize("missing", ["size", "manifest", "out"])
def test_the_command_asks_for_what_it_needs(missing):
    values = flags.FlagValues()
    command.define_flags(values)
    given = dict(size="tiny", manifest="m", out="o")
    del given[missing]
    values(["create", *(f"--{name}={value}" for name, value in given.items())])
    with pytest.raises(ValueError, match=f"--{missing} is missing"):
        command.main(values)
