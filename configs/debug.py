r"""A whole training in small: the tiny test model learns one spoken answer to two questions.

Reproduces nothing of the paper; it shows that every part works, on any machine, two CPU cores included. From the repository's root:

    python -m chroma_jax.prepare --manifest=configs/debug.jsonl --checkpoint=tests/data/chroma-tiny --out=out/debug/data
    python -m chroma_jax.train --config=configs/debug.py --workdir=out/debug/run
    python -m chroma_jax.generate --checkpoint=out/debug/run/model --question=tests/data/voice_librivox_0920.wav \
        --voice=tests/data/voice_librivox_0870.wav --voice_text="and mister john dashwood had then leisure to consider how much \
    there might be prudently in his power to do for them" --max_seconds=7 --out=out/debug/reply.wav

Both losses fall to nearly zero, in less than a minute. The test model's Reasoner and Codec are random: while answering it thinks
other words than those it was taught with, so the reply resembles the taught answer without being it, and it sounds like noise.
"""

from ml_collections import ConfigDict

from chroma_jax.training.selection import STAGE_1


def get_config() -> ConfigDict:
    """The values; any may be changed on the command line, as in --config.steps=100."""
    steps = 100
    return ConfigDict(
        dict(
            model=dict(checkpoint="tests/data/chroma-tiny", size="tiny"),
            data=dict(train="out/debug/data", batch_size=2, num_shapes=1, threads=2, prefetch=2),
            train=dict(
                optimizer=dict(
                    learning_rate=1e-2,
                    b1=0.9,
                    b2=0.95,
                    eps=1e-8,
                    weight_decay=0.0,
                    clip_norm=1.0,
                    schedule="cosine",
                    warmup_steps=5,
                    total_steps=steps,
                    final_fraction=0.1,
                ),
                trains=STAGE_1,
                decoder_weight=0.5,
                compute_dtype="float32",
                reasoner_dtype="float32",
                seed=0,
            ),
            steps=steps,
            save_every=20,
            eval_every=20,
            log_every=10,
            keep=2,
            seed=0,
        )
    )
