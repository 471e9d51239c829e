r"""Backbone and Decoder of the small Chroma: they learn to speak answers in the voice of a prompt. Two CPU cores train it.

The Reasoner's states are computed beforehand (--precompute_hidden): it is frozen, and never runs here. After `mini_reasoner.py`:

    python -m chroma_jax.prepare --manifest=out/mini/dialogue/train.jsonl --checkpoint=out/mini/reasoner/model \
        --precompute_hidden --out=out/mini/speech-train
    python -m chroma_jax.prepare --manifest=out/mini/dialogue/validation.jsonl --checkpoint=out/mini/reasoner/model \
        --precompute_hidden --out=out/mini/speech-validation
    python -m chroma_jax.train --config=configs/mini_speech.py --workdir=out/mini/speech
"""

from ml_collections import ConfigDict

from chroma_jax.training.selection import STAGE_1


def get_config() -> ConfigDict:
    """The values; any may be changed on the command line, as in --config.steps=100."""
    steps = 12000
    return ConfigDict(
        dict(
            model=dict(checkpoint="out/mini/reasoner/model", size="mini"),
            data=dict(
                train="out/mini/speech-train",
                evaluation="out/mini/speech-validation",
                batch_size=16,
                num_shapes=3,
                max_text=48,
                max_frames=128,
                on_long="drop",
                threads=1,
                prefetch=4,
            ),
            train=dict(
                objective="speech",
                optimizer=dict(
                    learning_rate=1e-3,
                    b1=0.9,
                    b2=0.98,
                    eps=1e-8,
                    weight_decay=0.02,
                    clip_norm=1.0,
                    schedule="cosine",
                    warmup_steps=200,
                    total_steps=steps,
                    final_fraction=0.05,
                ),
                trains=STAGE_1,
                decoder_weight=0.5,
                compute_dtype="float32",
                reasoner_dtype="float32",
                seed=0,
            ),
            steps=steps,
            save_every=100,
            eval_every=500,
            log_every=20,
            keep=2,
            seed=0,
            sample_every=1000,
            num_samples=5,
            sample_seconds=6.0,
        )
    )
