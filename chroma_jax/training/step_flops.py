"""Floating-point operations that a training step needs, for MFU."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from chroma_jax.cost.flops import flops
from chroma_jax.data.batch import Batch
from chroma_jax.training.step import Trainer, build


class StepFlops:
    """Operations of a training step on a batch over all processes and devices, remat not counted: those that the model needs.

    The step is traced once for each shape of batch.
    """

    def __init__(self, trainer: Trainer):
        self._trainer, self._plain = trainer, None
        self._known: dict[Any, int] = {}

    def __call__(self, batch: Batch) -> int:
        """`batch`: this process's rows, as arrays on the host."""
        rows = batch.rows * jax.process_count()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), np.asarray(x).dtype),
            batch.needed(),
        )
        key = tuple((x.shape, x.dtype) for x in jax.tree.leaves(shapes))
        if key not in self._known:
            if self._plain is None:
                cfg = dataclasses.replace(self._trainer.train_cfg, remat="none", mesh=None)
                self._plain = build(self._trainer.cfg, cfg)
            self._known[key] = flops(self._plain._train, *self._plain.abstract(), shapes)
        return self._known[key]
