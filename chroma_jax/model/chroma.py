"""The four stages together."""

from __future__ import annotations

import jax
from flax import nnx

from chroma_jax.config import ChromaConfig
from chroma_jax.model.backbone import Backbone
from chroma_jax.model.codec.mimi import Codec
from chroma_jax.model.decoder import Decoder
from chroma_jax.model.quantized import quantize_in_place
from chroma_jax.model.reasoner import Reasoner


class ChromaModel(nnx.Module):
    """Chroma 1.0: Reasoner, Backbone, Decoder, Codec, as one tree of parameters.

    The stages know nothing of each other; `chroma_jax.schedule` lays out the Backbone's sequence and
    `chroma_jax.generation` runs the system.
    """

    def __init__(self, cfg: ChromaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.reasoner = Reasoner(cfg.reasoner, rngs=rngs)
        self.backbone = Backbone(cfg.backbone, rngs=rngs)
        self.decoder = Decoder(cfg.decoder, rngs=rngs)
        self.codec = Codec(cfg.codec, rngs=rngs)
        if cfg.quantized is not None:
            quantize_in_place(self, cfg.quantized)


def abstract_model(cfg: ChromaConfig) -> ChromaModel:
    """The model with jax.ShapeDtypeStruct in place of every parameter: shapes without memory."""
    return nnx.eval_shape(lambda: ChromaModel(cfg, rngs=nnx.Rngs(0)))


def random_model(cfg: ChromaConfig, seed: int = 0) -> ChromaModel:
    """A model with random weights, made on the default device."""
    # A program that draws each parameter runs once: on a CPU, to optimise it takes half a minute and gains nothing.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    make = jax.jit(lambda key: ChromaModel(cfg, rngs=nnx.Rngs(key)), compiler_options=options)
    return make(jax.random.key(seed))
