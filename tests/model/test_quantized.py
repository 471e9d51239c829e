"""Eight-bit weights: what is quantised, how far it is from what it was, and that products and lookups use it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model.random_weights import randomise

from chroma_jax import schedule
from chroma_jax.checkpoint.params import flatten
from chroma_jax.config import chroma_4b, tiny
from chroma_jax.model.chroma import abstract_model, random_model
from chroma_jax.model.linear import embed, project, project_float32
from chroma_jax.model.quantized import (
    Quantized,
    dequantize,
    input_axes,
    quantize,
    quantize_array,
    quantize_param,
)

KINDS = ["int8", "fp8"]
# What stays as it is, beside norms, biases and the Codec.
WHOLE = {"conv1", "conv2", "unused_bos_eos"}
SPECS = [
    ("BTD,DNH->BTNH", (2, 3, 16), (16, 4, 8), (-3,)),
    ("BTNH,NHD->BTD", (2, 3, 4, 8), (4, 8, 16), (-3, -2)),
    ("BTD,DF->BTF", (2, 3, 16), (16, 24), (-2,)),
    ("...D,VD->...V", (2, 16), (24, 16), (-1,)),
]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return randomise(random_model(tiny()))


def test_int8_is_within_half_a_step_and_keeps_the_largest():
    w = draw(3, 32, 8) * np.exp(draw(3, 1, 8, seed=1))  # channels of unlike sizes
    w[0, :, 2] = 0
    values, scales = quantize_array(w, "int8", (-2,))
    assert (values.dtype, scales.dtype, scales.shape) == (jnp.int8, jnp.float32, (3, 1, 8))
    error = np.abs(np.asarray(dequantize(Quantized(values, scales))) - w)
    assert (error <= np.asarray(scales) / 2 * 1.0001).all()
    assert (np.abs(values).max(axis=1)[np.abs(w).max(axis=1) > 0] == 127).all()
    assert not np.asarray(values)[0, :, 2].any()


def test_fp8_is_within_a_sixteenth():
    w = draw(64, 8)
    values, scales = quantize_array(w, "fp8", (-2,))
    assert values.dtype == jnp.float8_e4m3fn
    error = np.abs(np.asarray(dequantize(Quantized(values, scales))) - w)
    # Three bits behind the point, and subnormals below 2**-6.
    assert (error <= np.maximum(np.abs(w) / 16, np.asarray(scales) * 2.0**-10) * 1.0001).all()


def test_every_kernel_and_table_is_quantised():
    for path, leaf in flatten(abstract_model(tiny())).items():
        name, rank = path.rpartition("/")[2], leaf.ndim - ("layers/" in path)
        is_kernel = rank > 1 and not name.endswith("_bias") and name not in WHOLE
        assert (input_axes(path) is not None) == (is_kernel and not path.startswith("codec/")), path


def test_the_published_model_is_half_as_large():
    size = lambda cfg: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_model(cfg)))  # noqa: E731
    cfg = chroma_4b().with_dtype("bfloat16")
    assert size(cfg.with_quantized("int8")) < 0.52 * size(cfg)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("spec", "x", "w", "axes"), SPECS, ids=[spec for spec, *_ in SPECS])
def test_products_are_those_of_the_dequantised_kernel(spec, x, w, axes, kind):
    x, kernel = draw(*x), Quantized(*quantize_array(draw(*w, seed=1), kind, axes))
    want = np.einsum(spec.replace("...", "B"), x, np.asarray(dequantize(kernel)))
    got = project(spec, jnp.asarray(x), kernel)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert project(spec, jnp.asarray(x, jnp.bfloat16), kernel).dtype == jnp.bfloat16
    assert project(spec, jnp.asarray(x, jnp.bfloat16), kernel, "float32").dtype == jnp.float32


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_rows_of_what_is_quantised(kind):
    heads = Quantized(*quantize_array(draw(3, 16, 8), kind, (-2,)))
    want = draw(2, 16, seed=1) @ np.asarray(dequantize(heads))[1]
    got = jax.jit(lambda heads, x, i: project_float32(x, heads[...][i]))(
        heads, draw(2, 16, seed=1), 1
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    table = Quantized(*quantize_array(draw(3, 8, 16), kind, (-1,)))
    books, codes = np.array([0, 2]), np.array([[7, 1], [0, 3]])
    got = embed(table, (books, codes), "float32")
    np.testing.assert_array_equal(got, np.asarray(dequantize(table))[books, codes])


def test_the_model_computes_with_its_dequantised_weights(model):
    """Every product and lookup of every stage: the same as full weights that are those eight bits."""
    ours = quantize(model, "int8")
    assert (
        ours.cfg == tiny().with_quantized("int8") and model.cfg == tiny()
    )  # and the first is as it was
    held = flatten(ours)
    full = {
        path: held[path]
        if path in held
        else dequantize(Quantized(held[f"{path}/values"], held[f"{path}/scales"]))
        for path in flatten(model)
    }
    fill = lambda path, _: full[jax.tree_util.keystr(path, simple=True, separator="/")]  # noqa: E731
    graphdef, state = nnx.split(model)
    want_of = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state)))

    @jax.jit
    def outputs(model, ids, chunks, dialogue):
        features = model.reasoner.encode_audio(chunks, jnp.array([[200, 80]]))
        logits = model.reasoner.logits(model.reasoner(ids, features))
        speech = schedule.teacher_forced(model, dialogue)
        return features[:, :70], logits, speech.code0_logits, speech.code_logits

    rng = np.random.default_rng(0)
    ints = lambda high, *shape: rng.integers(1, high, shape).astype(np.int32)  # noqa: E731
    one = lambda n: np.array([n], np.int32)  # noqa: E731
    ids = ints(499, 1, 12)
    ids[:, 2:6] = tiny().reasoner.audio_token_id
    audio = tiny().reasoner.audio
    chunks = draw(1, 2, audio.chunk_frames, audio.num_mel_bins)
    dialogue = schedule.Dialogue(
        ints(499, 1, 4), one(4), ints(66, 1, 3, 8), one(3), draw(1, 2, 64), ints(499, 1, 2), one(2),
        ints(66, 1, 6, 8), one(6),
    )  # fmt: skip
    for got, want in zip(
        outputs(ours, ids, chunks, dialogue), outputs(want_of, ids, chunks, dialogue), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_what_cannot_be_quantised(model):
    with pytest.raises(ValueError, match="quantize must be int8 or fp8, got 'int4'"):
        quantize(model, "int4")
    with pytest.raises(ValueError, match="quantised already, to int8"):
        quantize(abstract_model(tiny().with_quantized("int8")), "int8")
    for bad in (np.inf, np.nan):
        w = draw(16, 8)
        w[3, 4] = bad
        with pytest.raises(ValueError, match="backbone/head has values that are not finite"):
            quantize_param("backbone/head", w, "int8")
