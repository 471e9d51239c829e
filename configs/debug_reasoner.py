r"""A whole training in small, first stage: a random Reasoner learns to answer 24 spoken questions, in text.

The paper takes a Reasoner that can think already (Qwen2.5-Omni's Thinker). This stage is how one that is made from random weights learns
what to answer; `debug.py`, which says more, then teaches a Backbone and a Decoder to speak it. From the repository's root:

    python -m chroma_jax.create --size=debug --manifest=configs/debug/data.jsonl --out=out/debug/start
    python -m chroma_jax.prepare --manifest=configs/debug/data.jsonl --checkpoint=out/debug/start --out=out/debug/data
    python -m chroma_jax.train --config=configs/debug_reasoner.py --workdir=out/debug/reasoner
"""

from ml_collections import ConfigDict

from chroma_jax.training.selection import REASONER


def get_config() -> ConfigDict:
    """The values; any may be changed on the command line, as in --config.steps=100."""
    steps = 150
    return ConfigDict(
        dict(
            model=dict(checkpoint="out/debug/start", size="debug"),
            data=dict(train="out/debug/data", batch_size=12, num_shapes=1, threads=2, prefetch=2),
            train=dict(
                objective="text",
                optimizer=dict(
                    learning_rate=4e-3,
                    b1=0.9,
                    b2=0.95,
                    eps=1e-8,
                    weight_decay=0.0,
                    clip_norm=1.0,
                    schedule="cosine",
                    warmup_steps=10,
                    total_steps=steps,
                    final_fraction=0.05,
                ),
                trains=REASONER,
                compute_dtype="float32",
                reasoner_dtype="float32",
                seed=0,
            ),
            steps=steps,
            save_every=75,
            eval_every=steps,
            log_every=25,
            keep=1,
            seed=0,
        )
    )
