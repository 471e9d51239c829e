"""Gradients of both training losses against PyTorch's autograd through transformers' LlamaModel.

The PyTorch side spells the Backbone's sequence out position by position and loops over frames; it shares nothing with ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax.config import hf, tiny
from chroma_jax.model.backbone import Backbone
from chroma_jax.model.chroma import ChromaModel, random_model
from chroma_jax.model.decoder import Decoder
from chroma_jax.schedule import Dialogue
from chroma_jax.training import losses

from .torch_weights import load, near, randomise, tensors_of, torch

transformers = pytest.importorskip("transformers")

CONFIG = tiny()
LENGTHS = dict(voice_ids=[3, 1], voice_frames=[2, 3], text=[2, 1], frames=[6, 5])


def llama(section):
    """transformers' stack of one section of config.json."""
    values = hf.write(CONFIG)[section]
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    )  # fmt: skip
    config = transformers.LlamaConfig(vocab_size=7, **{k: values[k] for k in names if k in values})
    return transformers.LlamaModel(config)


class Oracle(torch.nn.Module):
    """Backbone and Decoder in the checkpoint's names."""

    def __init__(self):
        super().__init__()
        width, narrow, books, vocab = 64, 32, CONFIG.num_codebooks, CONFIG.backbone.vocab_size
        self.backbone_llama, self.decoder_llama = llama("backbone_config"), llama("decoder_config")
        self.table = torch.nn.Parameter(torch.zeros(books, vocab, width))
        self.head = torch.nn.Parameter(torch.zeros(vocab, width))
        self.projection = torch.nn.Parameter(torch.zeros(narrow, width))
        self.heads = torch.nn.Parameter(torch.zeros(books - 1, narrow, vocab))
        randomise(self)

    def run(self, stack, x, positions):
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        return stack(
            inputs_embeds=x, attention_mask=mask, position_ids=torch.tensor(positions)
        ).last_hidden_state

    def embed(self, codes, first=0):
        return torch.stack([self.table[first + i, code] for i, code in enumerate(codes)])

    def losses(self, embedding, dialogue):
        """(L_backbone, L_decoder) of `dialogue` (numpy, right-padded), with the Reasoner's token embeddings."""
        first_terms, other_terms = [], []
        for row in range(len(dialogue.frames)):
            sequence, reads = self.sequence(embedding, dialogue, row)
            hidden = self.run(self.backbone_llama, sequence[None], [list(range(len(sequence)))])[0]
            for frame, at in zip(dialogue.frames[row], reads, strict=False):
                h, frame = hidden[at], frame.tolist()
                first_terms.append(self.term(self.head @ h, frame[0]))
                x = torch.cat([h[None], self.embed(frame[:-1])]) @ self.projection.T
                y = self.run(self.decoder_llama, x[None], [[0, *range(len(frame) - 1)]])[0]
                for book in range(1, len(frame)):
                    other_terms.append(self.term(y[book] @ self.heads[book - 1], frame[book]))
        return torch.stack(first_terms).mean(), torch.stack(other_terms).mean()

    def sequence(self, embedding, d, row):
        """The Backbone's inputs of a row, and the position that predicts each of its frames."""
        token = lambda i: torch.tensor(embedding[int(i)])  # noqa: E731
        frame = lambda codes: self.embed(codes.tolist()).sum(0)  # noqa: E731
        x = [token(CONFIG.text_start_token_id)]
        x += [token(i) for i in d.voice_ids[row, : d.voice_id_lengths[row]]]
        x += [token(CONFIG.text_end_token_id)]
        x += [frame(codes) for codes in d.voice_frames[row, : d.voice_frame_lengths[row]]]
        x += [torch.zeros(64)]
        reads = []
        for t in range(d.frame_lengths[row]):
            if t % 2 == 0 and t // 2 < d.text_lengths[row]:
                x += [torch.tensor(d.hidden[row, t // 2]), token(d.text[row, t // 2])]
            reads.append(len(x) - 1)
            x.append(frame(d.frames[row, t]))
        return torch.stack(x), reads

    @staticmethod
    def term(logits, label):
        return torch.nn.functional.cross_entropy(logits[None], torch.tensor([label]))


def rename(name):
    """The oracle's names -> the checkpoint's."""
    for ours, theirs in (
        ("backbone_llama.", "backbone.model."),
        ("decoder_llama.", "decoder.model."),
        ("table", "backbone.audio_embedding.embed_audio_tokens.weight"),
        ("head", "backbone.codebook0_head.weight"),
        ("projection", "decoder.projection.weight"),
    ):
        if name == ours or (ours.endswith(".") and name.startswith(ours)):
            return None if "embed_tokens" in name else theirs + name.removeprefix(ours)
    assert name == "heads", name
    return "decoder.codebook_head.weight"


def placed(tensors, part):
    """Torch tensors by checkpoint name as our Backbone or Decoder: weights, or gradients, which transpose alike."""
    make = {
        "backbone": lambda: Backbone(CONFIG.backbone, rngs=nnx.Rngs(0)),
        "decoder": lambda: Decoder(CONFIG.decoder, rngs=nnx.Rngs(0)),
    }[part]
    flat = {}
    for name, value in tensors.items():
        if name.startswith(part):
            # The table is one matrix in the checkpoint.
            is_table = name.endswith("embed_audio_tokens.weight")
            flat[name] = value.reshape(-1, value.shape[-1]) if is_table else value
    return load(make, part, flat)


@pytest.fixture(scope="module")
def dialogue():
    rng = np.random.default_rng(0)
    ids = lambda *shape: rng.integers(0, 499, shape)  # noqa: E731
    codes = lambda *shape: rng.integers(1, 64, shape)  # noqa: E731
    lengths = {name: np.asarray(values, np.int32) for name, values in LENGTHS.items()}
    frames = codes(2, 6, 8)
    frames[0, 5] = frames[1, 4] = 0  # the stop frames
    return Dialogue(
        voice_ids=ids(2, 3), voice_id_lengths=lengths["voice_ids"],
        voice_frames=codes(2, 3, 8), voice_frame_lengths=lengths["voice_frames"],
        hidden=rng.standard_normal((2, 2, 64), np.float32),
        text=ids(2, 2), text_lengths=lengths["text"],
        frames=frames, frame_lengths=lengths["frames"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(dialogue):
    """The oracle and our model with the same weights."""
    oracle = Oracle()
    tensors = tensors_of(oracle, rename)
    model: ChromaModel = random_model(CONFIG)
    model.backbone, model.decoder = placed(tensors, "backbone"), placed(tensors, "decoder")
    embedding = np.random.default_rng(1).standard_normal(model.reasoner.embedding.shape, np.float32)
    model.reasoner.embedding = nnx.Param(jnp.asarray(embedding))
    return oracle, oracle.losses(embedding, dialogue), model


@pytest.mark.parametrize("which", [0, 1], ids=["backbone", "decoder"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_equal_autograd(both, dialogue, which, remat):
    oracle, oracle_losses, model = both
    oracle.zero_grad()
    oracle_losses[which].backward(retain_graph=True)
    named = {rename(name): p for name, p in oracle.named_parameters()}
    want = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in named.items()
        if name is not None
    }

    def with_remat(part):
        part.cfg = dataclasses.replace(
            part.cfg, llama=dataclasses.replace(part.cfg.llama, remat=remat)
        )
        part.llama.cfg = part.cfg.llama
        return part

    rebuilt = nnx.clone(model)
    parts = [nnx.split(with_remat(part)) for part in (rebuilt.backbone, rebuilt.decoder)]
    graphdefs, weights = zip(*parts, strict=True)

    @jax.jit
    @jax.value_and_grad
    def loss(weights, dialogue):
        whole = nnx.clone(model)
        whole.backbone, whole.decoder = map(nnx.merge, graphdefs, weights)
        sums = losses.dialogue_sums(whole, dialogue)
        return losses.weighted(sums, sums.count, float(which))

    value, gradients = loss(
        tuple(nnx.to_pure_dict(w) for w in weights), jax.tree.map(jnp.asarray, dialogue)
    )
    np.testing.assert_allclose(value, oracle_losses[which].detach().numpy(), rtol=1e-5)
    for part, ours in zip(("backbone", "decoder"), gradients, strict=True):
        expected = nnx.to_pure_dict(nnx.state(placed(want, part)))
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True
        )
        for (path, got), wanted in pairs:
            name = jax.tree_util.keystr(path)
            # The Backbone's loss says nothing of the Decoder, the Decoder's nothing of the head of code 0.
            unseen = part == "decoder" if which == 0 else name == "['head']"
            if unseen:
                assert not np.any(got) and not np.any(wanted), name
            else:
                assert np.abs(wanted).max() > 0, name
                near(got, wanted, 1e-4)
