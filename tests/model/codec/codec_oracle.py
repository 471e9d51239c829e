"""Codecs for the tests, built from a checkpoint's tensors, and random weights for them in transformers' MimiModel."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax.checkpoint.codec_rows import CODEC_ROWS
from chroma_jax.checkpoint.transforms import TRANSFORMS
from chroma_jax.config import CodecConfig, tiny
from chroma_jax.model.codec import Codec


def small_config(**changes) -> CodecConfig:
    """12 samples a frame: short waves pass many frames, and a window of 8 positions is soon exceeded."""
    base = dict(
        sampling_rate=24000,
        frame_rate=2000.0,
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=(3, 2),
        kernel_size=5,
        upsample_groups=16,
        codebook_size=32,
        codebook_dim=8,
        quantizer_size=8,
        num_quantizers=5,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=24,
        sliding_window=8,
    )
    return dataclasses.replace(tiny().codec, **(base | changes))


def place(tensors: Mapping[str, np.ndarray], params: dict) -> tuple[dict, set[str]]:
    """Fills a parameter dict from torch tensors: (filled parameters by path, paths that got nothing)."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}
    filled = {path: np.full(v.shape, np.nan, v.dtype) for path, v in shapes.items()}
    for name, tensor in tensors.items():
        matches = [(row, m) for row in CODEC_ROWS if (m := re.fullmatch(row.torch, name))]
        assert len(matches) == 1, f"{name} matches {len(matches)} rows"
        row, match = matches[0]
        path = match.expand(row.path)
        layer = match.groupdict().get("layer")
        target = filled[path] if layer is None else filled[path][int(layer)]
        value = TRANSFORMS[row.transform].to_ours(tensor, target.shape)
        assert value.shape == target.shape, (name, value.shape, target.shape)
        assert np.isnan(target).all(), f"{path} is filled twice"
        target[...] = value
    empty = {path for path, v in filled.items() if np.isnan(v).any()}
    return jax.tree_util.tree_unflatten(treedef, [jnp.asarray(filled[p]) for p in shapes]), empty


def load_codec(cfg: CodecConfig, tensors: Mapping[str, np.ndarray]) -> Codec:
    """Our codec with the weights of a checkpoint's `codec_model.*` tensors; every parameter must be filled."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Codec(cfg, rngs=nnx.Rngs(0))))
    params, empty = place(tensors, {"codec": nnx.to_pure_dict(state)})
    assert not empty, f"not filled: {sorted(empty)}"
    nnx.replace_by_pure_dict(state, params["codec"])
    return nnx.merge(graph, state)


def flat_name(name: str) -> str:
    """A MimiModel parameter's name in a checkpoint, whose layout is flat: encoder, encoder_transformer, downsample ..."""
    name = re.sub(r"^(encoder|decoder)\.\1_seanet\.", r"\1.", name)
    return "codec_model." + re.sub(
        r"^(encoder|decoder)\.(\1_transformer|downsample|upsample)\.", r"\2.", name
    )


def mimi_oracle(cfg: CodecConfig, seed: int = 0):
    """transformers' MimiModel with random weights whose codes are diverse, and those weights under checkpoint names."""
    torch = pytest.importorskip("torch")
    mimi = pytest.importorskip("transformers.models.mimi.modeling_mimi")
    values = dataclasses.asdict(cfg)
    renamed = {
        "quantizer_size": "vector_quantization_hidden_dimension",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "layer_scale_initial": "layer_scale_initial_scale",
    }
    values = {renamed.get(name, name): v for name, v in values.items() if "dtype" not in name}
    rope = values.pop("rope")
    values["upsampling_ratios"] = list(cfg.upsampling_ratios)
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["theta"]}
    model = mimi.MimiModel(mimi.MimiConfig(**values, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("initialized"):
            continue
        elif name.endswith("cluster_usage"):
            # Some below the floor of 1e-5, as codewords that training gave up.
            weight.copy_(noise.abs() * 3)
            weight[::7] = 1e-7
        elif name.endswith("embed_sum"):
            weight.copy_(noise)
        elif name.endswith("scale"):  # LayerScale: large enough that the transformer matters
            weight.copy_(0.5 + 0.2 * noise)
        elif "norm.weight" in name:
            weight.copy_(1 + 0.3 * noise)
        elif weight.ndim == 1:
            weight.copy_(0.1 * noise)
        else:
            weight.copy_(1.3 * noise * (weight[0].numel() ** -0.5))
    # A codeword is embed_sum / usage: give each the scale of the vectors it has to match, so that all get used.
    for rvq in (
        model.quantizer.semantic_residual_vector_quantizer,
        model.quantizer.acoustic_residual_vector_quantizer,
    ):
        for i, layer in enumerate(rvq.layers):
            book = layer.codebook
            book.embed_sum *= book.cluster_usage.clamp(min=1e-5)[:, None] * 0.8**i
    tensors = {flat_name(k): v.numpy().copy() for k, v in model.state_dict().items()}
    return model, tensors


def oracle_encode(model, wave: np.ndarray) -> np.ndarray:
    """Codes [B, T, Q] that the PyTorch model gives for waves [B, N]."""
    import torch

    with torch.no_grad():
        return model.encode(torch.tensor(wave)[:, None]).audio_codes.numpy().transpose(0, 2, 1)


def oracle_decode(model, codes: np.ndarray) -> np.ndarray:
    """Waves [B, N] that the PyTorch model gives for codes [B, T, Q]."""
    import torch

    with torch.no_grad():
        codes = torch.tensor(codes.transpose(0, 2, 1)).long()
        return model.decode(codes).audio_values.numpy()[:, 0]


def export(params: dict, names: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors `names` (their values only say the shapes) read back out of our parameters."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    ours = {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(v) for p, v in leaves}
    out = {}
    for name, tensor in names.items():
        [(row, match)] = [(r, m) for r in CODEC_ROWS if (m := re.fullmatch(r.torch, name))]
        value = ours[match.expand(row.path)]
        if (layer := match.groupdict().get("layer")) is not None:
            value = value[int(layer)]
        out[name] = TRANSFORMS[row.transform].to_torch(value, tensor.shape)
    return out


def random_wave(batch: int, samples: int, seed: int = 1) -> np.ndarray:
    """White noise [B, N]."""
    return np.random.default_rng(seed).normal(size=(batch, samples)).astype(np.float32)


def random_codes(
    cfg: CodecConfig, batch: int, frames: int, books: int | None = None, seed: int = 2
) -> np.ndarray:
    """Codes [B, T, Q]."""
    books = cfg.num_quantizers if books is None else books
    shape = (batch, frames, books)
    return np.random.default_rng(seed).integers(0, cfg.codebook_size, shape).astype(np.int32)


encode = jax.jit(Codec.encode, static_argnames="num_codebooks")
decode = jax.jit(Codec.decode)
encode_step = jax.jit(Codec.encode_step, static_argnames="num_codebooks")
decode_step = jax.jit(Codec.decode_step)
