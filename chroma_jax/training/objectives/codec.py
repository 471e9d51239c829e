"""The objective of a Codec: sound that sounds the same after it has been codes.

    loss = mel_weight * mel distance + wave_weight * L1 + commitment_weight * commitment
           (+ adversarial_weight * adversarial + feature_weight * feature)

Codec and discriminator take one step together: each loss is cut off from the parameters that it is not for. Codebooks
follow averages. The codec learns without the quantizer first; then codebooks are made by k-means on what it encodes.

Axes: B batch, N samples, T frames, D latent width, Q codebooks. Sources: `training/codec/`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from chroma_jax.checkpoint import params as parameters
from chroma_jax.checkpoint import read_config, resolve_source
from chroma_jax.config import AudioEncoderConfig, CodecConfig
from chroma_jax.data.crops import Crops
from chroma_jax.model import codec as codecs
from chroma_jax.model.audio_encoder import AudioEncoder
from chroma_jax.model.codec.seanet import Elu, ResidualBlock
from chroma_jax.model.layers import normal
from chroma_jax.training import optim
from chroma_jax.training.codec import discriminator as disc
from chroma_jax.training.codec.quantization import (
    BookSums,
    Codebooks,
    begin_codebooks,
    draw_slots,
    follow,
    quantize,
)
from chroma_jax.training.codec.spectral import mel_distance
from chroma_jax.training.config import TrainConfig
from chroma_jax.training.objectives.interface import Preparation

_QUANTIZERS = ("semantic", "acoustic")
FEATURES_PER_SECOND = 25  # of the audio encoder
# Of the codec, as Mimi decays.
_DECAYED = r"codec/(encoder|decoder)_transformer/layers/(q|k|v|o|up|down)"
_LEVEL = 0.05  # root mean square of what an untrained codec gives


class Distillation(nnx.Module):
    """The linear map from the semantic codebooks' latents to an audio encoder's features."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = normal(rngs, inputs, outputs, dtype="float32", std=inputs**-0.5)

    def __call__(self, semantic: jax.Array, features: jax.Array) -> jax.Array:
        """Latents [B, T, D] and features [B, T, E] -> 1 - cosine, mean over frames [B]."""
        mapped = semantic @ self.kernel[...]
        norms = jnp.linalg.norm(mapped, axis=-1) * jnp.linalg.norm(features, axis=-1)
        return (1 - (mapped * features).sum(-1) / jnp.maximum(norms, 1e-6)).mean(-1)


