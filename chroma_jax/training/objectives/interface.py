"""What the training step asks of an objective.

The step (`training/step.py`) knows gradients, microbatches, optimizers and meshes; an objective knows its model, its batches and
its loss. A loss is kept as sums that add over microbatches and shards; its `share` of the whole batch's loss is what is
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import optax
from flax import nnx

from chroma_jax.config import ChromaConfig, CodecConfig
from chroma_jax.training.config import CODEC, TEXT, TrainConfig


class Preparation(NamedTuple):
    """What an objective does to the state before a step, from the first `batches` of training."""

    batches: int
    gather: Callable[[nnx.Module, Any], Any]  # model, batch -> arrays, rows first
    finish: Callable[[nnx.Module, list[Any]], dict[str, jax.Array]]  # -> parameters by path


class Objective(Protocol):
    """One way to train. Everything but `check`, `positions` and `describe` runs inside jit.

    Attributes:
      stages: the parts of the model (first components of parameter paths) that its loss reaches.
      cfg: the model's configuration in the dtypes of training.
    """

    stages: tuple[str, ...]
    cfg: ChromaConfig | CodecConfig

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """All parameters, random, as they are held."""

    def computing(self, rngs: nnx.Rngs) -> nnx.Module:
        """The same parameters in the model that computes the loss (rematerialised, say)."""

    def cast(self, path: str, array: jax.Array) -> jax.Array:
        """A parameter as the loss computes with it."""

    def optimizer(self) -> optax.GradientTransformation:
        """What moves the parameters that train."""

    def check(self, batch: Any) -> None:
        """Raises ValueError for a host batch that it cannot train on."""

    def draw(self, step: jax.Array, batch: Any) -> Any:
        """What a step draws for a whole batch, rows first, or None: the same whatever the accumulation or the mesh."""

    def count(self, batch: Any, draw: Any) -> jax.Array:
        """What the loss of a whole batch is the mean over."""

    def sums(self, model: nnx.Module, batch: Any, draw: Any) -> Any:
        """The sums of a microbatch; without a draw, those of an evaluation."""

    def share(self, sums: Any, count: jax.Array) -> jax.Array:
        """A microbatch's share of the loss, where `count` is that of the whole batch."""

    def metrics(self, sums: Any) -> dict[str, jax.Array]:
        """Scalars of a batch, "loss" among them."""

    def follow(
        self, averages: Mapping[str, jax.Array], sums: Any, step: jax.Array
    ) -> dict[str, jax.Array]:
        """Parameters under an "average" rule after a step, from the whole batch's sums."""

    def preparations(self, step: int) -> Sequence[Preparation]:
        """What is done before step `step`, in this order; mostly nothing."""

    def positions(self, batch: Any) -> int:
        """How much of a host batch is no padding: what "tokens per second" counts."""

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The metrics in short."""


def make_objective(cfg: ChromaConfig | CodecConfig, train_cfg: TrainConfig) -> Objective:
    """The objective that the stage names. Raises ValueError for a model that it cannot train."""
    if train_cfg.objective == CODEC:
        from chroma_jax.training.objectives.codec import Codec

        return Codec(cfg, train_cfg)
    from chroma_jax.training.objectives.dialogue import Speech, Text

    return Text(cfg, train_cfg) if train_cfg.objective == TEXT else Speech(cfg, train_cfg)
