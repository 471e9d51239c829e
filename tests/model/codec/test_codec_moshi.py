"""The streamed codec against the original streaming Mimi, Kyutai's `moshi` package, with equal weights.

Needs: pip install --no-deps moshi; pip install einops sentencepiece sphn
"""

import contextlib
import os
import re

import numpy as np
import pytest
from codec_oracle import (
    decode,
    decode_step,
    encode,
    encode_step,
    load_codec,
    mimi_oracle,
    random_codes,
    random_wave,
    small_config,
)

os.environ["NO_TORCH_COMPILE"] = "1"
torch = pytest.importorskip("torch")
loaders = pytest.importorskip(
    "moshi.models.loaders", reason="moshi is not installed (see the top of this file)"
)
transformer = pytest.importorskip("moshi.modules.transformer")

pytestmark = pytest.mark.slow

RENAMED = (
    (r"^(encoder|decoder)\.layers\.", r"\1.model."),
    (r"_transformer\.layers\.", "_transformer.transformer.layers."),
    (r"self_attn\.o_proj", "self_attn.out_projs.0"),
    (r"self_attn_layer_scale", "layer_scale_1"),
    (r"mlp_layer_scale", "layer_scale_2"),
    (r"input_layernorm", "norm1"),
    (r"post_attention_layernorm", "norm2"),
    (r"mlp\.fc([12])", r"linear\1"),
    (r"semantic_residual_vector_quantizer", "rvq_first"),
    (r"acoustic_residual_vector_quantizer", "rvq_rest"),
    (r"(rvq_\w+)\.layers\.(\d+)\.codebook\.", r"\1.vq.layers.\2._codebook."),
    (r"embed_sum", "embedding_sum"),
    (r"_codebook\.initialized", "_codebook._initialized"),
)


def moshi_config(cfg) -> dict:
    width = cfg.hidden_size
    return {
        "sample_rate": cfg.sampling_rate,
        "channels": 1,
        "frame_rate": cfg.frame_rate,
        "seanet": dict(
            loaders._seanet_kwargs,
            dimension=width,
            n_filters=cfg.num_filters,
            n_residual_layers=cfg.num_residual_layers,
            kernel_size=cfg.kernel_size,
            ratios=list(cfg.upsampling_ratios),
            true_skip=not cfg.use_conv_shortcut,
        ),
        "quantizer": dict(
            dimension=cfg.quantizer_size,
            n_q=cfg.num_quantizers,
            bins=cfg.codebook_size,
            input_dimension=width,
            output_dimension=width,
        ),
        "transformer": dict(
            loaders._transformer_kwargs,
            d_model=width,
            num_heads=cfg.num_heads,
            num_layers=cfg.num_layers,
            context=cfg.sliding_window,
            dim_feedforward=cfg.intermediate_size,
            input_dimension=width,
            output_dimensions=[width],
        ),
    }


def moshi_tensors(cfg, tensors, wanted) -> dict:
    """Checkpoint tensors under moshi's names: q, k, v in one matrix, rotary pairs next to each other."""

    def interleave(w):
        return w.reshape(cfg.num_heads, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)

    out = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("codec_model.")
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        if name.endswith("q_proj.weight"):
            k, v = (
                tensors["codec_model." + name.replace("q_proj", p)] for p in ("k_proj", "v_proj")
            )
            tensor = np.concatenate([interleave(tensor), interleave(k), v])
            name = name.replace("q_proj", "in_projs.0")
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        # moshi wraps each convolution twice, the resampling ones three times, as conv.conv or convtr.convtr.
        match = re.match(r"(.*)\.conv\.(weight|bias)$", name)
        if match:
            stems = (
                f"{match[1]}.{k}.{k}.{match[2]}"
                for k in ("conv", "convtr", "conv.conv", "convtr.convtr")
            )
            triple = (f"{match[1]}.{k}.{k}.{k}.{match[2]}" for k in ("conv", "convtr"))
            [name] = {s for s in (*stems, *triple) if s in wanted}
        out[name] = torch.tensor(tensor)
    return out


@pytest.fixture(
    scope="module",
    params=[dict(sliding_window=80), dict(use_conv_shortcut=True, num_residual_layers=2)],
    ids=["window not exceeded", "window exceeded"],
)
def setup(request):
    cfg = small_config(**request.param)
    _, tensors = mimi_oracle(cfg)
    moshi = loaders.get_mimi(None, moshi_config(cfg), num_codebooks=cfg.num_quantizers)
    moshi.load_state_dict(moshi_tensors(cfg, tensors, moshi.state_dict()), strict=True)
    return cfg, moshi, load_codec(cfg, tensors)


@contextlib.contextmanager
def streaming(cfg, moshi, batch):
    """moshi in streaming mode, with one slot more in its ring buffers.

    It writes the two positions of a frame before the first of them looks back, over the oldest key that this one should
    see: past the window its stream differs from its own offline result. With one more slot nothing is lost.
    """
    transformer.set_attention_context(moshi, cfg.sliding_window + 1)
    with torch.no_grad(), moshi.streaming(batch):
        transformer.set_attention_context(moshi, cfg.sliding_window)
        yield


def test_codes_equal_the_original(setup):
    cfg, moshi, codec = setup
    wave = random_wave(2, 40 * cfg.frame_samples)
    chunks = torch.tensor(wave)[:, None].split(cfg.frame_samples, dim=-1)
    with streaming(cfg, moshi, 2):
        want = torch.cat([moshi.encode(c) for c in chunks], dim=-1).numpy().transpose(0, 2, 1)
    with torch.no_grad():
        whole = moshi.encode(torch.tensor(wave)[:, None]).numpy().transpose(0, 2, 1)
    state, got = codec.init_encode_state(2), []
    for chunk in np.split(wave, 40, axis=1):
        codes, state = encode_step(codec, chunk, state)
        got.append(codes)
    np.testing.assert_array_equal(np.concatenate(got, 1), want)
    np.testing.assert_array_equal(encode(codec, wave), whole)


def test_samples_equal_the_original(setup):
    cfg, moshi, codec = setup
    codes = random_codes(cfg, 2, 40)
    torch_codes = torch.tensor(codes.transpose(0, 2, 1)).long()
    with streaming(cfg, moshi, 2):
        want = torch.cat([moshi.decode(c) for c in torch_codes.split(1, dim=-1)], dim=-1).numpy()[
            :, 0
        ]
    with torch.no_grad():
        whole = moshi.decode(torch_codes).numpy()[:, 0]
    state, got = codec.init_decode_state(2), []
    for chunk in np.split(codes, 20, axis=1):
        wave, state = decode_step(codec, chunk, state)
        got.append(wave)
    tolerance = dict(rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(np.concatenate(got, 1), want, **tolerance)
    np.testing.assert_allclose(decode(codec, codes), whole, **tolerance)