class CodecModel(nnx.Module):
    """A Codec and, where the objective has them, its discriminator, and the audio encoder that it learns from."""

    def __init__(
        self,
        cfg: CodecConfig,
        train_cfg: TrainConfig,
        ears: AudioEncoderConfig | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.codec = codecs.Codec(cfg, rngs=rngs)
        wanted = train_cfg.codec.discriminator
        self.discriminator = wanted and disc.Discriminator(
            wanted.windows, wanted.channels, rngs=rngs
        )
        self.audio_encoder = ears and AudioEncoder(ears, rngs=rngs)
        self.distillation = ears and Distillation(cfg.hidden_size, ears.output_size, rngs=rngs)


class CodecDraw(NamedTuple):
    """What a step draws."""

    active: jax.Array  # [B, Q] bool, codebooks that a row uses
    unquantized: jax.Array  # [B] bool, rows whose latents pass as they are
    slots: jax.Array  # [B, T] int32, see `quantization.quantize`
    listens: jax.Array  # [B] bool, whether the codec hears the discriminator yet


class CodecSums(NamedTuple):
    """Sums over rows; `books` over frames. They add."""

    rows: jax.Array  # []
    frames: jax.Array  # []
    mel: jax.Array  # []
    wave: jax.Array  # []
    commitment: jax.Array  # [], per frame, sum over codebooks
    adversarial: jax.Array  # [], before the switch
    feature: jax.Array  # []
    discriminator: jax.Array  # []
    distillation: jax.Array  # []
    listened: jax.Array  # [], adversarial and feature losses as they count
    books: BookSums


class Codec:
    """See above."""

    stages = ("codec", "discriminator", "distillation")

    def __init__(self, cfg: CodecConfig, train_cfg: TrainConfig):
        if not isinstance(cfg, CodecConfig):
            raise ValueError(f"objective 'codec' trains a Codec alone, got a {type(cfg).__name__}")
        dtype = train_cfg.compute_dtype
        self.cfg = dataclasses.replace(cfg, dtype=dtype, param_dtype="float32")
        self.train_cfg, self.loss = train_cfg, train_cfg.codec
        self.ears = None
        if self.loss.distillation is not None:
            source = resolve_source(self.loss.distillation.checkpoint)
            ears = read_config(source).reasoner.audio
            self.ears = dataclasses.replace(ears, dtype=dtype, param_dtype="float32")
            self._per_frame, left = divmod(FEATURES_PER_SECOND, cfg.frame_rate)
            if left:
                raise ValueError(
                    f"distillation wants a frame rate that divides {FEATURES_PER_SECOND}, got {cfg.frame_rate}"
                )
            self._per_frame = int(self._per_frame)

    def model(self, rngs: nnx.Rngs) -> CodecModel:
        model = CodecModel(self.cfg, self.train_cfg, self.ears, rngs=rngs)
        for part in _QUANTIZERS:  # until k-means has made the codebooks
            quantizer = getattr(model.codec.quantizer, part)
            quantizer.initialized = nnx.Param(jnp.zeros_like(quantizer.initialized[...]))
        return model

    computing = model

    def cast(self, path: str, array: jax.Array) -> jax.Array:
        return array  # layers cast their kernels, codebooks stay exact

    def optimizer(self) -> optax.GradientTransformation:
        """One for the codec, which decays in its transformers alone, and one for the discriminator."""
        codec = optim.make_optimizer(self.train_cfg.optimizer, _decayed)
        if self.loss.discriminator is None:
            return codec
        other = optim.make_optimizer(self.loss.discriminator.optimizer)
        return optax.partition(
            {True: other, False: codec},
            lambda params: {
                name: jax.tree.map(lambda _, name=name: name == "discriminator", tree)
                for name, tree in params.items()
            },
        )

    def check(self, batch: Crops) -> None:
        size = self.cfg.frame_samples
        if (self.ears is None) != (batch.chunks is None):
            raise ValueError(
                "crops with chunks are for an objective with distillation, and for no other"
            )
        if batch.wave.ndim != 2 or batch.wave.shape[1] % size:
            raise ValueError(
                f"crops must be [B, N] with N a multiple of a frame's {size} samples, got {batch.wave.shape}"
            )

    def draw(self, step: jax.Array, batch: Crops) -> CodecDraw:
        loss, books = self.loss, self.cfg.num_quantizers
        split = self.cfg.num_semantic_quantizers
        rows, frames = batch.rows, batch.wave.shape[1] // self.cfg.frame_samples
        key = jax.random.fold_in(jax.random.key(self.train_cfg.seed), step)
        keys = jax.random.split(key, 4)
        depth = jax.random.randint(keys[0], (rows,), split, books + 1)
        shallow = jax.random.uniform(keys[1], (rows,)) < loss.depth_fraction
        depth = jnp.where(shallow, depth, books)
        start = 0 if loss.discriminator is None else loss.discriminator.start
        return CodecDraw(
            jnp.arange(books) < depth[:, None],
            jax.random.uniform(keys[2], (rows,)) < loss.unquantized_fraction,
            draw_slots(keys[3], rows, frames, self.cfg.codebook_size),
            jnp.broadcast_to(step >= start, (rows,)),
        )

    def count(self, batch: Crops, draw: CodecDraw) -> jax.Array:
        """Rows."""
        return (batch.lengths > 0).sum().astype(jnp.float32)

    def sums(self, model: CodecModel, batch: Crops, draw: CodecDraw | None) -> CodecSums:
        codec, wave = model.codec, batch.wave
        rows, frames = batch.rows, wave.shape[1] // self.cfg.frame_samples
        if draw is None:
            every = jnp.ones((rows, self.cfg.num_quantizers), bool)
            nowhere = jnp.full((rows, frames), -1, jnp.int32)
            draw = CodecDraw(every, ~every[:, 0], nowhere, every[:, 0])
        real = batch.lengths > 0
        begun = jnp.concatenate(
            [getattr(codec.quantizer, part).initialized[...][:, 0] for part in _QUANTIZERS]
        )
        latents = encode(codec, wave)
        active = draw.active & real[:, None] & (begun > 0)
        quantized = quantize(codec.quantizer, latents, active, draw.slots)
        books = quantized.sums
        passes = draw.unquantized | (begun[0] == 0)
        latents = jnp.where(passes[:, None, None], latents, quantized.latents)
        made = decode(codec, latents)

        def total(per_row):
            return jnp.where(real, per_row, 0).sum()

        mel = mel_distance(made, wave, self.loss.mel_windows, self.cfg.sampling_rate)
        zero = jnp.zeros((), jnp.float32)
        sums = CodecSums(
            rows=total(jnp.ones(rows)),
            frames=total(jnp.full(rows, float(frames))),
            mel=total(mel),
            wave=total(jnp.abs(made - wave).mean(-1)),
            commitment=books.commitment.sum() / frames,
            adversarial=zero,
            feature=zero,
            discriminator=zero,
            distillation=zero,
            listened=zero,
            books=jax.lax.stop_gradient(books),
        )
        if model.distillation is not None:
            features = hear(model.audio_encoder, batch, frames, self._per_frame)
            apart = model.distillation(quantized.semantic, features)
            sums = sums._replace(distillation=jnp.where(begun[0] > 0, total(apart), 0))
        if model.discriminator is None:
            return sums
        still = jax.lax.stop_gradient
        judge = model.discriminator
        fixed = nnx.merge(*_split(judge, still))
        judged, real_fixed = fixed(made), still(fixed(wave))
        adversarial, feature = disc.adversarial_loss(judged), disc.feature_loss(real_fixed, judged)
        weights = self.loss.discriminator
        heard = weights.adversarial_weight * adversarial + weights.feature_weight * feature
        own = disc.discriminator_loss(judge(wave), judge(still(made)))
        return sums._replace(
            adversarial=total(adversarial),
            feature=total(feature),
            discriminator=total(own),
            listened=total(jnp.where(draw.listens, heard, 0)),
        )

    def share(self, sums: CodecSums, count: jax.Array) -> jax.Array:
        loss = self.loss
        total = (
            loss.mel_weight * sums.mel
            + loss.wave_weight * sums.wave
            + loss.commitment_weight * sums.commitment
            + sums.listened
            + self._distillation_weight * sums.distillation
            + sums.discriminator
        )
        return total / jnp.maximum(count, 1)

    def metrics(self, sums: CodecSums) -> dict[str, jax.Array]:
        """The loss is without the discriminator's own. "used_codes": which part of the codewords a batch's frames could have used they did use."""
        rows = jnp.maximum(sums.rows, 1)
        counts = sums.books.counts
        could = jnp.maximum(jnp.minimum(counts.sum(-1), counts.shape[-1]), 1)
        out = {
            "loss": self.share(sums._replace(discriminator=jnp.zeros(())), sums.rows),
            "mel_distance": sums.mel / rows,
            "wave_distance": sums.wave / rows,
            "commitment": sums.commitment / rows,
            "used_codes": ((counts > 0).sum(-1) / could).mean(),
            "frames": sums.frames,
        }
        if self.loss.discriminator is not None:
            for name in ("adversarial", "feature", "discriminator"):
                out[name] = getattr(sums, name) / rows
        if self.loss.distillation is not None:
            out["distillation"] = sums.distillation / rows
        return out

    @property
    def _distillation_weight(self) -> float:
        return 0.0 if self.loss.distillation is None else self.loss.distillation.weight

    def follow(
        self, averages: Mapping[str, jax.Array], sums: CodecSums, step: jax.Array
    ) -> dict[str, jax.Array]:
        loss, out, split = self.loss, dict(averages), self.cfg.num_semantic_quantizers
        move = (step + 1) % loss.dead_every == 0
        for part, which in zip(_QUANTIZERS, (slice(split), slice(split, None)), strict=True):
            path = f"codec/quantizer/{part}/"
            if f"{path}embed_sum" not in averages:
                continue  # frozen codebooks
            books = Codebooks(*(averages[path + name] for name in Codebooks._fields))
            new = follow(
                books,
                BookSums(*(x[which] for x in sums.books)),
                decay=loss.decay,
                dead_below=loss.dead_below,
                move=move,
            )
            out |= {path + name: array for name, array in new._asdict().items()}
        return out

    def positions(self, batch: Crops) -> int:
        """Frames."""
        return int((batch.lengths > 0).sum()) * batch.wave.shape[1] // self.cfg.frame_samples

    def describe(self, metrics: Mapping[str, float]) -> str:
        line = (
            f"loss {metrics['loss']:.4f}  mel {metrics['mel_distance']:.4f}  wave {metrics['wave_distance']:.4f}  "
            f"commitment {metrics['commitment']:.4f}  codes {metrics['used_codes']:.2f}"
        )
        if "distillation" in metrics:
            line += f"  distillation {metrics['distillation']:.3f}"
        if "discriminator" in metrics:
            line += (
                f"  adversarial {metrics['adversarial']:.3f} {metrics['feature']:.3f}  "
                f"discriminator {metrics['discriminator']:.3f}"
            )
        return line

    # --- between steps ---

    def preparations(self, step: int) -> list[Preparation]:
        """Scales before the first step, codebooks when they begin to count; neither for a codec that was trained already."""
        works = []
        if step == 0:
            works.append(Preparation(1, lambda model, batch: batch.wave, self._scaled))
        if step == self.loss.quantizer_start:
            works.append(
                Preparation(
                    self.loss.k_means_batches,
                    lambda model, batch: encode(model.codec, batch.wave),
                    self._begun,
                )
            )
        return works

    def _scaled(self, model: CodecModel, seen: list[jax.Array]) -> dict[str, jax.Array]:
        before = parameters.flatten(model)
        begun = before["codec/quantizer/semantic/initialized"][0, 0] > 0
        scale_outputs(model.codec, seen[0])
        after = parameters.flatten(model)
        return {path: jnp.where(begun, before[path], after[path]) for path in before}

    def _begun(self, model: CodecModel, seen: list[jax.Array]) -> dict[str, jax.Array]:
        quantizer, loss = model.codec.quantizer, self.loss
        usage = float(seen[0].shape[0] * seen[0].shape[1])
        latents = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in seen])
        key = jax.random.fold_in(jax.random.key(self.train_cfg.seed), loss.quantizer_start)
        books = begin_codebooks(quantizer, latents, key, rounds=loss.k_means_rounds, usage=usage)
        out = {}
        for part, new in zip(_QUANTIZERS, books, strict=True):
            old = getattr(quantizer, part)
            begun = old.initialized[...] > 0
            path = f"codec/quantizer/{part}/"
            out[path + "embed_sum"] = jnp.where(begun[..., None], old.embed_sum[...], new.embed_sum)
            out[path + "cluster_usage"] = jnp.where(
                begun, old.cluster_usage[...], new.cluster_usage
            )
            out[path + "initialized"] = jnp.ones_like(old.initialized[...])
        return out


