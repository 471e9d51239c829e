"""A codec of 12 samples a frame, what trains it, and batches of tones: the same for all tests of the objective."""

import dataclasses

import numpy as np
from small_training import optimizer

from chroma_jax.config import CodecConfig, tiny
from chroma_jax.data.crops import Crops
from chroma_jax.training import selection
from chroma_jax.training.config import CodecObjectiveConfig, DiscriminatorConfig, TrainConfig

FRAME, FRAMES, ROWS = 12, 16, 8


def codec_config(**changes) -> CodecConfig:
    values = dict(
        frame_rate=2000.0, hidden_size=16, num_filters=4, upsampling_ratios=(3, 2), kernel_size=5,
        upsample_groups=16, codebook_size=32, codebook_dim=8, quantizer_size=8, num_quantizers=4, num_layers=1,
        num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=24, sliding_window=8,
    )  # fmt: skip
    return dataclasses.replace(tiny().codec, **(values | changes))


def discriminator(**changes) -> DiscriminatorConfig:
    values = dict(
        windows=(16, 32), channels=3, start=2, adversarial_weight=1.0, feature_weight=2.0,
        optimizer=optimizer(learning_rate=3e-3),
    )  # fmt: skip
    return DiscriminatorConfig(**values | changes)


def train_config(loss=None, **changes) -> TrainConfig:
    values = dict(
        mel_windows=(16, 32), mel_weight=5.0, wave_weight=1.0, commitment_weight=0.25, quantizer_start=2,
        k_means_batches=2, k_means_rounds=4, decay=0.9, dead_below=0.1, dead_every=2, depth_fraction=0.5,
        unquantized_fraction=0.25,
    )  # fmt: skip
    loss = CodecObjectiveConfig(**values | (loss or {}))
    rules = selection.codec_rules(
        discriminator=loss.discriminator is not None, distillation=loss.distillation is not None
    )
    values = dict(optimizer=optimizer(), trains=rules, objective="codec", compute_dtype="float32", codec=loss)  # fmt: skip
    return TrainConfig(**values | changes)


def batch(number: int = 0, rows: int = ROWS) -> Crops:
    """Two tones a row, with a little noise."""
    rng = np.random.default_rng(number)
    t = np.arange(FRAMES * FRAME)
    pitch = rng.uniform(0.02, 0.6, (2, rows, 1))
    wave = 0.2 * np.sin(pitch[0] * t) + 0.1 * np.sin(pitch[1] * t + 1)
    wave = (wave + 0.01 * rng.normal(size=wave.shape)).astype(np.float32)
    return Crops(wave, np.full(rows, wave.shape[1], np.int32), np.arange(rows))
