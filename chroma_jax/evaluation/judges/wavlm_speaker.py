"""Who speaks, by WavLM: the model of Seed-TTS-eval's SIM (ECAPA-TDNN on WavLM-large), and wavlm-base-plus-sv (x-vector).

Axes: N samples, T frames, C channels, D values of a voice.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.evaluation.judges import MissingJudge, pickles, sound, wavlm
from chroma_jax.evaluation.judges.wavlm import Weights, convolve, moments

SEED_TTS_SHA256 = "51f07e3b94d9e0262a6a675ef5a087be3dd09e8c62e9d886827f44f82fe7f94b"
LEAST_SAMPLES = 720  # what is shorter has no voice
_HIGHEST = jax.lax.Precision.HIGHEST
_SCALE = 8  # parts of a Res2 block
_CONV_KEYS = ("weight", "bias")
_NORM_KEYS = ("weight", "bias", "running_mean", "running_var")
_BACKBONE = "feature_extract.model."
_HEAD_UNUSED = ("loss_calculator.", "projection.")


def open_speaker(kind: str, path: str) -> WavlmLarge | WavlmXvector:
    """Opens "wavlm-large" (a .pth file) or "wavlm-base-plus-sv" (a directory). Raises MissingJudge, ValueError."""
    return WavlmLarge(path) if kind == "wavlm-large" else WavlmXvector(path)


class WavlmLarge:
    """Voices as 256 values, by the model of Seed-TTS-eval's SIM: the field's scale.

    Args:
      path: `wavlm_large_finetune.pth`, whose hash is checked: other weights would give figures of no scale.
    """

    name = "WavLM-large SV (Seed-TTS-eval, JAX)"
    scale = "cosine; human recordings of test-en 0.734"

    def __init__(self, path: str | os.PathLike):
        path = pathlib.Path(path)
        if not path.is_file():
            raise MissingJudge(
                f"wavlm-large: no file {path}; hf download bezzam/wavlm_large_finetune_seed_tts_eval"
            )
        found = _sha256(path)
        if found != SEED_TTS_SHA256:
            raise ValueError(
                f"{path}: is not the published wavlm_large_finetune.pth (SHA-256 {found[:12]}, wanted "
                f"{SEED_TTS_SHA256[:12]})"
            )
        self.digest = found[:12]
        self._weights = arrange_ecapa(pickles.read(path, "model"), wavlm.LARGE)

    def __call__(self, samples: np.ndarray, rate: int) -> np.ndarray | None:
        """Mono samples [N] -> the voice [D]; None without speech or under 45 ms."""
        if not sound.has_speech(samples, rate):
            return None
        x = sound.sinc(samples, rate)
        return embed_ecapa(self._weights, wavlm.LARGE, x) if len(x) >= LEAST_SAMPLES else None


class WavlmXvector:
    """Voices as 512 values, by microsoft/wavlm-base-plus-sv: tells speakers apart; of little use for ranking good clones.

    Args:
      directory: with config.json and model.safetensors or pytorch_model.bin.
    """

    name = "wavlm-base-plus-sv (JAX)"
    scale = "cosine; the same speaker from about 0.86, others 0.6 to 0.84"

    def __init__(self, directory: str | os.PathLike):
        home = pathlib.Path(directory)
        files = [home / n for n in ("model.safetensors", "pytorch_model.bin") if (home / n).is_file()]  # fmt: skip
        if not files or not (home / "config.json").is_file():
            raise MissingJudge(
                f"wavlm-base-plus-sv: {home} lacks config.json or weights; "
                "hf download microsoft/wavlm-base-plus-sv --local-dir=DIR"
            )
        self.digest = _sha256(files[0])[:12]
        given = json.loads((home / "config.json").read_text())
        if files[0].suffix == ".safetensors":
            from safetensors.numpy import load_file

            tensors = load_file(files[0])
        else:
            tensors = pickles.read(files[0])
        self._cfg = wavlm.WavlmConfig.of(given)
        self._dilation = tuple(given.get("tdnn_dilation", (1, 2, 3, 1, 1)))
        self._mixed = given.get("use_weighted_layer_sum", False)
        self._normalised = _normalises(home, self._cfg)
        self._weights = arrange_xvector(tensors, self._cfg, self._dilation, self._mixed)

    def __call__(self, samples: np.ndarray, rate: int) -> np.ndarray | None:
        """Mono samples [N] -> the voice [D]; None without speech or with too little sound for the model's windows."""
        if not sound.has_speech(samples, rate):
            return None
        x = sound.sinc(samples, rate)
        least = wavlm.frames(self._cfg, len(x)) - 14  # what the windows of 5, 3 and 3 take
        if least < 2:
            return None
        return embed_xvector(self._weights, self._cfg, self._dilation, x, self._normalised)


