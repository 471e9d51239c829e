"""UTMOS in JAX against its parts in PyTorch, at random weights: transformers' wav2vec 2.0, an LSTM, a projection."""

import dataclasses

import numpy as np
import pytest

from chroma_jax.evaluation import judges
from chroma_jax.evaluation.judges import utmos, wavlm

torch = pytest.importorskip("torch", reason="torch is the oracle")


def test_utmos_equals_torch():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    cfg = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, conv_bias=False,
    )  # fmt: skip
    torch.manual_seed(0)
    ssl = Wav2Vec2Model(cfg).eval()
    lstm = torch.nn.LSTM(16 + 128 + 128, 6, batch_first=True, bidirectional=True)
    head = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.ReLU(), torch.nn.Linear(10, 1))
    fixed = torch.randn(2, 1, 128)
    with torch.no_grad():
        for p in (*ssl.parameters(), *head.parameters()):
            p.add_(0.1 * torch.randn(p.shape))
    tensors = {f"wav2vec2.{k}": v for k, v in ssl.state_dict().items()}
    tensors |= {f"blstm.{k}": v for k, v in lstm.state_dict().items()}
    tensors |= {f"projection.{k}": v for k, v in head.state_dict().items()}
    tensors |= {"domain_emb": fixed[0], "judge_emb": fixed[1]}
    own = dataclasses.replace(
        utmos.WAV2VEC2_BASE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    weights = utmos.arrange({k: v.numpy() for k, v in tensors.items()}, own)
    x = 0.1 * np.random.default_rng(0).standard_normal(11_000).astype(np.float32)
    with torch.no_grad():
        states = ssl(torch.from_numpy(x)[None]).last_hidden_state
        both = torch.cat([states, fixed.permute(1, 0, 2).reshape(1, 1, -1).expand(1, states.shape[1], -1)], -1)  # fmt: skip
        want = float(head(lstm(both)[0]).mean() * 2 + 3)
    assert utmos.opinion(weights, own, x) == pytest.approx(want, abs=1e-4)
    tensors.pop("judge_emb")
    with pytest.raises(ValueError, match="lack judge_emb"):
        utmos.arrange({k: v.numpy() for k, v in tensors.items()}, own)


def test_the_published_names():
    """SpeechMOS's file keeps fairseq's names."""
    names = {"conv_layers.0.0.weight": "conv_layers.0.conv.weight", "conv_layers.0.2.bias": "conv_layers.0.layer_norm.bias",
             "encoder.pos_conv.0.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
             "encoder.layers.3.self_attn.k_proj.bias": "encoder.layers.3.attention.k_proj.bias",
             "encoder.layers.3.self_attn_layer_norm.bias": "encoder.layers.3.layer_norm.bias"}  # fmt: skip
    import re

    for given, want in names.items():
        for old, new in wavlm._RENAMED:
            given = re.sub(old, new, given)
        assert given == want


def test_weights_that_are_not_there():
    with pytest.raises(judges.MissingJudge, match="utmos22_strong_step7459_v1.pt"):
        judges.mos("utmos:absent.pt")
