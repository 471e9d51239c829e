"""The whole codec against transformers' MimiModel, at sizes and options of our own, and streamed against whole."""

import jax
import numpy as np
import pytest
from codec_oracle import (
    decode,
    decode_step,
    encode,
    encode_step,
    export,
    load_codec,
    mimi_oracle,
    oracle_decode,
    oracle_encode,
    random_codes,
    random_wave,
    small_config,
)
from flax import nnx

from chroma_jax.model.codec import Codec

FRAME = 12  # samples, in small_config

CONFIGS = {
    "plain": {},
    "one kv head": dict(num_heads=4, num_kv_heads=1, head_dim=4),
    "residual layers and shortcut": dict(
        num_residual_layers=2, use_conv_shortcut=True, num_filters=6
    ),
    "upsample groups": dict(upsample_groups=4),
    "one upsample group": dict(upsample_groups=1),
    "replicate padding": dict(pad_mode="replicate"),
    "four positions a frame": dict(frame_rate=1000.0),
    "no quantizer projection": dict(codebook_dim=16, quantizer_size=16),
    "three semantic codebooks": dict(num_semantic_quantizers=3, num_quantizers=12),
    "window of one": dict(sliding_window=1),
    "wide window": dict(
        sliding_window=500, compress=1, dilation_growth_rate=3, num_residual_layers=2
    ),
}


def pair(**changes):
    cfg = small_config(**changes)
    oracle, tensors = mimi_oracle(cfg)
    return cfg, oracle, load_codec(cfg, tensors), tensors


@pytest.fixture(scope="module", params=["constant", "replicate"])
def padded(request):
    """(config, PyTorch model, our codec) for each padding mode."""
    return pair(pad_mode=request.param, num_residual_layers=2)[:3]


@pytest.fixture(scope="module")
def usual():
    """(config, PyTorch model, our codec), padded with zeros as in the published Mimi."""
    return pair()[:3]


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_pytorch(changes):
    cfg, oracle, codec, tensors = pair(**changes)
    wave = random_wave(2, 40 * cfg.frame_samples + 5)
    want = oracle_encode(oracle, wave)
    assert min(len(np.unique(want[..., q])) for q in range(cfg.num_quantizers)) > 3, (
        "degenerate codes"
    )
    np.testing.assert_array_equal(encode(codec, wave), want)
    codes = random_codes(cfg, 2, 40)
    want = oracle_decode(oracle, codes)
    assert np.abs(np.asarray(decode(codec, codes)) - want).max() < 1e-5 * np.abs(want).max()
    params = {"codec": nnx.to_pure_dict(nnx.state(codec))}
    for name, tensor in export(params, tensors).items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


