"""The objective that trains the Reasoner on text: what it computes, what it changes, and what does not go with it."""

import jax
import numpy as np
import pytest
import small_training as small

from chroma_jax.training import losses, selection
from chroma_jax.training.objectives.dialogue import check_hidden
from chroma_jax.training.progress import mean
from chroma_jax.training.step import build


def config(**changes):
    return small.train_config(objective="text", trains=selection.REASONER, **changes)


@pytest.fixture(scope="module")
def stepped():
    """One step: trainer, what it began with, state, frozen parameters, metrics."""
    trainer = build(small.CONFIG, config())
    state, frozen = trainer.from_model(small.model())
    before = small.host((state.params, frozen))
    state, metrics = trainer.train_step(state, frozen, small.batch())
    return trainer, before, state, frozen, metrics


@jax.jit
def think(reasoner, ids, chunks, lengths):
    """Logits at every position of the prompts."""
    return reasoner.logits(reasoner(ids, reasoner.encode_audio(chunks, lengths)))


def by_hand(model, batch):
    """(mean cross entropy, accuracy) of the answers' tokens, row by row and token by token."""
    all_logits = np.asarray(
        think(model.reasoner, batch.prompt_ids, batch.chunks, batch.chunk_lengths)
    )
    terms, right = [], []
    for row, logits in enumerate(all_logits):
        for i in range(int(batch.text_lengths[row])):
            one = logits[batch.prompt_lengths[row] - 1 + i].astype(np.float64)
            token = int(batch.text[row, i])
            terms.append(np.log(np.exp(one - one.max()).sum()) + one.max() - one[token])
            right.append(one.argmax() == token)
    return np.mean(terms), np.mean(right)


def test_the_loss_is_that_of_the_answer_tokens(stepped):
    metrics, batch = stepped[4], small.batch()
    loss, accuracy = by_hand(small.model(), batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["text_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["text_accuracy"], accuracy, atol=1e-6)
    assert metrics["text_tokens"] == batch.text_lengths.sum()
    assert metrics["finite"] and metrics["grad_norm"] > 0


def test_the_reasoner_alone_changes(stepped):
    _, before, state, frozen, _ = stepped
    after = small.host((state.params, frozen))
    assert after.keys() == before.keys()
    for path, array in after.items():
        if path.split("/")[1] == "reasoner":
            assert array.dtype == np.float32
            # Where PyTorch has a parameter that nothing uses, weight decay alone moves it.
            assert (array != before[path]).any(), path
        else:
            np.testing.assert_array_equal(array, before[path], err_msg=path)


def test_ears_get_gradients():
    trainer = build(small.CONFIG, config())
    state, frozen = trainer.from_model(small.model())
    batch = trainer.put(small.batch())

    def loss(params):
        sums = trainer._sums(params, {}, frozen, batch, None)
        return losses.text_share(sums, sums.count)

    gradients = small.host(jax.jit(jax.grad(loss))(state.params))
    silent = [path for path, g in gradients.items() if not np.any(g)]
    assert all("unused" in path for path in silent), silent
    assert any(
        path.startswith("reasoner/audio_encoder/") and "unused" not in path for path in gradients
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(accumulation=4, remat="full"), id="accumulation and remat"),
        pytest.param(
            dict(mesh={"data": 2, "fsdp": 2, "tensor": 2}), id="mesh", marks=pytest.mark.slow
        ),
    ],
)
def test_the_same_update_another_way(stepped, changes):
    trainer = build(small.CONFIG, config(**changes))
    state, frozen = trainer.from_model(small.model())
    state, metrics = trainer.train_step(state, frozen, small.batch())
    for name in ("loss", "grad_norm", "text_accuracy"):
        np.testing.assert_allclose(metrics[name], stepped[4][name], rtol=2e-5, err_msg=name)
    want = small.host(stepped[2].params)
    for path, array in small.host(state.params).items():
        # Adam divides by the gradient's size: where that is rounding, so is the update.
        np.testing.assert_allclose(array, want[path], rtol=0, atol=2e-3, err_msg=path)
        assert np.mean(np.abs(array - want[path]) > 1e-4) < 0.01, path


def test_padding_does_not_count(stepped):
    trainer = stepped[0]
    state, frozen = trainer.from_model(small.model())
    batch = small.batch()
    batch.text_lengths[3:] = 0
    few = trainer.eval_step(state, frozen, batch)
    loss, accuracy = by_hand(small.model(), batch)
    np.testing.assert_allclose(few["text_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(few["text_accuracy"], accuracy, atol=1e-6)
    none = trainer.eval_step(state, frozen, batch._replace(text_lengths=batch.text_lengths * 0))
    assert none["text_loss"] == 0 and none["text_tokens"] == 0
    both = mean([few, none])
    np.testing.assert_allclose(both["text_loss"], few["text_loss"], rtol=1e-6)
    assert both["text_tokens"] == batch.text_lengths.sum()
    objective = trainer.objective
    assert objective.describe(both).startswith(f"text loss {both['text_loss']:.4f}  accuracy ")
    assert objective.positions(batch) == (batch.prompt_lengths + batch.text_lengths)[:3].sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective="sound"), "objective must be one of speech, text, codec, got 'sound'"),
        (
            dict(objective="text", trains=selection.STAGE_1),
            "objective 'text' trains reasoner only, but rule 'backbone/.*' says train for backbone/",
        ),
        (
            dict(trains=selection.REASONER),
            "objective 'speech' trains backbone and decoder only, but rule 'reasoner/.*' says train for reasoner/",
        ),
        (
            dict(objective="text", trains=((".*", "freeze"),)),
            "no parameter trains: every rule says freeze",
        ),
        (
            dict(trains=(("(?!codec).*/?.*", "freeze"), ("codec/.*", "train"))),
            "objective 'speech' trains backbone and decoder only, but rule 'codec/.*' says train",
        ),
    ],
    ids=["unknown", "text trains speech", "speech trains text", "nothing", "codec"],
)
def test_rules_that_do_not_fit_the_objective(changes, message):
    with pytest.raises(ValueError) as error:
        build(small.CONFIG, small.train_config(**changes))
    assert message in str(error.value)


def test_states_computed_beforehand():
    trainer = build(small.CONFIG, config())
    with pytest.raises(ValueError, match="prepare it without --precompute_hidden"):
        trainer.put(small.with_hidden())
    with pytest.raises(ValueError, match="prepare it without --precompute_hidden"):
        check_hidden(True)
    build(small.CONFIG, small.train_config()).objective.check(small.with_hidden())
