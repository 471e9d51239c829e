r"""Chroma-4B, stage 1 of the paper (arXiv 2601.11141): Backbone and Decoder train together, lambda = 0.5.

The paper: AdamW, learning rate 5e-5, gradients clipped to norm 1.0, 4 dialogues per device on 8 H200, 100,000 steps, about 6 hours.
It gives those figures for the whole training and does not say how the steps divide over its two stages; this file takes all of
them. What it does not say is PyTorch's default (betas, epsilon, weight decay) or ours: a constant rate after 1000 steps of warm-up,
bfloat16 arithmetic over float32 master weights, the longest records, rematerialisation. No training with this file has been measured.

    python -m chroma_jax.prepare --manifest=data.jsonl --checkpoint=FlashLabs/Chroma-4B --out=data/train
    python -m chroma_jax.train --config=configs/chroma_4b.py --workdir=runs/chroma_4b --config.data.train=data/train

The rows of a step are 32, over all devices; a mesh of more devices wants more: --config.data.batch_size=256. The mesh is all
devices on "fsdp": --config.train.mesh.tensor=4 splits heads as well. What it needs of a TPU slice, without one:

    python -m chroma_jax.train --config=configs/chroma_4b.py --compile_only=v5p:2x2x4
"""

from ml_collections import ConfigDict

from chroma_jax.training.selection import STAGE_1


def get_config() -> ConfigDict:
    """The values; any may be changed on the command line, as in --config.steps=1000."""
    steps = 100_000
    return ConfigDict(
        dict(
            # Reasoner and Codec are the published ones; start="checkpoint" goes on from its Backbone and Decoder, too.
            model=dict(checkpoint="FlashLabs/Chroma-4B", start="random", size="chroma_4b"),
            data=dict(
                train="data/train",
                evaluation="",  # held-out records, prepared likewise
                batch_size=32,
                num_shapes=4,
                # Questions of 32 s, answers of 41 s; with voices of 10 s that is 1283 of the Backbone's 2048 positions.
                max_prompt=1280,
                max_chunks=16,
                max_text=256,
                max_frames=512,
                on_long="drop",
                threads=16,
                prefetch=16,
                workers=0,
            ),
            train=dict(
                optimizer=dict(
                    learning_rate=5e-5,
                    b1=0.9,
                    b2=0.999,
                    eps=1e-8,
                    weight_decay=0.01,
                    clip_norm=1.0,
                    schedule="constant",
                    warmup_steps=1000,
                    total_steps=steps,
                    final_fraction=0.0,
                ),
                trains=STAGE_1,
                decoder_weight=0.5,
                decoder_fraction=1.0,
                accumulation=1,
                compute_dtype="bfloat16",
                reasoner_dtype="bfloat16",
                remat="full",
                seed=0,
                mesh=dict(data=1, fsdp=-1, tensor=1),
            ),
            steps=steps,
            save_every=1000,
            eval_every=1000,
            log_every=20,
            keep=3,
            seed=0,
            sample_every=5000,
            num_samples=4,
            sample_seconds=20.0,
        )
    )
