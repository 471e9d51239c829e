r"""Fine-tuning of Chroma-4B by LoRA on the blocks of Backbone and Decoder: a language, a domain, a way of speaking.

The paper fine-tunes nothing: rank, scale, rate and length are starting points of ours, and no training with this file has been measured.
Besides the frozen model it holds about a hundredth of the trained parameters of stage 1, and their moments. The factors are merged
into the model that it writes.

    python -m chroma_jax.prepare --manifest=data.jsonl --checkpoint=FlashLabs/Chroma-4B --out=data/mine
    python -m chroma_jax.train --config=configs/chroma_4b_lora.py --workdir=runs/mine --config.data.train=data/mine
    python -m chroma_jax.generate --checkpoint=runs/mine/model --question=question.wav --voice=reference.wav \
        --voice_text="What the reference says." --out=reply.wav
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from chroma_jax.training.selection import LORA_FINE_TUNING


def get_config() -> ConfigDict:
    """The values of stage 1, and what differs."""
    stage_1 = pathlib.Path(__file__).with_name("chroma_4b.py")
    config = runpy.run_path(str(stage_1))["get_config"]()
    steps = 2000
    config.model.start = "checkpoint"
    config.data.batch_size = 8
    config.data.train = "data/mine"
    config.train.trains = LORA_FINE_TUNING
    config.train.lora = ConfigDict(dict(rank=16, alpha=32.0))
    config.train.optimizer.update(
        learning_rate=2e-4,
        weight_decay=0.0,
        schedule="cosine",
        warmup_steps=50,
        total_steps=steps,
        final_fraction=0.1,
    )
    config.update(steps=steps, save_every=200, eval_every=200, sample_every=200)
    return config
