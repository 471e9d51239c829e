"""The objective of a codec in the training step: what moves what, on any mesh, in any microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_codec as small

from chroma_jax.checkpoint.params import flatten
from chroma_jax.checkpoint.store import unnest
from chroma_jax.training.codec.spectral import mel_distance
from chroma_jax.training.objectives.codec import decode, encode
from chroma_jax.training.step import build

STEPS = 4
ADVERSARIAL = dict(discriminator=small.discriminator())


def run(config, steps=STEPS):
    """(trainer, state, metrics of each step, parameters before each step by path)."""
    trainer = build(small.codec_config(), config)
    state, frozen = trainer.init()
    history, seen = [], []
    for step in range(steps):
        state = trainer.prepare(state, frozen, step, small.batch)
        seen.append(host(state))
        state, metrics = trainer.train_step(state, frozen, small.batch(step))
        history.append(jax.device_get(metrics))
    return trainer, state, history, seen


def host(state):
    tree = unnest(state.params) | unnest(state.averages)
    return {path: np.array(array) for path, array in tree.items()}


@pytest.fixture(scope="module")
def adversarial():
    return run(small.train_config(ADVERSARIAL))


def test_it_learns_and_everything_moves(adversarial):
    trainer, state, history, seen = adversarial
    assert all(m["finite"] == 1 and np.isfinite(m["loss"]) for m in history)
    after = host(state)
    still = [p for p, a in after.items() if np.array_equal(a, seen[-1][p])]
    # The hinges push the last bias up and down alike while all scores lie between them.
    assert all(path.endswith(("initialized", "/last/bias")) for path in still), still
    assert trainer.compilations == 1
    assert history[0]["frames"] == small.ROWS * small.FRAMES


def test_codebooks_wait_for_their_step(adversarial):
    _, _, history, seen = adversarial
    books = [path for path in seen[0] if path.endswith("embed_sum")]
    assert len(books) == 2
    for path in books:
        flag = path.replace("embed_sum", "initialized")
        np.testing.assert_array_equal(seen[0][path], seen[1][path])
        assert [s[flag].max() for s in seen] == [0, 0, 1, 1]
        assert not np.array_equal(seen[1][path], seen[2][path])
    assert [m["commitment"] > 0 for m in history] == [False, False, True, True]
    assert [m["used_codes"] > 0 for m in history] == [False, False, True, True]


def test_scales_are_set_before_the_first_step():
    trainer = build(small.codec_config(), small.train_config())
    state, frozen = trainer.init()
    state = trainer.prepare(state, frozen, 0, small.batch)

    @jax.jit
    def deviations(codec, wave):
        latents = encode(codec, wave)
        return jnp.std(latents), jnp.std(decode(codec, latents))

    found = deviations(trainer.model_of(state, frozen).codec, small.batch().wave)
    np.testing.assert_allclose(found, [1, 0.05], rtol=1e-3)
    assert trainer.prepare(state, frozen, 1, small.batch) is state


def test_losses_of_the_codec_stop_at_the_discriminator_and_back(adversarial):
    """The discriminator's own loss moves nothing of the codec, and what the codec hears of it moves nothing of the discriminator."""
    trainer, state, _, _ = adversarial
    batch = trainer.put(small.batch())
    objective = trainer.objective
    draw = objective.draw(jnp.asarray(5), batch)

    @jax.jit
    def gradients(params):
        def value(params):
            sums = trainer._sums(params, state.averages, {}, batch, draw)
            return sums.listened, sums.discriminator

        return jax.jacrev(value)(params)

    of = {
        part: {path: np.abs(np.asarray(g)).max() for path, g in unnest(tree).items()}
        for part, tree in zip(("listened", "discriminator"), gradients(state.params), strict=True)
    }
    for path in of["listened"]:
        if path.endswith("/last/bias"):  # as above
            continue
        mine = path.startswith("discriminator/")
        assert (of["listened"][path] == 0) == mine, path
        assert (of["discriminator"][path] == 0) != mine, path


@pytest.fixture(scope="module")
def alone():
    return run(small.train_config())


