r"""The Codec of the small Chroma: 3.2 million weights, 8 codebooks of 512, trained on the sound of a few synthetic voices.

Reproduces nothing of a paper: the smallest Mimi that may be understood, made where there is no accelerator. A thousand steps without the
quantizer, then codebooks by k-means on the latents of 160 batches, then all of it.

Hardware: two CPU cores. A step of four crops of 0.96 s took 0.55 seconds of CPU time there while others worked beside it, so the 60,000
steps are about nine hours of one core. From the repository's root, with mono or stereo sound of any rate:

    python -m chroma_jax.train --config=configs/mini_codec.py --workdir=out/mini/codec --config.data.train=SOUND
"""

from ml_collections import ConfigDict

from chroma_jax.training.selection import codec_rules


def get_config() -> ConfigDict:
    """The values; any may be changed on the command line, as in --config.steps=100."""
    steps = 60_000
    return ConfigDict(
        dict(
            model=dict(size="mini"),
            data=dict(
                train="out/mini/dialogue/sounds.jsonl",
                batch_size=4,
                num_shapes=1,
                crop_seconds=0.96,
                gain_db=6.0,
                speed=0.08,
                threads=1,
                prefetch=8,
            ),
            train=dict(
                objective="codec",
                optimizer=dict(
                    learning_rate=1e-3,
                    b1=0.8,
                    b2=0.99,
                    eps=1e-8,
                    weight_decay=0.0,
                    clip_norm=10.0,
                    schedule="constant",
                    warmup_steps=50,
                    total_steps=steps,
                ),
                trains=codec_rules(),
                compute_dtype="float32",
                codec=dict(
                    mel_windows=(64, 128, 256, 512, 1024, 2048),
                    mel_weight=15.0,
                    wave_weight=1.0,
                    commitment_weight=0.25,
                    quantizer_start=1000,
                    k_means_batches=160,
                    k_means_rounds=20,
                    decay=0.995,
                    dead_below=0.1,
                    dead_every=5,
                ),
            ),
            steps=steps,
            save_every=100,
            eval_every=1000,
            log_every=20,
            keep=3,
            seed=0,
            sample_every=1000,
            num_samples=5,
            sample_seconds=5.0,
        )
    )