def _normalises(home: pathlib.Path, cfg: wavlm.WavlmConfig) -> bool:
    """Whether the model wants zero mean and unit variance."""
    path = home / "preprocessor_config.json"
    if path.is_file():
        return bool(json.loads(path.read_text()).get("do_normalize", True))
    return cfg.do_stable_layer_norm


def _padded(x: np.ndarray, normalised: bool) -> tuple[np.ndarray, int]:
    """The clip at zero mean and unit variance, if that is asked for, and padded; and its length."""
    x = x.astype(np.float64)
    if normalised:
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return np.pad(x, (0, wavlm.padded_size(len(x)) - len(x))).astype(np.float32), len(x)


# --- ECAPA-TDNN -----------------------------------------------------------------------------------------------------------


def arrange_ecapa(tensors: dict[str, np.ndarray], cfg: wavlm.WavlmConfig) -> Weights:
    """The state dict of Seed-TTS-eval's model -> weights. Raises ValueError naming a tensor that is missing or not known."""
    backbone = {k.removeprefix(_BACKBONE): v for k, v in tensors.items() if k.startswith(_BACKBONE)}
    head = {
        k: jnp.asarray(v, jnp.float32)
        for k, v in tensors.items()
        if not k.startswith((_BACKBONE, *_HEAD_UNUSED)) and not k.endswith("num_batches_tracked")
    }
    known = _ecapa_names()
    if missing := sorted(known - set(head)):
        raise ValueError(f"the weights lack {missing[0]}")
    if extra := sorted(set(head) - known):
        raise ValueError(f"the weights hold {len(extra)} tensors that are not known, as {extra[0]}")
    return {**{f"wavlm.{k}": v for k, v in wavlm.arrange(backbone, cfg).items()}, **head}


def _ecapa_names() -> set[str]:
    convolutions = ["layer1.conv", "conv", "pooling.linear1", "pooling.linear2", "linear"]
    norms = ["layer1.bn", "bn"]
    for i in (2, 3, 4):
        for part in ("Conv1dReluBn1", "Conv1dReluBn2"):
            convolutions.append(f"layer{i}.{part}.conv")
            norms.append(f"layer{i}.{part}.bn")
        for j in range(_SCALE - 1):
            convolutions.append(f"layer{i}.Res2Conv1dReluBn.convs.{j}")
            norms.append(f"layer{i}.Res2Conv1dReluBn.bns.{j}")
        convolutions += [f"layer{i}.SE_Connect.linear{j}" for j in (1, 2)]
    names = {f"{n}.{k}" for n in convolutions for k in _CONV_KEYS}
    return names | {f"{n}.{k}" for n in norms for k in _NORM_KEYS} | {"feature_weight"}


def embed_ecapa(weights: Weights, cfg: wavlm.WavlmConfig, samples: np.ndarray) -> np.ndarray:
    """Samples [N] at 16 kHz -> the voice [D]."""
    wave, length = _padded(samples, True)
    backbone = {k.removeprefix("wavlm."): v for k, v in weights.items() if k.startswith("wavlm.")}
    head = {k: v for k, v in weights.items() if not k.startswith("wavlm.")}
    mixture = jax.nn.softmax(weights["feature_weight"])
    states = wavlm.weighted_states(backbone, cfg, mixture, wave, length)
    return np.asarray(_ecapa(head, states, wavlm.frames(cfg, length)))


@jax.jit
def _ecapa(weights: Weights, x: jax.Array, length: jax.Array) -> jax.Array:
    inside = (jnp.arange(len(x)) < length)[:, None]

    def kept(x: jax.Array) -> jax.Array:
        return jnp.where(inside, x, 0)

    x = x + 1e-6
    mean, variance = moments(x, length)
    x = kept((x - mean) * jax.lax.rsqrt(variance + 1e-5))
    x = kept(_conv_relu_norm(weights, "layer1.conv", "layer1.bn", x))
    outs = []
    for i in (2, 3, 4):
        x = _se_res2(weights, f"layer{i}", x, dilation=i, length=length, kept=kept)
        outs.append(x)
    x = jax.nn.relu(_conv(weights, "conv", jnp.concatenate(outs, -1)))
    scores = _conv(weights, "pooling.linear2", jnp.tanh(_conv(weights, "pooling.linear1", x)))
    shares = jax.nn.softmax(jnp.where(inside, scores, -jnp.inf), axis=0)
    mean = (shares * x).sum(0)
    deviation = jnp.sqrt(jnp.maximum((shares * x**2).sum(0) - mean**2, 1e-9))
    pooled = _batch_norm(weights, "bn", jnp.concatenate([mean, deviation]))
    return _linear(weights, "linear", pooled)


