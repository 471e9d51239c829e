"""UTMOS22's strong learner in JAX: wav2vec 2.0 base, two fixed embeddings, an LSTM each way, a mean over frames.

Axes: N samples, T frames, D width. The weights are SpeechMOS's: `utmos22_strong_step7459_v1.pt` (MIT).
"""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.evaluation.judges import MissingJudge, pickles, sound, wavlm, weights_digest
from chroma_jax.evaluation.judges.wavlm import Weights

WAV2VEC2_BASE = wavlm.WavlmConfig(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    conv_kernel=(10, 3, 3, 3, 3, 2, 2),
    conv_stride=(5, 2, 2, 2, 2, 2, 2),
    num_conv_pos_embeddings=128,
    num_conv_pos_embedding_groups=16,
    num_buckets=0,
    max_bucket_distance=0,
    layer_norm_eps=1e-5,
    do_stable_layer_norm=False,
    feat_extract_norm="group",
)
_LSTM = tuple(f"{n}_l0{way}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for way in ("", "_reverse"))  # fmt: skip
_HEAD = {
    "domain_emb", "judge_emb", *(f"blstm.{n}" for n in _LSTM),
    *(f"projection.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")),
}  # fmt: skip
_HIGHEST = jax.lax.Precision.HIGHEST


class Utmos:
    """UTMOS of a clip, as it is: no change of level.

    Args:
      path: the weights' file.
    """

    name = "UTMOS22 strong (JAX)"
    scale = "1 to 5"

    def __init__(self, path: str | os.PathLike):
        if not pathlib.Path(path).is_file():
            raise MissingJudge(
                f"utmos: no file {path}; it is utmos22_strong_step7459_v1.pt of SpeechMOS v1.2.0 "
                "(github.com/tarepan/SpeechMOS)"
            )
        self.digest = weights_digest([path])
        self._weights = arrange(pickles.read(path, "state_dict"), WAV2VEC2_BASE)

    def __call__(self, samples: np.ndarray, rate: int) -> float | None:
        """Mono samples [N] -> the score, None where there is no speech."""
        if not sound.has_speech(samples, rate):
            return None
        return opinion(self._weights, WAV2VEC2_BASE, sound.soxr(samples, rate))


def arrange(tensors: dict[str, np.ndarray], cfg: wavlm.WavlmConfig) -> Weights:
    """The state dict of SpeechMOS's model -> weights. Raises ValueError naming a tensor that is missing or not known."""
    backbone = {k.removeprefix("wav2vec2."): v for k, v in tensors.items() if k.startswith("wav2vec2.")}  # fmt: skip
    head = {k: v for k, v in tensors.items() if not k.startswith("wav2vec2.")}
    if missing := sorted(_HEAD - set(head)):
        raise ValueError(f"the weights lack {missing[0]}")
    if extra := sorted(set(head) - _HEAD):
        raise ValueError(f"the weights hold {len(extra)} tensors that are not known, as {extra[0]}")
    return {
        **{f"wav2vec2.{k}": v for k, v in wavlm.arrange(backbone, cfg).items()},
        **{k: jnp.asarray(v, jnp.float32) for k, v in head.items()},
    }


def opinion(weights: Weights, cfg: wavlm.WavlmConfig, samples: np.ndarray) -> float:
    """Samples [N] at 16 kHz -> the score."""
    length = len(samples)
    wave = np.pad(samples, (0, wavlm.padded_size(length) - length)).astype(np.float32)
    backbone = {k.removeprefix("wav2vec2."): v for k, v in weights.items() if k.startswith("wav2vec2.")}  # fmt: skip
    head = {k: v for k, v in weights.items() if not k.startswith("wav2vec2.")}
    output = jnp.zeros(cfg.num_hidden_layers + 1).at[-1].set(1.0)
    states = wavlm.weighted_states(backbone, cfg, output, wave, length)
    return float(_score(head, states, wavlm.frames(cfg, length)))


@jax.jit
def _score(weights: Weights, x: jax.Array, length: jax.Array) -> jax.Array:
    inside = jnp.arange(len(x)) < length
    fixed = jnp.concatenate([weights["domain_emb"][0], weights["judge_emb"][0]])
    x = jnp.concatenate([x, jnp.broadcast_to(fixed, (len(x), len(fixed)))], -1)
    both = [_lstm(weights, x, inside, way) for way in ("", "_reverse")]
    x = jnp.concatenate(both, -1)
    x = jax.nn.relu(_linear(weights, "projection.0", x))
    x = _linear(weights, "projection.2", x)[:, 0]
    return jnp.where(inside, x, 0).sum() / length * 2 + 3


def _lstm(weights: Weights, x: jax.Array, inside: jax.Array, way: str) -> jax.Array:
    """One direction; frames beyond the clip leave its state at zero."""
    into, again = (weights[f"blstm.weight_{kind}_l0{way}"] for kind in ("ih", "hh"))
    bias = weights[f"blstm.bias_ih_l0{way}"] + weights[f"blstm.bias_hh_l0{way}"]

    def step(state, given):
        (hidden, cell), (x, inside) = state, given
        i, f, g, o = jnp.split(x + jnp.dot(again, hidden, precision=_HIGHEST), 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        new = (jnp.where(inside, hidden, 0), jnp.where(inside, cell, 0))
        return new, new[0]

    zero = jnp.zeros(again.shape[1])
    x = jnp.dot(x, into.T, precision=_HIGHEST) + bias
    return jax.lax.scan(step, (zero, zero), (x, inside), reverse=way == "_reverse")[1]


def _linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    return jnp.dot(x, weights[f"{name}.weight"].T, precision=_HIGHEST) + weights[f"{name}.bias"]
