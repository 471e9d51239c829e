"""Our LLaMA stack against transformers' LlamaModel with random weights; both read the same configuration keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax.config import Llama3Rope, tiny
from chroma_jax.model.decoder import Decoder
from chroma_jax.model.llama import Llama

from .torch_weights import llama_config, load, near, randomise, tensors_of, torch

transformers = pytest.importorskip("transformers")

STRETCH = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# The two stretches that Chroma's configurations carry.
SPEECH = STRETCH | {
    "factor": 32.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 1024,
}
FRAME = STRETCH | {
    "factor": 32.0,
    "low_freq_factor": 0.001953125,
    "high_freq_factor": 0.0078125,
    "original_max_position_embeddings": 16,
}
NEW, OLD = "rope_parameters", "rope_scaling"
CONFIGS = {
    "mha": dict(num_key_value_heads=4),
    "gqa": dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=48),
    "gqa, groups of 2": dict(num_attention_heads=8, num_key_value_heads=4, head_dim=6),
    "mqa": dict(num_attention_heads=5, num_key_value_heads=1, hidden_size=40),
    "wide heads": dict(head_dim=20),
    "narrow heads": dict(head_dim=2, num_hidden_layers=3),
    "one layer": dict(num_hidden_layers=1, intermediate_size=7),
    "large eps": dict(rms_norm_eps=0.3),
    "small eps": dict(rms_norm_eps=1e-6),
    "theta, old spelling": dict(rope_theta=777.0, head_dim=16),
    "theta, new spelling": {NEW: {"rope_type": "default", "rope_theta": 777.0}},
    "llama3, old spelling": {
        "rope_theta": 5e5,
        OLD: {"rope_type": "llama3"} | STRETCH,
        "head_dim": 16,
    },
    "llama3, oldest spelling": {
        "rope_theta": 100.0,
        OLD: {"type": "llama3"} | STRETCH,
        "head_dim": 16,
    },
    "llama3, new spelling": {
        NEW: {"rope_type": "llama3", "rope_theta": 5e5} | STRETCH,
        "head_dim": 16,
    },
    "llama3, Backbone": {NEW: {"rope_type": "llama3", "rope_theta": 5e5} | SPEECH, "head_dim": 64},
    "llama3, Decoder": {NEW: {"rope_type": "llama3", "rope_theta": 5e5} | FRAME, "head_dim": 32},
}


def values_of(**changes):
    """Configuration keys, with the rotary keys of `changes` or a plain theta."""
    values = dict(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        hidden_act="silu",
    )
    if "head_dim" not in changes:
        hidden, heads = (changes.get(k, values[k]) for k in ("hidden_size", "num_attention_heads"))
        values["head_dim"] = hidden // heads
    if not {NEW, "rope_theta"} & set(changes):
        values["rope_theta"] = 10000.0
    return values | changes


def pair(prefix="decoder", ours="decoder/llama", **changes):
    """(LlamaModel, its tensors as a checkpoint's, our Llama)."""
    values = values_of(**changes)
    oracle = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=7, **values)).eval()
    randomise(oracle)
    tensors = tensors_of(
        oracle, lambda name: None if name == "embed_tokens.weight" else f"{prefix}.model.{name}"
    )
    cfg = llama_config(**values)
    return oracle, tensors, load(lambda: Llama(cfg, rngs=nnx.Rngs(0)), ours, tensors)


def embeddings(batch, length, width, seed=0):
    """Small ones, so that the epsilon of the first norm is felt."""
    return 0.5 * np.random.default_rng(seed).standard_normal((batch, length, width), np.float32)


def strides(batch, length, seed=1):
    """Positions with gaps: up to some hundreds, so that slow frequencies turn visibly."""
    gaps = np.random.default_rng(seed).integers(1, 60, (batch, length))
    return np.cumsum(gaps, axis=1)


def oracle_hidden(oracle, x, positions=None):
    mask = torch.ones(
        x.shape[:2], dtype=torch.long
    )  # without it, gaps would be read as packed rows
    if positions is not None:
        positions = torch.tensor(positions)
    with torch.no_grad():
        out = oracle(inputs_embeds=torch.tensor(x), attention_mask=mask, position_ids=positions)
    return out.last_hidden_state.numpy()


