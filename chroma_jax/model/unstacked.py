"""Layers as modules of their own instead of one stack: the same numbers, for generation where slices of a stack cost.

A scan over stacked layers compiles one body, but takes each layer's weights out of the stack, and where the compiler makes a copy of
them (XLA on CPUs does, for every product) one token costs three passes over the weights instead of one. Training, checkpoints
and sharding rules know stacks only.

Axes: L layers.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from chroma_jax.model.chroma import ChromaModel


def arranged(model: ChromaModel, layers: str | None = None) -> ChromaModel:
    """The model with layers "apart" or "stacked"; None for what is faster where the model is, as far as that was measured.

    That is apart on one CPU device in float32 (1.4 times at 100 million weights; in eight bits it is several times slower), and
    stacked, which compiles in a fraction of the time, everywhere else.

    Raises:
      ValueError: another word.
    """
    if layers not in (None, "apart", "stacked"):
        raise ValueError(f'layers must be "apart" or "stacked", got {layers!r}')
    if layers is None:
        plain = model.cfg.quantized is None and model.cfg.backbone.llama.dtype == "float32"
        devices = jax.tree.leaves(model)[0].devices()
        on_cpu = len(devices) == 1 and next(iter(devices)).platform == "cpu"
        layers = "apart" if plain and on_cpu else "stacked"
    return unstacked(model) if layers == "apart" else model


def unstacked(model: ChromaModel) -> ChromaModel:
    """The model with the layers of its three LLaMAs apart. Quantise first: the rules of `quantized` are those of stacks.

    Pure: the given model stays as it is, and everything but those layers is shared with it.
    """
    copy = nnx.merge(*nnx.split(model))
    for stage in (copy.reasoner, copy.backbone, copy.decoder):
        stage.llama.layers = _apart(stage.llama.layers)
    return copy


def _apart(stack: nnx.Module) -> nnx.List:
    graphdef, state = nnx.split(stack)
    return nnx.List([nnx.merge(graphdef, part) for part in _slices(state)])


@jax.jit
def _slices(stack: Any) -> list[Any]:
    count = len(jax.tree.leaves(stack)[0])
    return [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(count)]
