"""The objectives of dialogues: speech (Backbone and Decoder on the answers' codes) and text (the Reasoner on their tokens).

Axes: B batch, N prompt tokens, L answer tokens, T frames, Q codebooks, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from chroma_jax import schedule
from chroma_jax.config import ChromaConfig
from chroma_jax.data import batch as batches
from chroma_jax.data.batch import Batch
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.training import losses, optim
from chroma_jax.training.config import TEXT, TrainConfig


def reasoner_states(model: ChromaModel, batch: Batch) -> jax.Array:
    """The Reasoner over question and answer, teacher-forced: its state [B, L, D] before each answer token."""
    features = None
    if batch.chunks.shape[1]:
        features = model.reasoner.encode_audio(batch.chunks, batch.chunk_lengths)
    states = model.reasoner(batch.prompt_ids, features)
    at = batch.prompt_lengths[:, None] - 1 + jnp.arange(batch.text.shape[1])
    at = jnp.clip(at, 0, states.shape[1] - 1)
    return jnp.take_along_axis(states, at[..., None], axis=1)


def check_hidden(precomputed: bool) -> None:
    """Raises ValueError for Reasoner states computed beforehand, where the Reasoner trains."""
    if precomputed:
        raise ValueError(
            f"objective {TEXT!r} trains the Reasoner, but the data holds Reasoner states computed beforehand: prepare it "
            "without --precompute_hidden"
        )


class _Dialogue:
    """What both have in common. `_remat` is what of the model trains, and so rematerialises."""

    def __init__(self, cfg: ChromaConfig, train_cfg: TrainConfig):
        if cfg.quantized is not None:
            raise ValueError(
                f"a model quantised to {cfg.quantized} cannot be trained; start from the checkpoint that it was made from"
            )
        self.train_cfg = train_cfg
        # Computing in compute_dtype, what trains is held in float32.
        self.cfg = cfg.with_dtype(train_cfg.compute_dtype, "float32")

    def model(self, rngs: nnx.Rngs) -> ChromaModel:
        return ChromaModel(self.cfg, rngs=rngs)

    def computing(self, rngs: nnx.Rngs) -> ChromaModel:
        return ChromaModel(self._rematerialised(), rngs=rngs)

    def cast(self, path: str, array: jax.Array) -> jax.Array:
        # The Codec is not run; norms are computed in float32 and take their scales so.
        whole = path.startswith("codec/") or path.endswith("scale")
        return array if whole else array.astype(self.train_cfg.compute_dtype)

    def optimizer(self) -> optax.GradientTransformation:
        return optim.make_optimizer(self.train_cfg.optimizer)

    def check(self, batch: Batch) -> None:
        batches.check(batch)

    def follow(self, averages: Mapping[str, jax.Array], sums: Any, step: jax.Array) -> dict:
        return dict(averages)

    def preparations(self, step: int) -> tuple:
        return ()

    def _hidden(self, model: ChromaModel, batch: Batch) -> jax.Array:
        return reasoner_states(model, batch) if batch.hidden is None else batch.hidden


class Speech(_Dialogue):
    """The paper's losses, over a frozen Reasoner."""

    stages = ("backbone", "decoder")

    def __init__(self, cfg: ChromaConfig, train_cfg: TrainConfig):
        super().__init__(cfg, train_cfg)
        # The frozen Reasoner is held in reasoner_dtype.
        reasoner = cfg.with_dtype(train_cfg.compute_dtype, train_cfg.reasoner_dtype).reasoner
        self.cfg = dataclasses.replace(self.cfg, reasoner=reasoner)

    def draw(self, step: jax.Array, batch: Batch) -> losses.Draw | None:
        """Frames for the Decoder's loss."""
        fraction = self.train_cfg.decoder_fraction
        if fraction == 1:
            return None
        key = jax.random.fold_in(jax.random.key(self.train_cfg.seed), step)
        return losses.draw_frames(key, batch.frame_lengths, batch.frames.shape[1], fraction)

    def count(self, batch: Batch, draw: losses.Draw | None) -> jax.Array:
        """Frames per codebook [Q]."""
        counts = losses.valid_frames(batch.frame_lengths, batch.frames.shape[1]).sum()
        drawn = counts if draw is None else draw.counts.sum()
        books = jnp.arange(batch.frames.shape[2])
        return jnp.where(books == 0, counts, drawn).astype(jnp.float32)

    def sums(self, model: ChromaModel, batch: Batch, draw: losses.Draw | None) -> losses.Sums:
        # The Reasoner is frozen: nothing to differentiate.
        hidden = jax.lax.stop_gradient(self._hidden(model, batch))
        return losses.dialogue_sums(model, batch.dialogue(hidden), draw)

    def share(self, sums: losses.Sums, count: jax.Array) -> jax.Array:
        return losses.weighted(sums, count, self.train_cfg.decoder_weight)

    def metrics(self, sums: losses.Sums) -> dict[str, jax.Array]:
        return losses.metrics(sums, self.train_cfg.decoder_weight)

    def positions(self, batch: Batch) -> int:
        """The Backbone's: voices, text (two each), frames."""
        text = np.minimum(batch.text_lengths, -(-batch.frame_lengths // schedule.FRAMES_PER_TEXT))
        lengths = (batch.voice_id_lengths, batch.voice_frame_lengths, text, batch.frame_lengths)
        return int(schedule.total_length(*lengths)[batch.frame_lengths > 0].sum())

    def describe(self, metrics: Mapping[str, float]) -> str:
        """Codes are the losses per codebook."""
        books = sum(key.startswith("loss/code_") for key in metrics)
        codes = " ".join(f"{metrics[f'loss/code_{i}']:.2f}" for i in range(books))
        return (
            f"loss {metrics['loss']:.4f}  backbone {metrics['backbone_loss']:.4f}  "
            f"decoder {metrics['decoder_loss']:.4f}  codes {codes}  "
            f"accuracy {metrics['backbone_accuracy']:.3f} {metrics['decoder_accuracy']:.3f}"
        )

    def _rematerialised(self) -> ChromaConfig:
        replace, remat, cfg = dataclasses.replace, self.train_cfg.remat, self.cfg
        return replace(
            cfg,
            backbone=replace(cfg.backbone, llama=replace(cfg.backbone.llama, remat=remat)),
            decoder=replace(cfg.decoder, llama=replace(cfg.decoder.llama, remat=remat)),
        )


class Text(_Dialogue):
    """The cross entropy of the Reasoner's answer tokens."""

    stages = ("reasoner",)

    def check(self, batch: Batch) -> None:
        super().check(batch)
        check_hidden(batch.hidden is not None)

    def draw(self, step: jax.Array, batch: Batch) -> None:
        return None

    def count(self, batch: Batch, draw: None) -> jax.Array:
        """Tokens [1]."""
        return batch.text_lengths.sum()[None].astype(jnp.float32)

    def sums(self, model: ChromaModel, batch: Batch, draw: None) -> losses.Sums:
        logits = model.reasoner.logits(self._hidden(model, batch))
        return losses.text_sums(logits, batch.text, batch.text_lengths)

    def share(self, sums: losses.Sums, count: jax.Array) -> jax.Array:
        return losses.text_share(sums, count)

    def metrics(self, sums: losses.Sums) -> dict[str, jax.Array]:
        return losses.text_metrics(sums)

    def positions(self, batch: Batch) -> int:
        """The Reasoner's: questions and answers."""
        return int((batch.prompt_lengths + batch.text_lengths)[batch.text_lengths > 0].sum())

    def describe(self, metrics: Mapping[str, float]) -> str:
        return f"text loss {metrics['text_loss']:.4f}  accuracy {metrics['text_accuracy']:.3f}"

    def _rematerialised(self) -> ChromaConfig:
        text = dataclasses.replace(self.cfg.reasoner.text, remat=self.train_cfg.remat)
        return dataclasses.replace(
            self.cfg, reasoner=dataclasses.replace(self.cfg.reasoner, text=text)
        )
