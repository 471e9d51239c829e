"""The codec's parts by themselves: convolutions, transformer, quantizer, each against a plain computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_oracle import small_config
from flax import nnx

from chroma_jax.model.codec.convolution import StreamingConv1d, StreamingConvTranspose1d
from chroma_jax.model.codec.quantizer import ResidualQuantizer, SplitQuantizer
from chroma_jax.model.codec.transformer import SlidingTransformer


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run_in_chunks(module, x, split):
    """Feeds x [B, T, C] chunk by chunk through a jitted step."""
    step = jax.jit(type(module).step)
    state, out = module.init_state(x.shape[0]), []
    structure = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    for chunk in np.split(x, np.cumsum(split)[:-1], axis=1):
        y, state = step(module, chunk, state)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == structure, (
            "a state must not change shape"
        )
        out.append(y)
    return np.concatenate(out, axis=1)


def conv_by_hand(x, kernel, bias, stride, dilation, mode):
    """One row [T, C], output by output."""
    span = (len(kernel) - 1) * dilation + 1
    count = -(-len(x) // stride)
    left, right = span - stride, count * stride - len(x)
    x = np.pad(x, ((left, right), (0, 0)), mode="edge" if mode == "replicate" else "constant")
    taps = [x[t * stride : t * stride + span : dilation] for t in range(count)]
    return np.stack([np.einsum("KI,KIO->O", tap, kernel) for tap in taps]) + bias


@pytest.mark.parametrize("mode", ["constant", "replicate"])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(1, 1, 1), (3, 1, 1), (3, 1, 4), (4, 2, 1), (7, 3, 2)],
    ids=str,
)
def test_convolution(kernel, stride, dilation, mode):
    conv = StreamingConv1d(
        small_config(),
        3,
        5,
        kernel,
        stride=stride,
        dilation=dilation,
        pad_mode=mode,
        rngs=nnx.Rngs(0),
    )
    conv.bias[...] = noise(5)
    x, lengths = noise(4, 18, 3), np.array([18, 7, 1, 11])
    whole = np.asarray(jax.jit(StreamingConv1d.__call__)(conv, x, lengths))
    for row, length in enumerate(lengths):
        want = conv_by_hand(
            x[row, :length], np.asarray(conv.kernel[...]), conv.bias[...], stride, dilation, mode
        )
        np.testing.assert_allclose(whole[row, : len(want)], want, atol=1e-5)
    ragged = np.asarray(conv(x[:, :17]))
    want = conv_by_hand(
        x[0, :17], np.asarray(conv.kernel[...]), conv.bias[...], stride, dilation, mode
    )
    np.testing.assert_allclose(ragged[0], want, atol=1e-5)
    streamed = run_in_chunks(conv, x, [6, 6, 3, 3] if stride == 3 else [2, 8, 6, 2])
    np.testing.assert_allclose(streamed, conv(x), atol=1e-6)


def test_a_chunk_must_fit_the_stride():
    conv = StreamingConv1d(small_config(), 2, 2, 4, stride=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"5 positions is no multiple of .* stride 2"):
        conv.step(noise(1, 5, 2), conv.init_state(1))


def test_a_kernel_must_cover_its_stride():
    with pytest.raises(ValueError, match="kernel 2 skips input at stride 3"):
        StreamingConv1d(small_config(), 2, 2, 2, stride=3, rngs=nnx.Rngs(0))


def test_groups_must_divide_the_channels():
    with pytest.raises(
        ValueError, match=r"groups 3 must divide the channels 4 \(in\) and 6 \(out\)"
    ):
        StreamingConvTranspose1d(small_config(), 4, 6, stride=2, groups=3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolution(groups):
    stride = 3
    conv = StreamingConvTranspose1d(
        small_config(), 4, 8, stride=stride, groups=groups, rngs=nnx.Rngs(0)
    )
    conv.bias[...] = noise(8)
    x = noise(2, 10, 4)
    kernel = np.asarray(conv.kernel[...]).reshape(4, 2 * stride, 8 // groups)
    want = np.zeros((2, 11 * stride, 8), np.float32)
    for t in range(10):
        for i in range(4):
            g = i // (4 // groups)
            out = slice(g * 8 // groups, (g + 1) * 8 // groups)
            want[:, t * stride : (t + 2) * stride, out] += x[:, t, i, None, None] * kernel[i]
    want = want[:, : 10 * stride] + np.asarray(conv.bias[...])
    np.testing.assert_allclose(jax.jit(StreamingConvTranspose1d.__call__)(conv, x), want, atol=1e-5)
    np.testing.assert_allclose(run_in_chunks(conv, x, [1, 4, 1, 1, 3]), want, atol=1e-5)


@pytest.fixture(scope="module")
def transformer():
    cfg = small_config(
        num_heads=4, num_kv_heads=2, head_dim=6, layer_scale_initial=0.7, sliding_window=5
    )
    module = SlidingTransformer(cfg, rngs=nnx.Rngs(3))
    for name in ("q", "k", "v", "o", "up", "down"):  # large enough to matter
        param = getattr(module.layers, name)
        param[...] = 15 * param[...]
    return module


@pytest.mark.parametrize("split", [[1] * 23, [4, 4, 4, 4, 4, 3], [2, 13, 8], [23]], ids=str)
def test_transformer_step_equals_whole(transformer, split):
    x = noise(2, 23, 16)
    want = jax.jit(SlidingTransformer.__call__)(transformer, x)
    np.testing.assert_allclose(run_in_chunks(transformer, x, split), want, atol=2e-5)


def test_transformer_sees_exactly_its_window(transformer):
    """Two layers of window 5 reach 2 * (5 - 1) positions back: no further, and not less."""
    whole = jax.jit(SlidingTransformer.__call__)
    x = noise(1, 23, 16)
    changed = x.copy()
    changed[0, 4] = noise(16, seed=9)
    moved = np.abs(np.asarray(whole(transformer, changed) - whole(transformer, x))).max(axis=(0, 2))
    assert (moved[:4] == 0).all() and (moved[4:13] > 1e-4).all()
    assert (moved[13:] < 1e-6).all()


def test_transformer_stream_outlives_its_window(transformer):
    """After 40 windows a stream computes what the last window alone would: memory is bounded and nothing leaks."""
    x = noise(1, 200, 16)
    streamed = run_in_chunks(transformer, x, [8] * 25)
    tail = np.asarray(transformer(x[:, 150:]))  # rotary attention depends on distances only
    np.testing.assert_allclose(streamed[:, 158:], tail[:, 8:], atol=1e-4)


@pytest.fixture(scope="module")
def quantizer():
    cfg = small_config(codebook_dim=16, quantizer_size=16)
    module = ResidualQuantizer(cfg, 3, rngs=nnx.Rngs(1))
    module.cluster_usage[...] = np.abs(noise(3, 32)) + 0.5
    return module


def codebooks(module):
    usage = np.maximum(np.asarray(module.cluster_usage[...]), 1e-5)
    return np.asarray(module.embed_sum[...]) / usage[..., None]


def test_quantizer_takes_the_nearest_codeword_of_what_is_left(quantizer):
    x, books = noise(2, 9, 16, seed=5), codebooks(quantizer)
    got = np.asarray(jax.jit(ResidualQuantizer.encode, static_argnums=2)(quantizer, x, 3))
    rest, decoded = x.copy(), np.zeros_like(x)
    for q in range(3):
        distance = ((rest[:, :, None] - books[q]) ** 2).sum(-1)
        np.testing.assert_array_equal(got[..., q], distance.argmin(-1))
        rest, decoded = rest - books[q][got[..., q]], decoded + books[q][got[..., q]]
    np.testing.assert_allclose(
        jax.jit(ResidualQuantizer.decode)(quantizer, got), decoded, atol=1e-5
    )


def test_equal_codewords_give_the_lowest_id():
    module = ResidualQuantizer(
        small_config(codebook_dim=16, quantizer_size=16), 1, rngs=nnx.Rngs(1)
    )
    row = np.asarray(module.embed_sum[...])[0, 11]
    module.embed_sum[...] = module.embed_sum[...].at[0, jnp.array([29, 20])].set(row)
    assert np.asarray(module.encode(row[None, None], 1)).item() == 11


def test_an_unused_codeword_is_floored_and_not_divided_by_zero():
    cfg = small_config(codebook_dim=16, quantizer_size=16)
    module = SplitQuantizer(cfg, rngs=nnx.Rngs(1))
    module.semantic.cluster_usage[...] = np.zeros((1, 32), np.float32)
    module.semantic.embed_sum[...] = 1e-5 * module.semantic.embed_sum[...]
    codes = np.arange(32)[None, :, None]
    want = np.asarray(module.semantic.embed_sum[...])[0] / np.float32(1e-5)
    np.testing.assert_allclose(module.decode(codes)[0], want, rtol=1e-6)
    np.testing.assert_array_equal(module.semantic.encode(want[None], 1), codes)
