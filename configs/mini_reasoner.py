r"""The Reasoner of the small Chroma: it learns to hear a question about a small world and to answer it, in text.

Its ears are the first four layers of Whisper base and stay as they are; what follows them, 5.8 million weights, is trained from random ones.
The data, and the checkpoint that it begins with (`make mini` does all of it, see docs/synthesis.md):

    python -m chroma_jax.synthesize --config=configs/synthesis/mini_dialogue.py --out=out/mini/dialogue
    python -m chroma_jax.train --config=configs/mini_codec.py --workdir=out/mini/codec \
        --config.data.train=out/mini/dialogue/sounds.jsonl
    python -m chroma_jax.create --size=mini --vocab_size=2048 --ears=whisper-base --codec=out/mini/codec/model \
        --manifest=out/mini/dialogue/train.jsonl --out=out/mini/start
    python -m chroma_jax.prepare --manifest=out/mini/dialogue/train.jsonl --checkpoint=out/mini/start --out=out/mini/train
    python -m chroma_jax.prepare --manifest=out/mini/dialogue/validation.jsonl --checkpoint=out/mini/start --out=out/mini/validation
    python -m chroma_jax.train --config=configs/mini_reasoner.py --workdir=out/mini/reasoner
"""

from ml_collections import ConfigDict

# What a Whisper brought with it stays; see `chroma_jax.checkpoint.whisper`.
_BEHIND_THE_EARS = (
    (r"reasoner/audio_encoder/(conv.*|layers/.*)", "freeze"),
    (r"reasoner/audio_encoder/(norm|projection|unused).*", "train"),
    (r"reasoner/(embedding|head|llama/.*)", "train"),
    (r"(backbone|decoder|codec)/.*", "freeze"),
)


def get_config() -> ConfigDict:
    """The values; any may be changed on the command line, as in --config.steps=100."""
    steps = 8000
    return ConfigDict(
        dict(
            model=dict(checkpoint="out/mini/start", size="mini"),
            data=dict(
                train="out/mini/train",
                evaluation="out/mini/validation",
                batch_size=16,
                num_shapes=3,
                max_chunks=8,
                max_text=48,
                on_long="drop",
                threads=1,
                prefetch=4,
            ),
            train=dict(
                objective="text",
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
                trains=_BEHIND_THE_EARS,
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
        )
    )
