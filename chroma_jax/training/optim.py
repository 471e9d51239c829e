"""AdamW, its learning rate and its weight-decay mask."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chroma_jax.training.config import OptimizerConfig

# Scales of norms, biases, and rows of embeddings are not pulled towards zero.
NOT_DECAYED = r"(^|/)(scale|bias|[a-z0-9]+_bias|audio_embedding|embedding)$"


def learning_rate(cfg: OptimizerConfig) -> Callable[[jax.Array], jax.Array]:
    """Step (from 0) -> learning rate. The first step of a warm-up already moves: it uses 1 / warmup_steps."""

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rising = (step + 1) / max(cfg.warmup_steps, 1)
        if cfg.schedule == "cosine":
            done = (step - cfg.warmup_steps) / (cfg.total_steps - cfg.warmup_steps)
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
            falling = cfg.final_fraction + (1 - cfg.final_fraction) * cosine
        else:
            falling = jnp.ones(())
        return cfg.learning_rate * jnp.where(step < cfg.warmup_steps, rising, falling)

    return rate


def decayed(params: Any) -> Any:
    """True for every parameter that weight decay applies to."""

    def one(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return re.search(NOT_DECAYED, name) is None

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(
    cfg: OptimizerConfig, decayed: Callable[[Any], Any] = decayed
) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, learning rate, in this order. Moments are float32, as the parameters are.

    `decayed`: parameters -> True for each that weight decay applies to.
    """
    # The state of both is alike, so that a run may go on with another norm, or with none.
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(cfg)),
    )
