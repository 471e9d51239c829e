"""The step: what trains and what does not, accumulation, drawing, meshes, LoRA, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_training as small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax import schedule, sharding
from chroma_jax.checkpoint.params import flatten
from chroma_jax.checkpoint.store import unnest
from chroma_jax.training import losses, selection
from chroma_jax.training.objectives.dialogue import reasoner_states
from chroma_jax.training.step import build

MESHES = {
    "data only": {"data": 8},
    "fsdp": {"fsdp": 8},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "all three axes": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor beyond the kv heads": {"data": 2, "tensor": 4},
}


def run(trainer, steps, batches=None):
    """(state, frozen, metrics of each step) from the far-from-uniform model."""
    state, frozen = trainer.from_model(small.model())
    history = []
    for step in range(steps):
        batch = small.with_hidden() if batches is None else batches[step]
        state, metrics = trainer.train_step(state, frozen, batch)
        history.append({k: float(v) for k, v in metrics.items()})
    return state, frozen, history


@pytest.fixture(scope="module")
def plain():
    """Two steps of stage 1 on one device: the trainer, its state, frozen parameters and metrics."""
    trainer = build(small.CONFIG, small.train_config())
    return trainer, *run(trainer, 2)


def gradients(trainer, draw=None, batch=None):
    """Of the loss, straight from the model."""
    state, frozen = trainer.from_model(small.model())
    batch = trainer.put(small.with_hidden() if batch is None else batch)

    def loss(params):
        sums = trainer._sums(params, {}, frozen, batch, draw)
        return losses.weighted(sums, sums.count, trainer.train_cfg.decoder_weight)

    return jax.jit(jax.grad(loss))(state.params)


def test_metrics_are_those_of_the_losses(plain):
    trainer, _, _, history = plain
    batch = small.with_hidden()
    dialogue = jax.tree.map(jnp.asarray, batch.dialogue(batch.hidden))
    out = jax.jit(schedule.teacher_forced)(small.model(), dialogue)
    want = losses.metrics(losses.teacher_forced_sums(out, dialogue), 0.5)
    for name, value in want.items():
        np.testing.assert_allclose(history[0][name], value, rtol=1e-5, err_msg=name)
    assert history[0]["finite"] == 1
    np.testing.assert_allclose(history[0]["learning_rate"], 1e-3)
    assert history[0]["frames"] == batch.frame_lengths.sum()
    state, frozen = trainer.from_model(small.model())
    evaluated = trainer.eval_step(state, frozen, batch)
    for name, value in want.items():
        np.testing.assert_allclose(evaluated[name], value, rtol=1e-5, err_msg=name)


def test_grad_norm_is_that_of_the_loss(plain):
    squares = sum(float((g**2).sum()) for g in jax.tree.leaves(gradients(plain[0])))
    np.testing.assert_allclose(plain[3][0]["grad_norm"], squares**0.5, rtol=1e-4)


def test_the_step_counts_and_compiles_once(plain):
    trainer, state, _, _ = plain
    assert int(state.step) == 2
    assert trainer.compilations == 1


def test_reasoner_and_codec_do_not_change_and_have_no_moments():
    trainer = build(small.CONFIG, small.train_config())
    before = {path: np.array(leaf) for path, leaf in flatten(small.model()).items()}
    state, frozen, _ = run(trainer, 10)
    after = {path: np.array(leaf) for path, leaf in unnest(frozen).items()}
    assert {path.split("/")[0] for path in after} == {"reasoner", "codec"}
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    for path, leaf in small.host(state).items():
        assert "reasoner" not in path and "codec" not in path
        assert leaf.ndim == 0 or leaf.dtype == np.float32
    trained = unnest(state.params)
    assert set(trained) | set(after) == set(before) and not set(trained) & set(after)
    for path, leaf in trained.items():
        assert np.abs(np.array(leaf) - before[path]).max() > 0, path
    # The model that it began from was copied, not consumed.
    np.testing.assert_array_equal(small.model().backbone.head[...], before["backbone/head"])


def test_stage_2_leaves_the_backbone_bit_identical():
    config = small.train_config(trains=selection.STAGE_2, decoder_weight=1.0)
    trainer = build(small.CONFIG, config)
    before = {path: np.array(leaf) for path, leaf in flatten(small.model()).items()}
    state, frozen, history = run(trainer, 3)
    for path, leaf in unnest(frozen).items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert any(path.startswith("backbone/audio_embedding") for path in unnest(frozen))
    assert all(path.startswith("decoder/") for path in unnest(state.params))
    assert not any("backbone" in path for path in small.host(state.opt_state))
    assert history[-1]["decoder_loss"] < history[0]["decoder_loss"]
    assert history[-1]["backbone_loss"] == history[0]["backbone_loss"]
    assert history[0]["loss"] == pytest.approx(history[0]["decoder_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "fraction",
    [pytest.param(1.0, marks=pytest.mark.slow), 0.5],
    ids=["all frames", "half of the frames"],
)
def test_accumulation_equals_the_big_batch(fraction):
    one = build(small.CONFIG, small.train_config(decoder_fraction=fraction))
    four = build(small.CONFIG, small.train_config(decoder_fraction=fraction, accumulation=4))
    (state, _, want), (state4, _, got) = run(one, 2), run(four, 2)
    for a, b in zip(got, want, strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)
    small.assert_near(state4.opt_state, state.opt_state, 1e-4)
    assert_updates_near(state4, state)


def assert_updates_near(got, want):
    """Parameters after few steps, in units of the learning rate: where a gradient is near zero, Adam only keeps its sign."""
    got, want = small.host(got.params), small.host(want.params)
    for path in want:
        error = np.abs(got[path] - want[path])
        assert error.max() < 2e-4, path
        assert (error > 2e-6).mean() < 1e-3, path


def test_drawing_is_by_step_and_saves_the_decoder_compute():
    half = build(small.CONFIG, small.train_config(decoder_fraction=0.5))
    _, _, history = run(half, 2)
    lengths = small.with_hidden().frame_lengths
    assert history[0]["decoder_frames"] == np.ceil(0.5 * lengths).sum() < lengths.sum()
    assert history[0]["frames"] == lengths.sum()
    state, _ = half.from_model(small.model())
    batch = half.put(small.with_hidden())
    first, second = (half.objective.draw(jnp.asarray(step), batch).index for step in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(first, half.objective.draw(state.step, batch).index)
    flops = []
    for fraction in (1.0, 0.5):
        trainer = build(small.CONFIG, small.train_config(decoder_fraction=fraction))
        compiled = (
            jax.jit(trainer._sums)
            .lower(
                trainer.abstract()[0].params,
                {},
                trainer.abstract()[1],
                batch,
                trainer.objective.draw(jnp.asarray(0), batch),
            )
            .compile()
        )
        flops.append(compiled.cost_analysis()["flops"])
    assert flops[1] < 0.9 * flops[0]


@pytest.mark.parametrize("policy", ["full", "dots", "all_dots"])
def test_remat_changes_no_gradient(plain, policy):
    want = gradients(plain[0])
    small.assert_near(gradients(build(small.CONFIG, small.train_config(remat=policy))), want, 1e-5)


def test_precomputed_states_equal_the_reasoner_inside_the_step(plain):
    trainer = plain[0]
    batch = small.batch()
    states = jax.jit(reasoner_states)(small.model(), jax.tree.map(jnp.asarray, batch.needed()))
    state, frozen = trainer.from_model(small.model())
    inside = trainer.eval_step(state, frozen, batch)
    outside = trainer.eval_step(state, frozen, batch._replace(hidden=np.asarray(states)))
    for name in inside:
        np.testing.assert_allclose(outside[name], inside[name], rtol=1e-5, err_msg=name)
    # They are what generation feeds: the state at the last prompt position, then at each answer token, row by row.
    for row in (0, 5):
        length, text = batch.prompt_lengths[row], batch.text_lengths[row]
        ids = jnp.asarray(batch.prompt_ids[row : row + 1, : length + text])
        features = small.model().reasoner.encode_audio(
            jnp.asarray(batch.chunks[row : row + 1]),
            jnp.asarray(batch.chunk_lengths[row : row + 1]),
        )
        alone = small.model().reasoner(ids, features)[0]
        np.testing.assert_allclose(states[row, :text], alone[length - 1 : -1], atol=1e-4)
    deaf = trainer.eval_step(state, frozen, batch._replace(chunks=0 * batch.chunks))
    assert abs(float(deaf["backbone_loss"]) - float(inside["backbone_loss"])) > 1e-3


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_sharded_equals_unsharded(plain, shape):
    _, state, _, want = plain
    trainer = build(small.CONFIG, small.train_config(mesh=shape))
    sharded, frozen, got = run(trainer, 2)
    for a, b in zip(got, want, strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, atol=1e-6, err_msg=name)
    small.assert_near(sharded.opt_state, state.opt_state, 1e-4)
    assert_updates_near(sharded, state)
    assert trainer.compilations == 1
    assert_placed(trainer, sharded, frozen)


def assert_placed(trainer, state, frozen):
    """Every leaf lies where the table says, and parameters beside their moments."""
    want = jax.tree.leaves((trainer.shardings.state, trainer.shardings.frozen))
    for leaf, expected in zip(jax.tree.leaves((state, frozen)), want, strict=True):
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
    for tree in (trainer.shardings.state.params, trainer.shardings.state.opt_state[1].mu):
        specs = {path: s.spec for path, s in unnest(tree).items()}
        assert specs["backbone/llama/layers/gate"] == P(None, "fsdp", "tensor")
        assert specs["backbone/llama/layers/attention/o"] == P(None, "tensor", None, "fsdp")
        assert specs["decoder/projection"] == P("fsdp", None)
    assert trainer.shardings.batch == NamedSharding(trainer.mesh, P(("data", "fsdp")))


@pytest.mark.slow
def test_sharded_with_everything_on():
    """The Reasoner inside, accumulation, drawn frames, remat."""
    changes = dict(decoder_fraction=0.5, accumulation=2, remat="full")
    _, _, want = run(
        build(small.CONFIG, small.train_config(decoder_fraction=0.5)), 1, [small.batch()]
    )
    config = small.train_config(mesh={"data": 2, "fsdp": 2, "tensor": 2}, **changes)
    _, _, got = run(build(small.CONFIG, config), 1, [small.batch()])
    for name, value in want[0].items():
        np.testing.assert_allclose(got[0][name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow  # sharded random numbers take long to compile
def test_init_is_the_same_on_every_mesh():
    state, frozen = build(small.CONFIG, small.train_config(mesh={"fsdp": 4, "tensor": 2})).init()
    alone, alone_frozen = build(small.CONFIG, small.train_config()).init()
    small.assert_same(state, alone)
    small.assert_same(frozen, alone_frozen)


# --- LoRA ---


def test_lora_begins_at_the_base_and_trains_its_factors_only(plain):
    trainer = build(small.CONFIG, small.lora_config())
    state, frozen = trainer.from_model(small.model())
    batch = small.with_hidden()
    base = plain[0].eval_step(*plain[0].from_model(small.model()), batch)
    begin = trainer.eval_step(state, frozen, batch)
    for name in base:
        np.testing.assert_allclose(begin[name], base[name], rtol=1e-6, err_msg=name)
    small.assert_same(flatten(trainer.model_of(state, frozen)), flatten(small.model()))
    assert {path.rpartition("/")[2] for path in unnest(state.params)} == {"lora_a", "lora_b"}
    assert len(unnest(state.params)) == 2 * 7 * 2  # stacks, kernels of a block, factors
    factors = small.host(state.params)
    before = small.host(frozen)
    for _ in range(3):
        state, metrics = trainer.train_step(state, frozen, batch)
    assert float(metrics["loss"]) < float(begin["loss"])
    small.assert_same(frozen, before)
    for path, leaf in small.host(state.params).items():
        assert np.abs(leaf - factors[path]).max() > 0, path

    merged = trainer.model_of(state, frozen)
    inside = trainer.eval_step(state, frozen, batch)
    outside = plain[0].eval_step(*plain[0].from_model(merged), batch)
    for name in inside:
        np.testing.assert_allclose(outside[name], inside[name], rtol=1e-5, err_msg=name)
    # By hand, for a kernel with two input axes.
    path = "backbone/llama/layers/attention/o"
    a, b = (np.array(unnest(state.params)[f"{path}/{name}"]) for name in ("lora_a", "lora_b"))
    update = 8.0 / 4 * np.einsum("LNHR,LRD->LNHD", a, b)
    np.testing.assert_allclose(flatten(merged)[path], before[path] + update, atol=1e-6)


def test_lora_sharded_equals_unsharded():
    one, two = (
        run(build(small.CONFIG, small.lora_config(mesh=mesh)), 2)
        for mesh in (None, {"data": 2, "fsdp": 2, "tensor": 2})
    )
    for name, value in one[2][1].items():
        np.testing.assert_allclose(two[2][1][name], value, rtol=2e-5, atol=1e-6, err_msg=name)


# --- dtypes, learning, trouble ---


def test_bfloat16_compute_keeps_float32_masters(plain):
    config = small.train_config(compute_dtype="bfloat16", reasoner_dtype="bfloat16")
    trainer = build(small.CONFIG, config)
    state, frozen, history = run(trainer, 2)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    kinds = {path.split("/")[0]: leaf.dtype.name for path, leaf in unnest(frozen).items()}
    assert kinds == {"reasoner": "bfloat16", "codec": "float32"}
    for got, want in zip(history, plain[3], strict=True):
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=0.02)
        assert got["loss"] != want["loss"]
    model = trainer.model_of(state, frozen)
    assert model.backbone.cfg.llama.dtype == "bfloat16"
    assert model.backbone.head[...].dtype == "float32"


def test_it_learns_two_dialogues():
    """The Reasoner inside, clipping and warm-up on."""
    optimizer = small.optimizer(learning_rate=1e-2, warmup_steps=3, weight_decay=0.0)
    trainer = build(small.CONFIG, small.train_config(optimizer=optimizer))
    state, frozen = trainer.from_model(small.mild_model())
    batch = trainer.put(small.batch(rows=2))
    first = trainer.eval_step(state, frozen, batch)
    np.testing.assert_allclose(first["backbone_loss"], np.log(67), atol=0.3)
    for _ in range(40):
        state, _ = trainer.train_step(state, frozen, batch)
    last = trainer.eval_step(state, frozen, batch)
    print({name: float(value) for name, value in last.items()})
    assert last["backbone_loss"] < 0.1 and last["decoder_loss"] < 1.0
    assert last["backbone_accuracy"] == 1 and last["decoder_accuracy"] > 0.75


def test_a_step_that_is_not_finite_changes_nothing_and_says_so(plain):
    trainer = plain[0]
    state, frozen = trainer.from_model(small.model())
    before = small.host(state)
    batch = small.with_hidden()
    batch.hidden[0, 0] = np.nan
    state, metrics = trainer.train_step(state, frozen, batch)
    assert not metrics["finite"] and not np.isfinite(metrics["loss"])
    small.assert_same(state, before)
    assert trainer.compilations == 1


def test_a_row_does_not_depend_on_its_neighbours(plain):
    """The loss of eight rows is the mean, weighted by frames, of the losses of halves."""
    trainer = plain[0]
    state, frozen = trainer.from_model(small.model())
    batch = small.with_hidden()
    whole = trainer.eval_step(state, frozen, batch)
    halves = [
        trainer.eval_step(state, frozen, jax.tree.map(lambda x, i=i: x[i : i + 4], batch))
        for i in (0, 4)
    ]
    frames = [float(h["frames"]) for h in halves]
    for name in ("loss", "backbone_loss", "decoder_loss", "loss/code_3", "accuracy/code_0"):
        mean = np.average([float(h[name]) for h in halves], weights=frames)
        np.testing.assert_allclose(whole[name], mean, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        (
            dict(mesh={"data": 4, "fsdp": 2}),
            12,
            "12 rows must be a multiple of 8: 8 shards of rows",
        ),
        (dict(accumulation=3), 8, "8 rows must be a multiple of 3"),
        (dict(mesh={"data": 4, "tensor": 2}, accumulation=4), 8, "must be a multiple of 16"),
    ],
    ids=["mesh", "accumulation", "both"],
)
def test_rows_that_do_not_divide(config, rows, message):
    trainer = build(small.CONFIG, small.train_config(**config))
    with pytest.raises(ValueError, match=message):
        trainer.put(small.with_hidden(rows))


def test_other_trouble():
    trainer = build(small.CONFIG, small.train_config())
    batch = small.with_hidden()
    with pytest.raises(
        ValueError, match=r"field text has shape \(7, 3\); it must have 2 axes and 8 rows"
    ):
        trainer.put(batch._replace(text=batch.text[:7]))
    with pytest.raises(ValueError, match="a batch needs hidden"):
        trainer.put(batch.needed()._replace(hidden=None))
    with pytest.raises(ValueError, match="fsdp 3 x tensor 1 has 3 places for 8 devices"):
        build(small.CONFIG, small.train_config(mesh={"fsdp": 3}))
    with pytest.raises(ValueError, match="under a lora rule, but lora is not configured"):
        build(small.CONFIG, small.train_config(trains=selection.LORA_FINE_TUNING))
    with pytest.raises(ValueError, match="lora is configured, but no rule says lora"):
        config = small.change(small.lora_config(), trains=selection.STAGE_1)
        build(small.CONFIG, config)
    other = small.change(small.CONFIG, decoder=small.change(small.CONFIG.decoder, vocab_size=68),
                         backbone=small.change(small.CONFIG.backbone, vocab_size=68))  # fmt: skip
    with pytest.raises(
        ValueError, match=r"backbone/audio_embedding should have shape \(8, 68, 64\)"
    ):
        build(other, small.train_config()).from_model(small.model())


def test_summary_and_abstract():
    trainer = build(small.CONFIG, small.lora_config(mesh={"fsdp": 8}))
    table = trainer.summary().splitlines()
    assert table[0].split() == ["rule", "what", "tensors", "parameters", "bytes"]
    state, frozen = trainer.abstract()
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    row = next(line.split() for line in table if line.startswith("total trained"))
    assert row[-3:] == ["28", f"{trained:,}", f"{12 * trained:,}"]
    assert all(leaf.sharding.mesh == trainer.mesh for leaf in jax.tree.leaves((state, frozen)))
    real = trainer.from_model(small.model())
    assert jax.tree.structure(real) == jax.tree.structure((state, frozen))
    for leaf, shape in zip(jax.tree.leaves(real), jax.tree.leaves((state, frozen)), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    assert sharding.row_shards(trainer.mesh) == 8