def _se_res2(weights: Weights, name: str, x, *, dilation: int, length, kept) -> jax.Array:
    before = x
    x = kept(_conv_relu_norm(weights, f"{name}.Conv1dReluBn1.conv", f"{name}.Conv1dReluBn1.bn", x))
    parts = jnp.moveaxis(x.reshape(len(x), _SCALE, -1), 1, 0)  # [8, T, C / 8]
    inner = f"{name}.Res2Conv1dReluBn"
    stacked = {
        f"{kind}.{key}": jnp.stack(
            [weights[f"{inner}.{kind}s.{i}.{key}"] for i in range(_SCALE - 1)]
        )
        for kind, keys in (("conv", _CONV_KEYS), ("bn", _NORM_KEYS))
        for key in keys
    }

    def step(before: jax.Array, given: tuple[Weights, jax.Array]) -> tuple[jax.Array, jax.Array]:
        layer, part = given
        out = kept(_conv_relu_norm(layer, "conv", "bn", before + part, dilation))
        return out, out

    _, outs = jax.lax.scan(step, jnp.zeros_like(parts[0]), (stacked, parts[:-1]))
    x = jnp.concatenate([jnp.moveaxis(outs, 0, 1).reshape(len(x), -1), parts[-1]], -1)
    x = kept(_conv_relu_norm(weights, f"{name}.Conv1dReluBn2.conv", f"{name}.Conv1dReluBn2.bn", x))
    squeezed = jax.nn.relu(_linear(weights, f"{name}.SE_Connect.linear1", x.sum(0) / length))
    return x * jax.nn.sigmoid(_linear(weights, f"{name}.SE_Connect.linear2", squeezed)) + before


def _conv_relu_norm(weights: Weights, conv: str, norm: str, x, dilation: int = 1) -> jax.Array:
    return _batch_norm(weights, norm, jax.nn.relu(_conv(weights, conv, x, dilation)))


def _conv(weights: Weights, name: str, x: jax.Array, dilation: int = 1) -> jax.Array:
    kernel = weights[f"{name}.weight"].transpose(2, 1, 0)
    reach = dilation * (len(kernel) // 2)
    return convolve(x, kernel, padding=(reach, reach), dilation=dilation) + weights[f"{name}.bias"]


def _batch_norm(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    return jnp.dot(x, weights[f"{name}.weight"].T, precision=_HIGHEST) + weights[f"{name}.bias"]


# --- x-vector -------------------------------------------------------------------------------------------------------------


def arrange_xvector(
    tensors: dict[str, np.ndarray], cfg: wavlm.WavlmConfig, dilation: tuple[int, ...], mixed: bool
) -> Weights:
    """The state dict of a `WavLMForXVector` -> weights; the classifier of its training is left out. Raises ValueError."""
    backbone = {k.removeprefix("wavlm."): v for k, v in tensors.items() if k.startswith("wavlm.")}
    names = {f"{n}.{k}" for n in ("projector", "feature_extractor") for k in ("weight", "bias")}
    names |= {f"tdnn.{i}.kernel.{k}" for i in range(len(dilation)) for k in ("weight", "bias")}
    if missing := sorted(names - set(tensors)):
        raise ValueError(f"the weights lack {missing[0]}")
    head = {n: jnp.asarray(tensors[n], jnp.float32) for n in names}
    count = cfg.num_hidden_layers + 1
    if mixed:
        head["mixture"] = jax.nn.softmax(jnp.asarray(tensors["layer_weights"], jnp.float32))
    else:
        head["mixture"] = jnp.zeros(count).at[-1].set(1.0)
    return {**{f"wavlm.{k}": v for k, v in wavlm.arrange(backbone, cfg).items()}, **head}


def embed_xvector(
    weights: Weights,
    cfg: wavlm.WavlmConfig,
    dilation: tuple[int, ...],
    samples: np.ndarray,
    normalised: bool = True,
) -> np.ndarray:
    """Samples [N] at 16 kHz -> the voice [D]."""
    wave, length = _padded(samples, normalised)
    backbone = {k.removeprefix("wavlm."): v for k, v in weights.items() if k.startswith("wavlm.")}
    head = {k: v for k, v in weights.items() if not k.startswith("wavlm.")}
    states = wavlm.weighted_states(backbone, cfg, weights["mixture"], wave, length)
    return np.asarray(_xvector(head, dilation, states, wavlm.frames(cfg, length)))


@functools.partial(jax.jit, static_argnums=1)
def _xvector(weights: Weights, dilation: tuple[int, ...], x: jax.Array, length) -> jax.Array:
    x = _linear(weights, "projector", x)
    for i, step in enumerate(dilation):
        matrix = weights[f"tdnn.{i}.kernel.weight"]
        kernel = matrix.reshape(len(matrix), -1, x.shape[-1]).transpose(1, 2, 0)
        x = convolve(x, kernel, dilation=step) + weights[f"tdnn.{i}.kernel.bias"]
        x = jax.nn.relu(x)
        length = length - step * (len(kernel) - 1)
    mean, variance = moments(x, length)
    deviation = jnp.sqrt(variance * length / (length - 1))
    return _linear(weights, "feature_extractor", jnp.concatenate([mean, deviation]))


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
