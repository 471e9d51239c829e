r"""A Mimi of the published sizes (79 million weights, 8 codebooks of 2048), trained on sound alone.

Reproduces: the recipe of Mimi (arXiv 2410.00037, section 3.3, and the table of hyper-parameters in its appendix) as far as it is
published: 128 crops of 12 s a step, AdamW at 8e-4 with betas (0.5, 0.9), weight decay 5e-2 in the transformers alone, EMA codebooks,
random depth of the acoustic codebooks, half of the rows unquantised, multi-scale STFT discriminators, distillation of code 0 from an
audio encoder (there WavLM, here the one of a Chroma's Reasoner). Loss weights are those of EnCodec, because Mimi's are not published. Mimi
sounded best with adversarial and feature losses alone: train.codec.mel_weight=0 and train.codec.wave_weight=0.

Hardware: 4 M steps in the paper, on 8 H100. One device holds far fewer than 128 crops: split them over a mesh, or accumulate.

    python -m chroma_jax.train --config=configs/mimi_codec.py --workdir=DIR --config.data.train=SOUND

With distillation, from the audio encoder of a Chroma: --config=configs/mimi_codec.py:CHROMA, a directory or Hub id.
"""

from ml_collections import ConfigDict

from chroma_jax.training.selection import codec_rules


def get_config(ears: str = "") -> ConfigDict:
    """The values; any may be changed on the command line, as in --config.data.batch_size=32.

    `ears`: a Chroma whose audio encoder code 0 learns from.
    """
    steps = 4_000_000
    optimizer = dict(
        learning_rate=8e-4,
        b1=0.5,
        b2=0.9,
        eps=1e-8,
        weight_decay=5e-2,
        clip_norm=None,
        schedule="constant",
        warmup_steps=1000,
        total_steps=steps,
    )
    return ConfigDict(
        dict(
            model=dict(size="mimi"),
            data=dict(
                train="data/sound",
                batch_size=128,
                num_shapes=1,
                crop_seconds=12.0,
                threads=16,
                prefetch=8,
            ),
            train=dict(
                objective="codec",
                optimizer=optimizer,
                trains=codec_rules(discriminator=True, distillation=bool(ears)),
                compute_dtype="bfloat16",
                mesh=dict(data=-1),
                codec=dict(
                    mel_windows=(64, 128, 256, 512, 1024, 2048),
                    mel_weight=2.0,
                    wave_weight=0.1,
                    commitment_weight=1.0,
                    quantizer_start=0,
                    k_means_batches=1,
                    k_means_rounds=50,
                    decay=0.99,
                    dead_below=0.1,
                    dead_every=5,
                    depth_fraction=1.0,
                    unquantized_fraction=0.5,
                    discriminator=dict(
                        windows=(2048, 1024, 512, 256, 128),
                        channels=32,
                        start=0,
                        adversarial_weight=4.0,
                        feature_weight=4.0,
                        optimizer=optimizer | dict(learning_rate=3e-4, weight_decay=0.0),
                    ),
                    distillation=dict(checkpoint=ears, weight=1.0) if ears else None,
                ),
            ),
            steps=steps,
            save_every=2000,
            eval_every=2000,
            log_every=100,
            keep=3,
            seed=0,
            sample_every=10_000,
            num_samples=5,
            sample_seconds=10.0,
        )
    )
