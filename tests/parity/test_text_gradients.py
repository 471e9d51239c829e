"""The loss of text and its gradients against PyTorch's autograd through transformers' Qwen2.5-Omni Thinker, ears included."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax.data.batch import Batch
from chroma_jax.model.reasoner import Reasoner
from chroma_jax.training import losses
from chroma_jax.training.objectives.dialogue import reasoner_states

from .test_thinker import (
    AUDIO,
    CONFIGS,
    PAD,
    checkpoint_name,
    our_inputs,
    pair,
    questions,
    thinker,
)
from .torch_weights import load, near, torch

assert thinker
# Rows of one clip each, of unlike lengths, and a row without; answers of unlike lengths.
CLIPS, ANSWERS = [[45], [13], []], [4, 1, 3]


def oracle_loss(oracle, rows, mels, answers):
    """The mean cross entropy of all answer tokens, each row on its own, without padding."""
    terms = []
    for row, (question, answer) in enumerate(zip(rows, answers, strict=True)):
        ids = torch.tensor(np.concatenate([question, answer]))[None]
        audio = {}
        if mels[row]:
            mel = torch.tensor(mels[row][0].T)[None]
            heard = torch.ones(mel.shape[::2], dtype=torch.long)
            audio = dict(input_features=mel, feature_attention_mask=heard)
        logits = oracle(input_ids=ids, attention_mask=torch.ones_like(ids), **audio).logits[0]
        before = logits[len(question) - 1 : -1]
        terms.append(
            torch.nn.functional.cross_entropy(before, torch.tensor(answer), reduction="none")
        )
    return torch.cat(terms).mean()


def batch_of(cfg, rows, mels, answers):
    """The same as a training batch; what speech alone needs is left out."""
    ids, _, (chunks, chunk_lengths) = our_inputs(
        cfg, [np.concatenate(pair) for pair in zip(rows, answers, strict=True)], mels
    )
    text = np.full((len(rows), max(map(len, answers)) + 1), PAD)
    for row, answer in enumerate(answers):
        text[row, : len(answer)] = answer
    fields = dict.fromkeys(Batch._fields) | dict(
        prompt_ids=ids,
        prompt_lengths=np.array([len(row) for row in rows]),
        chunks=chunks,
        chunk_lengths=chunk_lengths,
        text=text,
        text_lengths=np.array([len(answer) for answer in answers]),
    )
    return jax.tree.map(jnp.asarray, Batch(**fields))


@pytest.mark.parametrize("config", ["gqa", "mha, tied"])
def test_gradients_equal_autograd(config):
    oracle, model = pair(*CONFIGS[config])
    rows, mels = questions(model.cfg, CLIPS, seed=1)
    rng = np.random.default_rng(2)
    answers = [rng.integers(0, AUDIO, n) for n in ANSWERS]
    want = oracle_loss(oracle, rows, mels, answers)
    want.backward()
    named = {
        checkpoint_name(name): np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in oracle.named_parameters()
    }
    graphdef, weights = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def loss(weights, batch):
        reasoner = nnx.merge(graphdef, weights)
        hidden = reasoner_states(types.SimpleNamespace(reasoner=reasoner), batch)
        sums = losses.text_sums(reasoner.logits(hidden), batch.text, batch.text_lengths)
        return losses.text_share(sums, sums.count)

    batch = batch_of(model.cfg, rows, mels, answers)
    value, gradients = loss(nnx.to_pure_dict(weights), batch)
    np.testing.assert_allclose(value, want.detach().numpy(), rtol=1e-5)
    placed = load(lambda: Reasoner(model.cfg, rngs=nnx.Rngs(0)), "reasoner", named)
    expected = jax.tree.leaves(nnx.to_pure_dict(nnx.state(placed)))
    for (path, got), wanted in zip(
        jax.tree_util.tree_leaves_with_path(gradients), expected, strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "unused" in name:
            assert not np.any(got) and not np.any(wanted)
        else:
            assert np.abs(wanted).max() > 0, name
            near(got, wanted, 1e-4)