@pytest.mark.parametrize("samples", [1, 5, FRAME, FRAME + 1])
def test_short_waves_equal_pytorch(padded, samples):
    _, oracle, codec = padded
    wave = random_wave(2, samples)
    want = oracle_encode(oracle, wave)
    assert want.shape[1] == -(-samples // FRAME)
    np.testing.assert_array_equal(encode(codec, wave), want)


@pytest.mark.parametrize("books", [1, 3])
def test_fewer_codebooks_equal_pytorch(usual, books):
    cfg, oracle, codec = usual
    wave = random_wave(2, 100)
    want = oracle_encode(oracle, wave)[..., :books]
    np.testing.assert_array_equal(encode(codec, wave, num_codebooks=books), want)
    codes = random_codes(cfg, 2, 9, books)
    want = oracle_decode(oracle, codes)
    np.testing.assert_allclose(decode(codec, codes), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("padding", [0.0, 3.0, np.nan], ids=["zeros", "threes", "nan"])
def test_a_row_is_encoded_as_if_alone(padded, padding):
    _, oracle, codec = padded
    lengths = np.array([293, 300, 1, FRAME, 2 * FRAME - 1, 131, 7, 290])
    wave = random_wave(len(lengths), 300)
    wave[np.arange(300) >= lengths[:, None]] = padding
    got = np.asarray(encode(codec, wave, lengths))
    assert got.min() >= 0 and got.max() < 32
    for row, length in enumerate(lengths):
        want = oracle_encode(oracle, wave[row : row + 1, :length])[0]
        np.testing.assert_array_equal(
            got[row, : len(want)], want, err_msg=f"row of {length} samples"
        )


def test_rows_are_decoded_as_if_alone(usual):
    cfg, oracle, codec = usual
    codes = random_codes(cfg, 3, 30)
    got = np.asarray(decode(codec, codes))
    for row, frames in enumerate((30, 17, 1)):
        want = oracle_decode(oracle, codes[row : row + 1, :frames])[0]
        np.testing.assert_allclose(
            got[row, : frames * FRAME], want, rtol=0, atol=1e-5 * np.abs(want).max()
        )


# 30 frames are 60 transformer positions: many windows of 8. A chunk of 20 frames is far longer than one.
SPLITS = {
    "one by one": [1] * 30,
    "two by two": [2] * 15,
    "uneven": [1, 20, 2, 2, 5],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_streamed_encoding_equals_whole(padded, split):
    _, _, codec = padded
    wave = random_wave(2, 30 * FRAME)
    state, got = codec.init_encode_state(2), []
    for chunk in np.split(wave, np.cumsum(split[:-1]) * FRAME, axis=1):
        codes, state = encode_step(codec, chunk, state)
        got.append(codes)
    np.testing.assert_array_equal(np.concatenate(got, 1), encode(codec, wave))


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_streamed_decoding_equals_whole(usual, split):
    cfg, _, codec = usual
    codes = random_codes(cfg, 2, 30)
    state, got = codec.init_decode_state(2), []
    for chunk in np.split(codes, np.cumsum(split[:-1]), axis=1):
        wave, state = decode_step(codec, chunk, state)
        got.append(wave)
    want = np.asarray(decode(codec, codes))
    np.testing.assert_allclose(np.concatenate(got, 1), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("ends", [(27, 13, 60), (1, 24, 60)], ids=str)
def test_streamed_encoding_ends_inside_a_frame(padded, ends):
    """Rows of different length, streamed in chunks of one frame and of two; the last chunk of each says where it ends."""
    _, oracle, codec = padded
    wave = random_wave(3, 60)
    want = [oracle_encode(oracle, wave[row : row + 1, :end])[0] for row, end in enumerate(ends)]
    for frames in (1, 2):
        size = frames * FRAME
        state, got = codec.init_encode_state(3), []
        for start in range(0, 60, size):
            chunk = np.full((3, size), np.nan, np.float32)
            chunk[:, : min(size, 60 - start)] = wave[:, start : start + size]
            lengths = np.clip(np.array(ends) - start, 0, size)
            codes, state = encode_step(codec, chunk, state, lengths)
            got.append(codes)
        got = np.concatenate(got, 1)
        for row in range(3):
            np.testing.assert_array_equal(
                got[row, : len(want[row])], want[row], err_msg=f"{frames=}"
            )


def test_decoding_streams_inside_scan(usual):
    cfg, _, codec = usual
    codes = random_codes(cfg, 2, 24)

    @jax.jit
    def stream(codec: Codec, beats: jax.Array):
        def beat(state, frames):
            wave, state = codec.decode_step(frames, state)
            return state, wave

        return jax.lax.scan(beat, codec.init_decode_state(2), beats)[1]

    beats = codes.reshape(2, 12, 2, -1).swapaxes(0, 1)
    got = np.asarray(stream(codec, beats)).swapaxes(0, 1).reshape(2, -1)
    want = np.asarray(decode(codec, codes))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_row_of_a_stream_can_start_later(usual):
    """Streams of one batch need not be equally old: a state's rows are independent, also in the ring buffer."""
    cfg, _, codec = usual
    codes = random_codes(cfg, 2, 24)
    old = codec.init_decode_state(2)
    _, old = decode_step(codec, codes[:, :11], old)
    fresh = codec.init_decode_state(2)

    def second_row_from(fresh, old):
        axis = {4: 1}.get(old.ndim, 0)  # rings are [L, B, ...]
        index = np.arange(2).reshape([-1 if a == axis else 1 for a in range(old.ndim)])
        return np.where(index == 1, fresh, old)

    state = jax.tree.map(second_row_from, fresh, old)
    got, _ = decode_step(codec, np.stack([codes[0, 11:], codes[1, :13]]), state)
    want = np.asarray(decode(codec, codes))
    scale = np.abs(want).max()
    np.testing.assert_allclose(got[0], want[0, 11 * FRAME :], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(got[1], want[1, : 13 * FRAME], rtol=0, atol=1e-5 * scale)


def test_ids_outside_the_codebook_are_clamped(usual):
    cfg, _, codec = usual
    codes = random_codes(cfg, 1, 4)
    codes[0, 1], codes[0, 2] = 0, cfg.codebook_size - 1
    wild = codes.copy()
    wild[0, 1], wild[0, 2] = -5, 2050
    np.testing.assert_array_equal(decode(codec, wild), decode(codec, codes))


BAD = {
    "no samples": (
        lambda c: c.encode(np.zeros((1, 0))),
        r"at least one sample, got shape \(1, 0\)",
    ),
    "one axis": (lambda c: c.encode(np.zeros(50)), r"wave must be \[B, N\]"),
    "part of a frame": (
        lambda c: c.encode_step(np.zeros((1, 13)), c.init_encode_state(1)),
        r"t \* 12\] samples .* got shape \(1, 13\)",
    ),
    "too many codebooks": (
        lambda c: c.encode(np.zeros((1, 24)), num_codebooks=6),
        "between 1 and 5, got 6",
    ),
    "no codebooks": (
        lambda c: c.encode(np.zeros((1, 24)), num_codebooks=0),
        "between 1 and 5, got 0",
    ),
    "too many codes": (lambda c: c.decode(np.zeros((1, 3, 6), int)), "1 to 5 codebooks, got 6"),
    "no frames": (lambda c: c.decode(np.zeros((1, 0, 5), int)), "at least one frame"),
    "codes without codebook axis": (
        lambda c: c.decode(np.zeros((1, 5), int)),
        r"codes must be \[B, T, Q\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_shapes_are_named(usual, call, message):
    with pytest.raises(ValueError, match=message):
        call(usual[2])


BAD_CONFIGS = {
    "reflect": (dict(pad_mode="reflect"), "pad_mode.*reflect"),
    "trim": (dict(trim_right_ratio=0.5), "trim_right_ratio must be 1"),
    "codebook width": (dict(codebook_dim=4), "codebook_dim 4 must equal .* 8"),
    "no downsampling": (
        dict(frame_rate=4000.0),
        "frame_rate 4000.0 must be a fraction of .* 4000.0",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Codec(small_config(**changes), rngs=nnx.Rngs(0)))


def test_random_initialisation_gives_diverse_codes():
    """A codec without a checkpoint is random, not constant: its codes and its sound depend on the input."""
    cfg = small_config()
    codec = Codec(cfg, rngs=nnx.Rngs(0))
    codes = np.asarray(encode(codec, random_wave(2, 30 * FRAME)))
    assert all(len(np.unique(codes[..., q])) > 3 for q in range(cfg.num_quantizers))
    assert np.asarray(decode(codec, codes)).std() > 0


def test_bfloat16_stays_close():
    """Computing in bfloat16 changes no shapes and little sound; the codebooks stay in float32."""
    cfg, _, codec, tensors = pair(dtype="bfloat16", param_dtype="bfloat16")
    codes = random_codes(cfg, 2, 30)
    want = np.asarray(decode(load_codec(small_config(), tensors), codes))
    got = np.asarray(decode(codec, codes))
    assert got.dtype == np.float32 and codec.quantizer.acoustic.embed_sum.dtype == np.float32
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()
    state = codec.init_decode_state(2)
    assert jax.tree.map(lambda a: a.dtype, decode_step(codec, codes, state)[1]) == jax.tree.map(
        lambda a: a.dtype, state
    )
