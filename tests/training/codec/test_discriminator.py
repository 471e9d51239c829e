"""The discriminator against PyTorch's convolutions, and its losses against loops."""

import jax
import numpy as np
import torch
from flax import nnx

from chroma_jax.training.codec import discriminator as disc
from chroma_jax.training.codec.spectral import stft


def test_scores_and_features_are_torchs():
    network = disc.SpectrumDiscriminator(32, 3, rngs=nnx.Rngs(0))
    wave = np.random.default_rng(0).normal(size=(2, 200)).astype(np.float32)
    scores, features = jax.jit(lambda network, wave: network(wave))(network, wave)
    spectra = np.asarray(stft(wave, 32))
    x = torch.as_tensor(np.stack([spectra.real, spectra.imag], 1))
    layers = [*network.layers, network.last]
    for i, layer in enumerate(layers):
        kernel = torch.as_tensor(np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1).copy())
        height, width = kernel.shape[2:]
        x = torch.nn.functional.conv2d(
            x,
            kernel,
            torch.as_tensor(np.array(layer.bias[...])),
            stride=(1, layer.stride),
            padding=((height - 1) * layer.dilation // 2, width // 2),
            dilation=(layer.dilation, 1),
        )
        if i < len(layers) - 1:
            x = torch.nn.functional.leaky_relu(x, 0.2)
            want = x.permute(0, 2, 3, 1).numpy()
            np.testing.assert_allclose(features[i], want, atol=2e-5)
    np.testing.assert_allclose(scores, x[:, 0].numpy(), atol=2e-5)
    assert [layer.stride for layer in layers] == [1, 2, 2, 2, 1, 1]
    assert [layer.dilation for layer in layers] == [1, 1, 2, 4, 1, 1]


def test_losses():
    rng = np.random.default_rng(1)

    def judged():
        return [(rng.normal(size=(2, 3, 4)), [rng.normal(size=(2, 3, 4, 5))]) for _ in range(2)]

    real, made = judged(), judged()
    for row in range(2):
        hinge = feature = fools = 0.0
        for (r, (fr,)), (m, (fm,)) in zip(real, made, strict=True):
            hinge += np.maximum(1 - r[row], 0).mean() + np.maximum(1 + m[row], 0).mean()
            fools += np.maximum(1 - m[row], 0).mean()
            feature += np.abs(fr[row] - fm[row]).mean() / np.abs(fr[row]).mean()
        np.testing.assert_allclose(disc.discriminator_loss(real, made)[row], hinge / 2, rtol=1e-5)
        np.testing.assert_allclose(disc.adversarial_loss(made)[row], fools / 2, rtol=1e-5)
        np.testing.assert_allclose(disc.feature_loss(real, made)[row], feature / 2, rtol=1e-5)


def test_one_network_per_window():
    network = disc.Discriminator((16, 64), 2, rngs=nnx.Rngs(0))
    shapes = [scores.shape for scores, _ in jax.eval_shape(network, np.zeros((1, 128), np.float32))]
    assert shapes == [(1, 33, 2), (1, 9, 5)]