def encode(codec: codecs.Codec, wave: jax.Array) -> jax.Array:
    """Waveforms [B, N] -> latents [B, T, D] before the quantizer."""
    x = codec.encoder_transformer(codec.encoder(wave[..., None]))
    return codec.downsample(x)


def decode(codec: codecs.Codec, latents: jax.Array) -> jax.Array:
    """Latents [B, T, D] -> waveforms [B, N] float32."""
    x = codec.decoder_transformer(codec.upsample(latents.astype(codec.cfg.dtype)))
    return codec.decoder(x)[..., 0].astype(jnp.float32)


def hear(encoder: AudioEncoder, batch: Crops, frames: int, per_frame: int) -> jax.Array:
    """An audio encoder's features of a batch, at the codec's frame rate: [B, T, E] float32, without a gradient.

    Its 25 a second are averaged over each frame. Only the last chunk can be partial, so they stand in order.
    """
    chunks = batch.chunks.reshape(-1, *batch.chunks.shape[2:])
    features, _ = encoder(chunks, batch.chunk_lengths.reshape(-1))
    features = features.reshape(batch.rows, -1, features.shape[-1]).astype(jnp.float32)
    features = features[:, : frames * per_frame].reshape(batch.rows, frames, per_frame, -1)
    return jax.lax.stop_gradient(features.mean(2))


