"""Models that write: what they are asked, what of it is taken, and whose split it is."""

import json

import pytest

from chroma_jax.synthesis import writers
from chroma_jax.synthesis.config import SynthesisConfig
from chroma_jax.synthesis.script import UnwritableError
from chroma_jax.synthesis.writers import ModelWriter, open_writer


def config_of(values, **writer):
    return SynthesisConfig.from_dict({**values, "writer": dict(model="m", **writer)})


def test_a_model_behind_a_server(values, serve):
    answer = {"choices": [{"message": {"content": ' "It is\nblue." '}}]}
    server = serve((200, json.dumps(answer).encode()))
    values["rows"] = dict(train=1)
    config = config_of(values, kind="endpoint", url=server.url, topics=["the sea"])
    chat = writers.endpoint_chat(config.writer)
    assert chat([{"role": "user", "content": "Hi."}], 7) == ' "It is\nblue." '
    (path, _, asked), *_ = server.asked
    assert path == "/v1/chat/completions"
    assert asked == dict(model="m", messages=[{"role": "user", "content": "Hi."}], temperature=0.8, max_tokens=120, seed=7)  # fmt: skip


def test_a_server_that_answers_something_else(values, serve):
    server = serve((200, b"<html>"))
    config = config_of(values, kind="endpoint", url=server.url, topics=["the sea"])
    with pytest.raises(ValueError, match="answers no chat completion"):
        writers.endpoint_chat(config.writer)([], 0)


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.txt"
    lines = [f"What is {word}?" for word in ["red", "blue", "green", "sea", "sun", "moon", "rain", "snow", "ice", "fire", "wood", "gold"]]  # fmt: skip
    file.write_text("\n".join([*lines, "", "what is  RED"]))
    return str(file)


def test_questions_from_a_file(values, questions):
    values["rows"] = dict(train=3, validation=1)
    config = config_of(values, kind="local", questions=questions, held_one_in=3)
    found = writers.read_questions(config.writer)
    assert len(found["train"]) + len(found["validation"]) == 12  # the last line is the first again
    assert found["train"] and found["validation"]
    asked = []

    def chat(messages, seed):
        asked.append((messages[-1]["content"], seed))
        return "It is a word."

    writer = ModelWriter(config.writer, chat, found, config)
    script = writer(1, "train")
    assert script.question == found["train"][1] and script.answer == "It is a word."
    assert writer(0, "validation").apart == "question"
    writer(1, "train")
    assert asked[0] == asked[2]  # the seed is the row's


def test_too_few_questions(values, questions, monkeypatch):
    monkeypatch.setattr(writers, "local_chat", lambda config: None)
    values["rows"] = dict(train=100)
    with pytest.raises(ValueError, match=r"questions.txt has \d+ questions for train, 100 rows want"):  # fmt: skip
        open_writer(config_of(values, kind="local", questions=questions))


def test_a_model_that_asks_itself_keeps_the_splits_apart(values):
    config = config_of(values, kind="local", topics=["the sea"], held_one_in=3, attempts=30)

    def chat(messages, seed):
        return f"Why is it {'very ' * (seed % 20)}big?" if len(messages) == 1 else "It just is."

    writer = ModelWriter(config.writer, chat, None, config)
    asked = {split: {writer(i, split).question for i in range(20)} for split in ("train", "validation")}  # fmt: skip
    assert asked["train"] and asked["validation"] and not asked["train"] & asked["validation"]


def test_text_that_cannot_be_spoken_is_asked_again_and_then_given_up(values):
    config = config_of(values, kind="local", topics=["the sea"], attempts=2)
    said = []

    def chat(messages, seed):
        said.append(len(messages))
        return "# 1. A list"

    with pytest.raises(UnwritableError, match="unwritten"):
        ModelWriter(config.writer, chat, None, config)(0, "train")
    assert len(said) == 2


@pytest.mark.slow
def test_a_model_of_transformers(values, tmp_path):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "</s>", "user", "assistant", ":", "sea", "blue"])}  # fmt: skip
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=7, **sizes)).save_pretrained(tmp_path)
    values["writer"] = dict(kind="local", model=str(tmp_path), topics=["the sea"], max_tokens=8)
    chat = writers.local_chat(SynthesisConfig.from_dict(values).writer)
    messages = [{"role": "user", "content": "sea"}]
    assert chat(messages, 1) == chat(messages, 1)
    assert len({chat(messages, seed) for seed in range(5)}) > 1
