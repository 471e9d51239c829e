"""Products with kernels: every way, for every kind of spec, at the sizes of real models, is the einsum of its spec."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chroma_jax.model.dispatch import Dispatch, dispatch
from chroma_jax.model.linear import embed, project, project_float32
from chroma_jax.model.quantized import Quantized, dequantize, quantize_array

# spec, x without its rows, kernel, the kernel's summed axes. Wide ones have 65536 weights and more, where one row goes in parts.
PRODUCTS = {
    "q wide": ("BTD,DNH->BTNH", (256,), (256, 8, 64), (0,)),
    "o wide": ("BTNH,NHD->BTD", (8, 64), (8, 64, 256), (0, 1)),
    "o after splash": ("BNTH,NHD->BTD", None, (8, 64, 256), (0, 1)),
    "up wide": ("BTD,DF->BTF", (256,), (256, 1024), (0,)),
    "up of odd width": ("BTD,DF->BTF", (257,), (257, 512), (0,)),
    "head wide": ("...D,DV->...V", (256,), (256, 2051), (0,)),
    "tied head wide": ("...D,VD->...V", (256,), (2048, 256), (1,)),
}
WAYS = {
    "as it is": Dispatch(),
    "parts always": Dispatch(parts_from=0),
    "as on TPUs": Dispatch(platform="tpu"),
    "as elsewhere": Dispatch(platform="default"),
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def near(got, want, name="", tolerance=1e-5):
    assert got.shape == want.shape, name
    np.testing.assert_allclose(got, want, 0, tolerance * np.abs(want).max(), err_msg=name)


@functools.cache
def drawn(rows):
    """Per product: x, kernel, the kernel in eight bits, and what comes out with each of the two."""
    table = {}
    for name, (spec, width, shape, summed) in PRODUCTS.items():
        leading = (rows,) if spec.startswith("...") else (rows, 1)
        x = draw(*((rows, shape[0], 1, shape[1]) if width is None else leading + width))
        kernel = draw(*shape, seed=1)
        scales = np.abs(kernel).max(axis=summed, keepdims=True) / 127
        values = np.round(kernel / scales).astype(np.int8)
        want = np.einsum(spec, x, kernel), np.einsum(spec, x, values * scales)
        table[name] = x, kernel, (values, scales), want
    return table


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_product(way, rows):
    """All in one program: compiling is most of it."""

    @jax.jit
    def products(table):
        def three(spec, x, kernel, eight_bits):
            low = project(spec, x.astype(jnp.bfloat16), kernel, "float32")
            return project(spec, x, kernel), project(spec, x, Quantized(*eight_bits)), low

        return {name: three(PRODUCTS[name][0], *inputs) for name, inputs in table.items()}

    table = drawn(rows)
    with dispatch(WAYS[way]):
        out = products({name: inputs for name, (*inputs, _) in table.items()})
    for name, (got, eight_bits, low) in out.items():
        want, want_eight_bits = table[name][3]
        near(got, want, name)
        near(eight_bits, want_eight_bits, name)
        assert low.dtype == jnp.float32, name
        near(low, want, name, 0.01)


@pytest.mark.parametrize("way", WAYS)
def test_heads_of_one_row_under_vmap(way):
    """As the Decoder's teacher forcing takes them."""
    y, heads = draw(1, 7, 256), draw(7, 256, 300, seed=1)
    with dispatch(WAYS[way]):
        got = jax.vmap(project_float32, in_axes=(1, 0), out_axes=1)(y, heads)
    near(got, np.einsum("BQD,QDV->BQV", y, heads))


def test_one_row_is_as_among_others():
    """The Reasoner's tied head: what a row says does not depend on its company."""
    hidden, table = draw(4, 256), draw(4096, 256, seed=1)
    together = project("...D,VD->...V", hidden, table, "float32")
    for row in range(4):
        near(project("...D,VD->...V", hidden[row : row + 1], table, "float32")[0], together[row])


def test_a_forced_way_is_taken():
    """What the tests above rest on: the program differs, and is compiled anew under another choice."""
    x, kernel = draw(1, 256), draw(256, 512, seed=1)
    product = jax.jit(lambda x, w: project_float32(x, w))
    programs = set()
    for way in WAYS.values():
        with dispatch(way):
            programs.add(product.lower(x, kernel).as_text())
    with dispatch(dataclasses.replace(WAYS["as it is"], parts_from=1 << 20)):
        programs.add(product.lower(x, kernel).as_text())
    assert len(programs) == 4  # parts are large enough as it is


def test_rows_of_a_table():
    table, index = draw(2, 9, 8), (jnp.asarray([0, 1]), jnp.asarray([[3, 4], [5, 6]]))
    near(embed(jnp.asarray(table), index, "float32"), table[index])
    held = Quantized(*quantize_array(jnp.asarray(table), "int8", (-1,)))
    near(embed(held, index, "float32"), np.asarray(dequantize(held))[index])