def scale_outputs(codec: codecs.Codec, wave: jax.Array) -> None:
    """Divides the kernels of every convolution, in place, by the deviation of what they give on this sound [B, N].

    So each gives numbers of unit deviation, however deep it lies; without it the first thousand steps go to that. The last convolution
    gives the level of quiet speech.
    """

    def unit(layer, x, level=1.0):
        y = layer(x)
        scale = level / jnp.maximum(jnp.std(y.astype(jnp.float32)), 1e-6)
        layer.kernel = nnx.Param(layer.kernel[...] * scale)
        return y * scale.astype(y.dtype)

    def chain(layers, x, level=1.0):
        for i, layer in enumerate(layers):
            if isinstance(layer, ResidualBlock):
                h = unit(layer.dilated, jax.nn.elu(x))
                h = unit(layer.pointwise, jax.nn.elu(h))
                x = (x if layer.shortcut is None else unit(layer.shortcut, x)) + h
            elif isinstance(layer, Elu):
                x = layer(x)
            else:
                x = unit(layer, x, level if i == len(layers) - 1 else 1.0)
        return x

    x = chain(codec.encoder.layers, wave[..., None].astype(codec.cfg.dtype))
    x = unit(codec.downsample, codec.encoder_transformer(x))
    x = unit(codec.upsample, x)
    chain(codec.decoder.layers, codec.decoder_transformer(x), _LEVEL)


def _decayed(params: Mapping) -> Mapping:
    """True for the products of the transformers."""

    def one(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return re.fullmatch(_DECAYED, name) is not None

    return jax.tree_util.tree_map_with_path(one, params)


def _split(module: nnx.Module, function):
    graphdef, state = nnx.split(module)
    return graphdef, jax.tree.map(function, state)
