"""The speaker models in JAX against transformers' WavLM and heads in PyTorch, at random weights."""

import dataclasses
import json

import numpy as np
import pytest

from chroma_jax.evaluation import judges
from chroma_jax.evaluation.judges import wavlm, wavlm_speaker

torch = pytest.importorskip("torch", reason="torch is the oracle")

SIZES = {
    "large": dict(do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=False),
    "base": dict(do_stable_layer_norm=False, feat_extract_norm="group", conv_bias=True),
}


def config(kind):
    from transformers import WavLMConfig

    return WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=(24,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        num_buckets=32, max_bucket_distance=60, tdnn_dim=(20, 20, 20, 20, 36), xvector_output_dim=12,
        use_weighted_layer_sum=True, **SIZES[kind],
    )  # fmt: skip


def ours(cfg):
    return wavlm.WavlmConfig.of(
        {f.name: getattr(cfg, f.name) for f in dataclasses.fields(wavlm.WavlmConfig)}
    )


def shaken(model, seed=0):
    """Random weights of which every one matters: transformers' start leaves many at zero and one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
            if "rel_attn_embed" in name:
                p.add_(torch.randn(p.shape, generator=generator))
        for name, b in model.named_buffers():
            if name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator))
    return model.eval()


def sound(seconds, seed=1):
    return np.random.default_rng(seed).standard_normal(round(16000 * seconds)).astype(np.float32)


def state(model):
    return {k: v.numpy() for k, v in model.state_dict().items()}


class Block(torch.nn.Module):
    """Convolution, ReLU, batch norm."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.conv = torch.nn.Conv1d(*args, **kwargs)
        self.bn = torch.nn.BatchNorm1d(args[1])

    def forward(self, x):
        return self.bn(self.conv(x).relu())


class Res2(torch.nn.Module):
    def __init__(self, width, dilation):
        super().__init__()
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(7)
        )
        self.bns = torch.nn.ModuleList(torch.nn.BatchNorm1d(width) for _ in range(7))


class SeRes2(torch.nn.Module):
    def __init__(self, channels, dilation):
        super().__init__()
        self.Conv1dReluBn1, self.Conv1dReluBn2 = (Block(channels, channels, 1) for _ in range(2))
        self.Res2Conv1dReluBn = Res2(channels // 8, dilation)
        self.SE_Connect = torch.nn.ModuleDict(
            dict(linear1=torch.nn.Linear(channels, 6), linear2=torch.nn.Linear(6, channels))
        )

    def forward(self, x):
        y = self.Conv1dReluBn1(x)
        pieces, last, outs = y.chunk(8, 1), None, []
        for i, (conv, norm) in enumerate(zip(self.Res2Conv1dReluBn.convs, self.Res2Conv1dReluBn.bns, strict=True)):  # fmt: skip
            last = norm(conv(pieces[i] if last is None else last + pieces[i]).relu())
            outs.append(last)
        y = self.Conv1dReluBn2(torch.cat([*outs, pieces[7]], 1))
        gate = self.SE_Connect["linear2"](self.SE_Connect["linear1"](y.mean(2)).relu()).sigmoid()
        return x + y * gate[..., None]


class Ecapa(torch.nn.Module):
    """The head as section 2 of Seed-TTS-eval's model card has it, with its names."""

    def __init__(self, cfg, channels=16, wide=24, out=10):
        super().__init__()
        self.feature_weight = torch.nn.Parameter(torch.zeros(cfg.num_hidden_layers + 1))
        self.layer1 = Block(cfg.hidden_size, channels, 5, padding=2)
        self.layer2, self.layer3, self.layer4 = (SeRes2(channels, d) for d in (2, 3, 4))
        self.conv = torch.nn.Conv1d(3 * channels, wide, 1)
        self.pooling = torch.nn.ModuleDict(
            dict(linear1=torch.nn.Conv1d(wide, 7, 1), linear2=torch.nn.Conv1d(7, wide, 1))
        )
        self.bn = torch.nn.BatchNorm1d(2 * wide)
        self.linear = torch.nn.Linear(2 * wide, out)

    def forward(self, states):
        x = (torch.stack(states) * self.feature_weight.softmax(0)[:, None, None, None]).sum(0)
        x = torch.nn.functional.instance_norm(x.transpose(1, 2) + 1e-6)
        x = self.layer1(x)
        outs = [x := layer(x) for layer in (self.layer2, self.layer3, self.layer4)]
        x = self.conv(torch.cat(outs, 1)).relu()
        share = self.pooling["linear2"](self.pooling["linear1"](x).tanh()).softmax(2)
        mean = (share * x).sum(2)
        deviation = ((share * x**2).sum(2) - mean**2).clamp(min=1e-9).sqrt()
        return self.linear(self.bn(torch.cat([mean, deviation], 1)))


def authors_names(tensors):
    """transformers' names -> the names that the published file has."""
    renamed = {}
    for name, value in tensors.items():
        for new, old in (
            ("feature_projection.layer_norm.", "layer_norm."),
            ("feature_projection.projection.", "post_extract_proj."),
            ("pos_conv_embed.conv.parametrizations.weight.original0", "pos_conv.0.weight_g"),
            ("pos_conv_embed.conv.parametrizations.weight.original1", "pos_conv.0.weight_v"),
            ("pos_conv_embed.conv.", "pos_conv.0."),
            (".attention.gru_rel_pos_linear.", ".self_attn.grep_linear."),
            (".attention.gru_rel_pos_const", ".self_attn.grep_a"),
            (".attention.rel_attn_embed.", ".self_attn.relative_attention_bias."),
            (".attention.", ".self_attn."),
            (".feed_forward.intermediate_dense.", ".fc1."),
            (".feed_forward.output_dense.", ".fc2."),
            ("masked_spec_embed", "mask_emb"),
        ):
            name = name.replace(new, old)
        if "encoder.layers." in name and ".layer_norm." in name and "final" not in name:
            name = name.replace(".layer_norm.", ".self_attn_layer_norm.")
        if "conv_layers" in name:
            name = name.replace(".conv.", ".0.").replace(".layer_norm.", ".2.1.")
        renamed[f"feature_extract.model.{name}"] = value
    return renamed


def test_seed_tts_evals_model_equals_torch():
    from transformers import WavLMModel

    cfg = config("large")
    backbone, head = shaken(WavLMModel(cfg)), shaken(Ecapa(cfg), 1)
    tensors = authors_names(state(backbone)) | state(head)
    tensors["loss_calculator.projection.weight"] = np.zeros(3, np.float32)
    weights = wavlm_speaker.arrange_ecapa(tensors, ours(cfg))
    for seconds in (0.7, 1.0):  # padded, and not
        x = sound(seconds)
        wave = torch.nn.functional.layer_norm(torch.from_numpy(x), x.shape)
        with torch.no_grad():
            out = backbone(wave[None], output_hidden_states=True)
            # The last one is the output: some transformers' list has it before its norm.
            want = head((*out.hidden_states[:-1], out.last_hidden_state))[0]
        got = wavlm_speaker.embed_ecapa(weights, ours(cfg), x)
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4 * float(want.abs().max()))


