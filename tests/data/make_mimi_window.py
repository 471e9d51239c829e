"""Makes one half of mimi_window.safetensors: what transformers' Mimi gives beyond its window of 250 positions (10 s).

    python tests/data/make_mimi_window.py {on,off} OUT.safetensors

transformers 5.24 keeps the window ("on"); 4.57 to 5.0 drop it under sdpa and eager attention, so 5.0.0rc0, with which the public
code of Chroma is pinned, made "off". Weights are those of chroma-tiny; 14 s of seeded noise in, and seeded codes. Of waves, every
16th sample is kept.
"""

import json
import pathlib
import re
import sys

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import MimiConfig, MimiModel, __version__

HERE = pathlib.Path(__file__).parent
FRAMES, EVERY = 175, 16


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """A wave [1, N] and codes [1, T, Q]."""
    rng = np.random.default_rng(7)
    wave = rng.standard_normal((1, FRAMES * 1920)).astype(np.float32)
    return wave, rng.integers(0, 64, (1, FRAMES, 8))


def checkpoint_name(name: str) -> str:
    """A parameter's name in the checkpoint, whose layout is flat; newer versions nest."""
    name = re.sub(r"^(encoder|decoder)\.\1_seanet\.", r"\1.", name)
    return "codec_model." + re.sub(
        r"^(encoder|decoder)\.(\1_transformer|downsample|upsample)\.", r"\2.", name
    )


def main(which: str, out: str) -> None:
    """Writes the half `which`."""
    config = json.loads((HERE / "chroma-tiny" / "config.json").read_text())["codec_config"]
    tensors = load_file(HERE / "chroma-tiny" / "model.safetensors")
    model = MimiModel(MimiConfig(**config)).eval()
    state = {name: torch.tensor(tensors[checkpoint_name(name)]) for name in model.state_dict()}
    model.load_state_dict(state)
    wave, codes = inputs()
    with torch.no_grad():
        encoded = model.encode(torch.tensor(wave)[:, None], num_quantizers=8).audio_codes.numpy()
        decoded = model.decode(torch.tensor(codes.transpose(0, 2, 1))).audio_values.numpy()
    print(__version__, model.config._attn_implementation, encoded.shape, decoded.shape)
    half = {
        f"{which}/codes": np.ascontiguousarray(encoded.transpose(0, 2, 1), np.int32),
        f"{which}/wave": np.ascontiguousarray(decoded[:, 0, ::EVERY]),
    }
    save_file(half, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