call = jax.jit(lambda model, *args: model(*args))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_pytorch(changes):
    oracle, _, model = pair(**changes)
    x = embeddings(2, 17, model.cfg.hidden_size)
    near(call(model, x), oracle_hidden(oracle, x))
    positions = strides(2, 17)
    far = oracle_hidden(oracle, x, positions)
    # One unit in the last place of a frequency, times a position of some hundreds, is seen here.
    near(call(model, x, positions), far, 1e-5)
    # The figures above mean something: positions matter, and so does what came before.
    assert np.abs(far - oracle_hidden(oracle, x)).max() > 0.1
    assert np.abs(far[:, -1] - oracle_hidden(oracle, x[:, -1:])[:, 0]).max() > 0.1


@pytest.mark.parametrize(
    "name", ["theta, old spelling", "llama3, Backbone", "llama3, Decoder", "large eps"]
)
def test_rope_and_epsilon_matter(name):
    """These inputs tell a stretch from none and one epsilon from another: the equality above is not empty."""
    _, tensors, model = pair(**CONFIGS[name])
    x, positions = embeddings(1, 17, model.cfg.hidden_size), strides(1, 17)
    want = call(model, x, positions)
    stretch = Llama3Rope(
        factor=8, low_freq_factor=0.1, high_freq_factor=9, original_max_positions=64
    )
    stretch = stretch if model.cfg.rope.llama3 is None else None
    for other in (
        dataclasses.replace(model.cfg, rope=dataclasses.replace(model.cfg.rope, llama3=stretch)),
        dataclasses.replace(model.cfg, norm_eps=0.03),
    ):
        changed = load(lambda cfg=other: Llama(cfg, rngs=nnx.Rngs(0)), "decoder/llama", tensors)
        assert np.abs(call(changed, x, positions) - want).max() > 1e-3


@pytest.mark.parametrize(
    "split", [[17], [9, 8], [1] * 17, [5, 1, 1, 7, 3]], ids=["prefill", "halves", "ones", "mixed"]
)
def test_prefill_and_steps_equal_pytorch(split):
    oracle, _, model = pair(**CONFIGS["llama3, new spelling"])
    x = embeddings(3, 17, model.cfg.hidden_size)
    prefill = jax.jit(lambda model, x, lengths: model.prefill(x, lengths, 20))
    y, cache = prefill(model, x[:, : split[0]], jnp.full(3, split[0]))
    outputs, at = [y], split[0]
    step = jax.jit(lambda model, x, cache: model.step(x, cache))
    for width in split[1:]:
        y, cache = step(model, x[:, at : at + width], cache)
        outputs.append(y)
        at += width
    near(np.concatenate(outputs, axis=1), oracle_hidden(oracle, x))


def test_ragged_rows_equal_pytorch_alone():
    oracle, _, model = pair(**CONFIGS["gqa"])
    x, lengths = embeddings(3, 12, model.cfg.hidden_size), [12, 5, 1]
    y, _ = model.prefill(x, jnp.array(lengths), 12)
    for row, length in enumerate(lengths):
        near(y[row : row + 1, :length], oracle_hidden(oracle, x[row : row + 1, :length]))


@pytest.mark.parametrize(
    "shared", [False, True], ids=["counted positions", "shared first position"]
)
def test_decoder_equals_pytorch(shared):
    """The Decoder around the stack: projection, its positions, and one head per codebook."""
    cfg = dataclasses.replace(tiny().decoder, shared_first_position=shared)
    oracle, tensors, _ = pair(
        head_dim=cfg.llama.head_dim,
        rms_norm_eps=cfg.llama.norm_eps,
        hidden_size=cfg.llama.hidden_size,
        intermediate_size=cfg.llama.intermediate_size,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | FRAME,
    )
    rng = np.random.default_rng(0)
    width, books, vocab = cfg.llama.hidden_size, cfg.num_codebooks, cfg.vocab_size
    projection = 0.25 * rng.standard_normal((width, cfg.embedding_size), np.float32)
    heads = 0.25 * rng.standard_normal((books - 1, width, vocab), np.float32)
    tensors |= {"decoder.projection.weight": projection, "decoder.codebook_head.weight": heads}
    model = load(lambda: Decoder(cfg, rngs=nnx.Rngs(0)), "decoder", tensors)
    hidden = rng.standard_normal((3, cfg.embedding_size), np.float32)
    codes = rng.standard_normal((3, books - 1, cfg.embedding_size), np.float32)
    x = np.concatenate([hidden[:, None], codes], axis=1) @ projection.T
    positions = np.array([[0, 0, 1, 2, 3, 4, 5, 6] if shared else list(range(books))] * 3)
    y = oracle_hidden(oracle, x, positions)[:, 1:]
    near(call(model, hidden, codes), np.einsum("BQW,QWV->BQV", y, heads))