def test_the_codec_listens_from_its_step_on(adversarial, alone):
    """A discriminator that is not heard yet changes nothing of the codec's steps; afterwards it does."""
    seen, heard, without = adversarial[3], host(adversarial[1]), host(alone[1])
    for path, array in alone[3][2].items():
        if (
            "embed_sum" not in path and "usage" not in path
        ):  # nearly equal latents may fall to other clusters
            np.testing.assert_allclose(seen[2][path], array, atol=3e-5, err_msg=path)
    assert max(np.abs(heard[path] - array).max() for path, array in without.items()) > 1e-4


@pytest.mark.parametrize(
    "changes", [dict(mesh={"data": 2, "fsdp": 4}), pytest.param(dict(accumulation=2), marks=pytest.mark.slow)],
    ids=["eight devices", "two microbatches"],
)  # fmt: skip
def test_devices_and_microbatches_change_nothing(adversarial, changes):
    _, state, history, _ = run(small.train_config(ADVERSARIAL, **changes))
    for got, want in zip(history, adversarial[2], strict=True):
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-3, atol=1e-5, err_msg=name)
    got, want = host(state), host(adversarial[1])
    for path, array in want.items():
        np.testing.assert_allclose(got[path], array, atol=5e-3, err_msg=path)
        assert np.mean(np.abs(got[path] - array) > 1e-4) < 0.02, path


def test_evaluation_is_the_codec_itself(adversarial):
    """What users decode, with all codebooks; padding rows do not count."""
    trainer, state, _, _ = adversarial
    batch = small.batch(7)
    batch.lengths[5:] = 0
    metrics = trainer.eval_step(state, {}, batch)
    codec = trainer.model_of(state, {}).codec

    @jax.jit
    def through(codec, wave):
        made = codec.decode(codec.encode(wave))
        return made, mel_distance(made, wave, (16, 32), codec.cfg.sampling_rate).mean()

    made, distance = through(codec, batch.wave[:5])
    np.testing.assert_allclose(metrics["mel_distance"], distance, rtol=1e-4)
    np.testing.assert_allclose(
        metrics["wave_distance"], np.abs(made - batch.wave[:5]).mean(), rtol=1e-4
    )
    assert metrics["frames"] == 5 * small.FRAMES


def test_draws():
    objective = build(small.codec_config(), small.train_config()).objective
    batch = small.batch(rows=400)
    draw = objective.draw(jnp.asarray(3), batch)
    depth = np.asarray(draw.active).sum(1)
    assert (np.sort(draw.active, axis=1)[:, ::-1] == draw.active).all() and depth.min() == 1
    # Half are full; of the others a quarter happens to be.
    assert 0.5 < (depth == 4).mean() < 0.75
    assert 0.15 < np.asarray(draw.unquantized).mean() < 0.35
    again, other = (objective.draw(jnp.asarray(step), batch) for step in (3, 4))
    np.testing.assert_array_equal(draw.active, again.active)
    assert (np.asarray(draw.active) != other.active).any()


def test_a_trained_codec_goes_on_as_it_is(alone):
    """No scaling and no k-means over what was trained."""
    trainer, state, _, _ = alone
    model = trainer.model_of(state, {})
    other = build(small.codec_config(), small.train_config())
    began, frozen = other.from_model(model)
    before = host(began)
    for step in (0, 2):
        began = other.prepare(began, frozen, step, small.batch)
    for path, array in host(began).items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)
    assert flatten(model.codec).keys() == {p.removeprefix("codec/") for p in before}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective="speech"), "codec goes with objective 'codec', got 'speech'"),
        (dict(trains=small.train_config().trains[:1]), "is matched by no rule"),
        (dict(trains=((".*", "average"),)), "is under an average rule, which is for the Codec's codebooks"),
    ],
    ids=["another objective", "no rule", "no codebook"],
)  # fmt: skip
def test_what_does_not_fit(changes, message):
    with pytest.raises(ValueError) as error:
        build(small.codec_config(), small.train_config(**changes))
    assert message in str(error.value)


def test_crops_of_no_whole_frames():
    trainer = build(small.codec_config(), small.train_config())
    batch = small.batch()
    with pytest.raises(ValueError, match="a multiple of a frame's 12 samples"):
        trainer.put(batch._replace(wave=batch.wave[:, :-1]))
