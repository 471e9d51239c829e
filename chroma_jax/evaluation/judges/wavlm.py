"""WavLM (arXiv 2110.13900) in JAX: a waveform -> the weighted sum of all its layers' states. For judging, so without training.

Axes: N samples, T frames (20 ms), D width, H heads, C channels, L layers.

A clip is heard alone, padded to one of few lengths so that it compiles seldom: masks keep what it gives exactly that of the clip.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

Weights = dict[str, jax.Array]
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class WavlmConfig:
    """Sizes and kinds, by the names of transformers' `WavLMConfig`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    conv_kernel: tuple[int, ...]
    conv_stride: tuple[int, ...]
    num_conv_pos_embeddings: int
    num_conv_pos_embedding_groups: int
    num_buckets: int  # 0 for attention without a relative bias, as wav2vec 2.0's
    max_bucket_distance: int
    layer_norm_eps: float
    do_stable_layer_norm: bool  # norms before each block, and one at the end
    feat_extract_norm: str  # "layer": after every convolution; "group": over time, after the first

    @classmethod
    def of(cls, given: dict) -> WavlmConfig:
        """From the keys of a config.json. Raises ValueError naming one that is missing."""
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in given]
        if missing:
            raise ValueError(f"a WavLM's config.json wants {missing[0]}")
        taken = {f.name: given[f.name] for f in dataclasses.fields(cls)}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in taken.items()})


LARGE = WavlmConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    conv_kernel=(10, 3, 3, 3, 3, 2, 2),
    conv_stride=(5, 2, 2, 2, 2, 2, 2),
    num_conv_pos_embeddings=128,
    num_conv_pos_embedding_groups=16,
    num_buckets=320,
    max_bucket_distance=800,
    layer_norm_eps=1e-5,
    do_stable_layer_norm=True,
    feat_extract_norm="layer",
)

# The authors' names -> transformers', which are used here.
_RENAMED = (
    (r"conv_layers\.(\d+)\.0\.", r"conv_layers.\1.conv."),
    (r"conv_layers\.(\d+)\.2(\.1)?\.", r"conv_layers.\1.layer_norm."),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"pos_conv\.0\.", "pos_conv_embed.conv."),
    (r"\.self_attn\.grep_linear\.", ".attention.gru_rel_pos_linear."),
    (r"\.self_attn\.grep_a$", ".attention.gru_rel_pos_const"),
    (r"\.self_attn\.relative_attention_bias\.", ".attention.rel_attn_embed."),
    (r"\.self_attn\.", ".attention."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
    (r"\.conv\.weight_g$", ".conv.parametrizations.weight.original0"),
    (r"\.conv\.weight_v$", ".conv.parametrizations.weight.original1"),
)
_UNUSED = re.compile(r"^(masked_spec_embed|mask_emb|final_proj|label_embs_concat)")


