"""Sampling against transformers' logits processors, and against the distributions it must draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chroma_jax.engine.sampling import Sampling, TokenSampling, choose, controls

VOCAB = 40

SETTINGS = {
    "temperature": TokenSampling(temperature=0.7),
    "top_k": TokenSampling(temperature=1.3, top_k=5),
    "top_p": TokenSampling(temperature=1.0, top_p=0.6),
    "min_p": TokenSampling(temperature=1.0, min_p=0.2),
    "all": TokenSampling(temperature=0.9, top_k=20, top_p=0.85, min_p=0.05, repetition_penalty=1.4),
    "tiny_top_p": TokenSampling(temperature=1.0, top_p=1e-4),
}


def one_stage(setting, rows):
    return controls([Sampling(text=setting)] * rows).text


def reference_distribution(logits, setting, seen):
    """Probabilities [V] that transformers' processors leave, in the order in which generate applies them."""
    torch = pytest.importorskip("torch")
    from transformers import generation as g

    ids = torch.tensor(np.flatnonzero(seen)[None])
    processors = (
        [g.RepetitionPenaltyLogitsProcessor(setting.repetition_penalty)] if ids.numel() else []
    )
    processors.append(g.TemperatureLogitsWarper(setting.temperature))
    if setting.top_k:
        processors.append(g.TopKLogitsWarper(setting.top_k))
    if setting.top_p < 1:
        processors.append(g.TopPLogitsWarper(setting.top_p))
    if setting.min_p:
        processors.append(g.MinPLogitsWarper(setting.min_p))
    scores = torch.tensor(logits)[None]
    for process in processors:
        scores = process(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_draws_follow_the_reference_distribution(setting):
    rng = np.random.default_rng(0)
    logits = (2 * rng.standard_normal(VOCAB)).astype(np.float32)
    seen = rng.random(VOCAB) < 0.3
    want = reference_distribution(logits, setting, seen)
    draws = 20_000
    tile = lambda x: jnp.broadcast_to(jnp.asarray(x), (draws, VOCAB))  # noqa: E731
    keys = jax.random.split(jax.random.key(1), draws)
    tokens = jax.jit(choose)(tile(logits), one_stage(setting, draws), keys, tile(seen))
    got = np.bincount(np.asarray(tokens), minlength=VOCAB) / draws
    np.testing.assert_array_equal(got[want == 0], 0)
    # Five standard deviations of a binomial, and a little for probabilities near 0.
    np.testing.assert_array_less(np.abs(got - want), 5 * np.sqrt(want * (1 - want) / draws) + 1e-3)


def test_greedy_is_argmax_after_the_penalty():
    logits = jnp.asarray([[3.0, 2.5, -1.0], [-1.0, -1.5, -3.0]])
    seen = jnp.asarray([[True, False, False], [True, False, False]])
    keys = jax.random.split(jax.random.key(0), 2)
    plain = choose(logits, one_stage(TokenSampling(), 2), keys, seen)
    np.testing.assert_array_equal(plain, [0, 0])
    penalised = choose(logits, one_stage(TokenSampling(repetition_penalty=2.0), 2), keys, seen)
    np.testing.assert_array_equal(penalised, [1, 1])


def test_rows_draw_alone_as_in_a_batch():
    rng = np.random.default_rng(2)
    settings = [*SETTINGS.values(), TokenSampling()]
    rows = len(settings)
    logits = jnp.asarray(rng.standard_normal((rows, VOCAB)), jnp.float32)
    keys = jax.vmap(jax.random.key)(jnp.arange(rows))
    seen = jnp.asarray(rng.random((rows, VOCAB)) < 0.2)
    batch = choose(logits, controls([Sampling(text=s) for s in settings]).text, keys, seen)
    for i, setting in enumerate(settings):
        alone = choose(logits[i : i + 1], one_stage(setting, 1), keys[i : i + 1], seen[i : i + 1])
        assert int(alone[0]) == int(batch[i])


def test_stages_have_their_own_controls():
    s = Sampling(temperature=0.7, top_k=50, codes=TokenSampling(temperature=0.2))
    text, code0, codes = s.stages()
    assert text == TokenSampling()
    assert code0 == TokenSampling(temperature=0.7, top_k=50)
    assert codes == TokenSampling(temperature=0.2)
    assert all(stage.temperature == 0 for stage in Sampling.greedy().stages())


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -3}, {"top_k": 2.5}, {"top_p": 0.0},
     {"top_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"temperature": "hot"}, {"top_k": 2**31}, {"top_k": None}, {"top_k": True},
     {"temperature": 1e39}, {"repetition_penalty": 1e-46}, {"min_p": True}, {"text": None}, {"text": {}}, {"code0": 0.7}, {"codes": "hot"}],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))) as error:
        Sampling(**bad)
    assert len(str(error.value)) <= 200
