r"""A whole training in small, second stage: Backbone and Decoder learn to speak the answers to 24 spoken questions.

Reproduces nothing of the paper; it shows that every part works, on any machine, two CPU cores included. A model of 1.4 million
random weights learns 24 short answers of three voices by heart, in text (`debug_reasoner.py`) and in speech (this file), and
then speaks them back. From the repository's root (`make demo` does all of it):

    python -m chroma_jax.create --size=debug --manifest=configs/debug/data.jsonl --out=out/debug/start
    python -m chroma_jax.prepare --manifest=configs/debug/data.jsonl --checkpoint=out/debug/start --out=out/debug/data
    python -m chroma_jax.train --config=configs/debug_reasoner.py --workdir=out/debug/reasoner
    python -m chroma_jax.train --config=configs/debug.py --workdir=out/debug/speech
    python -m chroma_jax.generate --checkpoint=out/debug/speech/model --question=configs/debug/03-question.flac \
        --voice=configs/debug/00-slt.flac --voice_text="In the day the sky is blue." --out=out/debug/reply.wav

The text is the taught one and the codes are those of the taught recording, to the last frame. What they sound like is noise:
the Codec is random and never trained, and gives the recording itself back as noise too.
"""

from ml_collections import ConfigDict

from chroma_jax.training.selection import STAGE_1


def get_config() -> ConfigDict:
    """The values; any may be changed on the command line, as in --config.steps=100."""
    steps = 220
    return ConfigDict(
        dict(
            model=dict(checkpoint="out/debug/reasoner/model", size="debug"),
            data=dict(train="out/debug/data", batch_size=12, num_shapes=1, threads=2, prefetch=2),
            train=dict(
                objective="speech",
                optimizer=dict(
                    learning_rate=5e-3,
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
                trains=STAGE_1,
                decoder_weight=0.5,
                compute_dtype="float32",
                reasoner_dtype="float32",
                seed=0,
            ),
            steps=steps,
            save_every=110,
            eval_every=steps,
            log_every=20,
            keep=1,
            seed=0,
            sample_every=0,
            num_samples=2,
            sample_seconds=8.0,
        )
    )