def arrange(tensors: dict[str, np.ndarray], cfg: WavlmConfig) -> Weights:
    """A state dict of the authors' or transformers' -> the weights as `weighted_states` takes them: layers stacked [L, ...].

    Raises ValueError naming a tensor that is missing or not known.
    """
    named = {}
    for name, tensor in tensors.items():
        if _UNUSED.match(name):
            continue
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        named[name] = np.asarray(tensor, np.float32)
    weights: Weights = {}

    def take(name: str) -> np.ndarray:
        if name not in named:
            raise ValueError(f"the weights lack {name}")
        return named.pop(name)

    for i in range(len(cfg.conv_kernel)):
        prefix = f"feature_extractor.conv_layers.{i}"
        weights[f"conv{i}"] = take(f"{prefix}.conv.weight").transpose(2, 1, 0)
        weights[f"conv{i}.bias"] = named.pop(f"{prefix}.conv.bias", np.zeros(1, np.float32))
        if cfg.feat_extract_norm == "layer" or i == 0:
            for kind in ("weight", "bias"):
                weights[f"conv{i}.norm.{kind}"] = take(f"{prefix}.layer_norm.{kind}")
    for name in ("feature_projection.layer_norm", "feature_projection.projection", "encoder.layer_norm"):  # fmt: skip
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = take(f"{name}.{kind}")
    position = "encoder.pos_conv_embed.conv"
    size, direction = (take(f"{position}.parametrizations.weight.original{i}") for i in (0, 1))
    # Weight norm over all but the kernel's positions.
    norm = np.sqrt((direction.astype(np.float64) ** 2).sum((0, 1), keepdims=True))
    weights["position"] = (size * direction / norm).astype(np.float32).transpose(2, 1, 0)
    weights["position.bias"] = take(f"{position}.bias")
    if cfg.num_buckets:
        weights["relative"] = take("encoder.layers.0.attention.rel_attn_embed.weight")
    inner = sorted({n.split(".", 3)[3] for n in named if n.startswith("encoder.layers.")})
    for name in inner:
        stack = [take(f"encoder.layers.{i}.{name}") for i in range(cfg.num_hidden_layers)]
        weights[f"layers.{name}"] = np.stack(stack)
    if named:
        raise ValueError(f"the weights hold {len(named)} tensors that are not known, as {next(iter(named))}")  # fmt: skip
    return {k: jnp.asarray(v) for k, v in weights.items()}