def test_xvector_equals_transformers():
    from transformers import WavLMForXVector

    cfg = config("base")
    model = shaken(WavLMForXVector(cfg))
    weights = wavlm_speaker.arrange_xvector(state(model), ours(cfg), tuple(cfg.tdnn_dilation), True)  # fmt: skip
    for seconds in (0.9, 1.0):
        x = sound(seconds)
        wave = torch.nn.functional.layer_norm(torch.from_numpy(x), x.shape)
        with torch.no_grad():
            want = model(wave[None]).embeddings[0]
        got = wavlm_speaker.embed_xvector(weights, ours(cfg), tuple(cfg.tdnn_dilation), x)
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.slow  # more than a gigabyte of ones
def test_the_published_sizes():
    """Every tensor of transformers' WavLM-large is taken, and has its place."""
    import jax
    from transformers import WavLMConfig, WavLMModel

    cfg = WavLMConfig(**dataclasses.asdict(wavlm.LARGE), intermediate_size=4096, conv_bias=False)
    with torch.device("meta"):
        model = WavLMModel(cfg)
    shapes = {k: np.broadcast_to(np.float32(1), v.shape) for k, v in model.state_dict().items()}
    weights = jax.eval_shape(lambda: wavlm.arrange(shapes, wavlm.LARGE))
    assert weights["layers.attention.q_proj.weight"].shape == (24, 1024, 1024)
    assert weights["position"].shape == (128, 64, 1024)
    assert weights["relative"].shape == (320, 16)


@pytest.mark.parametrize(("drop", "add", "message"), [("layer3.SE_Connect.linear1.bias", None, "lack layer3.SE_Connect"), (None, "novel.weight", "1 tensors that are not known, as novel.weight"), ("feature_extract.model.encoder.layers.1.fc1.weight", None, "lack encoder.layers.1.feed_forward"), (None, "feature_extract.model.novel", "not known, as novel")], ids=["head_lacks", "head_extra", "backbone_lacks", "backbone_extra"])  # fmt: skip
def test_other_weights_are_refused(drop, add, message):
    from transformers import WavLMModel

    cfg = config("large")
    tensors = authors_names(state(WavLMModel(cfg))) | state(Ecapa(cfg))
    tensors.pop(drop, None)
    if add:
        tensors[add] = np.zeros(2)
    with pytest.raises(ValueError, match=message):
        wavlm_speaker.arrange_ecapa(tensors, ours(cfg))


def test_the_hash_is_checked(tmp_path):
    (tmp_path / "other.pth").write_bytes(b"weights")
    with pytest.raises(ValueError, match="is not the published wavlm_large_finetune.pth"):
        judges.speaker(f"wavlm-large:{tmp_path / 'other.pth'}")


@pytest.mark.parametrize("name", ["wavlm-large", "wavlm-base-plus-sv"])
def test_what_is_missing_is_told(name, tmp_path):
    with pytest.raises(judges.MissingJudge, match="hf download"):
        judges.speaker(f"{name}:{tmp_path / 'absent'}")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_directory_of_the_hub_is_a_judge(form, tmp_path, voice_path):
    pytest.importorskip("faster_whisper", reason="its detector tells speech from noise")
    from safetensors.numpy import save_file
    from transformers import WavLMForXVector

    from chroma_jax.evaluation.judges.sound import read

    model = shaken(WavLMForXVector(config("base")))
    if form == "bin":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        save_file(state(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    judge = judges.speaker(f"wavlm-base-plus-sv:{tmp_path}")
    samples, rate = read(voice_path)
    voice = judge(samples[:rate], rate)
    assert judges.similarity(voice, judge(samples[:rate], rate)) == pytest.approx(1)
    assert judge(np.zeros(rate, np.float32), rate) is None
