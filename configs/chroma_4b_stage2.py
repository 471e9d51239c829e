r"""Chroma-4B, stage 2 of the paper (arXiv 2601.11141): the Backbone frozen, the Decoder alone trains, lambda = 1.

Begins from the model that stage 1 (configs/chroma_4b.py) wrote. The paper gives its hardware (8 H200), steps and hours for both stages
together and not for this one; everything but the stage is as in stage 1. No training with this file has been measured.

    python -m chroma_jax.train --config=configs/chroma_4b_stage2.py --workdir=runs/chroma_4b_stage2 \
        --config.data.train=data/train --config.model.checkpoint=runs/chroma_4b/model
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from chroma_jax.training.selection import STAGE_2


def get_config() -> ConfigDict:
    """The values of stage 1, and what differs."""
    stage_1 = pathlib.Path(__file__).with_name("chroma_4b.py")
    config = runpy.run_path(str(stage_1))["get_config"]()
    config.model.checkpoint = "runs/chroma_4b/model"
    config.model.start = "checkpoint"
    config.train.trains = STAGE_2
    config.train.decoder_weight = 1.0
    return config