def padded_size(samples: int) -> int:
    """The length that a clip is padded to: whole seconds, beyond ten in steps of a fifth."""
    seconds = -(-samples // 16_000)
    size = 1
    while size < seconds:
        size += max(1, size // 5) if size >= 10 else 1
    return 16_000 * size


def frames(cfg: WavlmConfig, samples: jax.Array | int) -> jax.Array | int:
    """How many frames that many samples give."""
    for kernel, stride in zip(cfg.conv_kernel, cfg.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


@functools.partial(jax.jit, static_argnums=1)
def weighted_states(
    weights: Weights, cfg: WavlmConfig, mixture: jax.Array, wave: jax.Array, length: jax.Array
) -> jax.Array:
    """Samples [N], of which `length` are the clip -> states [T, D], the sum by `mixture` [L + 1] of every layer's input and the output.

    Frames beyond the clip hold nothing of use.
    """
    x = _features(weights, cfg, wave, length)
    x = _layer_norm(x, weights, "feature_projection.layer_norm", cfg.layer_norm_eps)
    x = _linear(x, weights, "feature_projection.projection")
    inside = jnp.arange(len(x)) < frames(cfg, length)
    x = jnp.where(inside[:, None], x, 0)
    kernel = cfg.num_conv_pos_embeddings
    around = (kernel // 2, kernel // 2 - 1 + kernel % 2)
    near = convolve(x, weights["position"], padding=around, groups=cfg.num_conv_pos_embedding_groups)  # fmt: skip
    x = x + jax.nn.gelu(near + weights["position.bias"], approximate=False)
    if not cfg.do_stable_layer_norm:
        x = _layer_norm(x, weights, "encoder.layer_norm", cfg.layer_norm_eps)
    bias = None
    if cfg.num_buckets:
        bias = weights["relative"][_buckets(len(x), cfg)]  # [T, T, H]
    layers = {k.removeprefix("layers."): v for k, v in weights.items() if k.startswith("layers.")}

    def step(carry, layer):
        x, total = carry
        total = total + layer["mixture"] * x
        return (_layer(x, layer, cfg, bias, inside), total), None

    given = {**layers, "mixture": mixture[:-1]}
    (x, total), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), given)
    if cfg.do_stable_layer_norm:
        x = _layer_norm(x, weights, "encoder.layer_norm", cfg.layer_norm_eps)
    return total + mixture[-1] * x


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
    groups: int = 1,
) -> jax.Array:
    """[T, C] and a kernel [K, C / groups, C'] -> [T', C']."""
    return jax.lax.conv_general_dilated(
        x[None], kernel, (stride,), [padding], rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups, precision=_HIGHEST,
    )[0]  # fmt: skip


def _features(weights: Weights, cfg: WavlmConfig, wave: jax.Array, length: jax.Array) -> jax.Array:
    x = wave[:, None]
    for i, (kernel, stride) in enumerate(zip(cfg.conv_kernel, cfg.conv_stride, strict=True)):
        x = convolve(x, weights[f"conv{i}"], stride=stride) + weights[f"conv{i}.bias"]
        length = (length - kernel) // stride + 1
        if cfg.feat_extract_norm == "layer":
            x = _layer_norm(x, weights, f"conv{i}.norm", 1e-5)
        elif i == 0:  # each channel over the clip's time
            mean, variance = moments(x, length)
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
            x = x * weights["conv0.norm.weight"] + weights["conv0.norm.bias"]
        x = jax.nn.gelu(x, approximate=False)
    return x


def moments(x: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [C] of the first `length` of [T, C]."""
    inside = (jnp.arange(len(x)) < length)[:, None]
    mean = jnp.where(inside, x, 0).sum(0) / length
    return mean, jnp.where(inside, (x - mean) ** 2, 0).sum(0) / length


def _layer(
    x, layer: Weights, cfg: WavlmConfig, bias: jax.Array | None, inside: jax.Array
) -> jax.Array:
    norm = functools.partial(_layer_norm, weights=layer, eps=cfg.layer_norm_eps)
    if cfg.do_stable_layer_norm:
        x = x + _attend(norm(x, name="layer_norm"), layer, cfg, bias, inside)
        return x + _feed_forward(norm(x, name="final_layer_norm"), layer)
    x = norm(x + _attend(x, layer, cfg, bias, inside), name="layer_norm")
    return norm(x + _feed_forward(x, layer), name="final_layer_norm")


def _attend(
    x, layer: Weights, cfg: WavlmConfig, bias: jax.Array | None, inside: jax.Array
) -> jax.Array:
    """Self-attention whose relative bias each query gates by its own state."""
    heads = cfg.num_attention_heads
    q, k, v = (_linear(x, layer, f"attention.{n}_proj").reshape(len(x), heads, -1) for n in "qkv")
    scores = jnp.einsum("TND,SND->NTS", q, k, precision=_HIGHEST) * q.shape[-1] ** -0.5
    if bias is not None:
        gates = _linear(x.reshape(len(x), heads, -1), layer, "attention.gru_rel_pos_linear")
        a, b = jnp.moveaxis(jax.nn.sigmoid(gates.reshape(len(x), heads, 2, 4).sum(-1)), -1, 0)
        gate = a * (b * layer["attention.gru_rel_pos_const"].reshape(heads) - 1.0) + 2.0  # [T, H]
        scores += gate.T[:, :, None] * jnp.moveaxis(bias, -1, 0)
    scores = jnp.where(inside, scores, -jnp.inf)
    out = jnp.einsum("NTS,SND->TND", jax.nn.softmax(scores, -1), v, precision=_HIGHEST)
    return _linear(out.reshape(x.shape), layer, "attention.out_proj")


def _feed_forward(x: jax.Array, layer: Weights) -> jax.Array:
    x = jax.nn.gelu(_linear(x, layer, "feed_forward.intermediate_dense"), approximate=False)
    return _linear(x, layer, "feed_forward.output_dense")


def _linear(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    return jnp.dot(x, weights[f"{name}.weight"].T, precision=_HIGHEST) + weights[f"{name}.bias"]


def _layer_norm(x: jax.Array, weights: Weights, name: str, eps: float) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _buckets(count: int, cfg: WavlmConfig) -> np.ndarray:
    """Which bias [T, T] each distance takes: near ones one each, far ones by their logarithm; apart for before and after."""
    distance = np.arange(count)[None, :] - np.arange(count)[:, None]
    half = cfg.num_buckets // 2
    exact = half // 2
    far = np.log(np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(cfg.max_bucket_distance / exact)) * (half - exact)
    far = np.minimum(exact + far.astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(np.abs(distance) < exact, np.abs(distance), far)  # fmt: skip
