"""The residual quantizer as it trains: gradients pass it straight, codebooks follow their vectors, dead codewords move.

A codeword is embed_sum / cluster_usage, the exponential moving averages of the sum and the number of the vectors that
chose it. No gradient reaches it. What a step adds to the averages is kept as sums over frames: microbatches and shards
add up to exactly the whole batch.

Axes: B batch, T frames, D latent width, Q codebooks, V codewords, C codeword width, n vectors.
Source: VQ-VAE (arXiv 1711.00937, appendix A.1), SoundStream (arXiv 2107.03312, section III-C), Mimi (arXiv 2410.00037).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax.model.codec.quantizer import EXACT, USAGE_FLOOR, ResidualQuantizer, SplitQuantizer


class BookSums(NamedTuple):
    """What a batch tells about Q codebooks. They add."""

    vectors: jax.Array  # [Q, V, C] float32, sum of the vectors that chose each codeword
    counts: jax.Array  # [Q, V] float32, how many
    candidates: jax.Array  # [Q, V, C] float32, sum of the vectors that a codeword may move to
    num_candidates: jax.Array  # [Q, V] float32, how many: 0 or 1 for a whole batch
    commitment: jax.Array  # [Q] float32, squared distance of vectors to codewords, mean over C


class Quantized(NamedTuple):
    """What the quantizer makes of latents."""

    latents: jax.Array  # [B, T, D] float32
    semantic: jax.Array  # [B, T, D] float32, the semantic codebooks' part of them
    codes: jax.Array  # [B, T, Q] int32
    sums: BookSums  # of all Q codebooks


def quantize(
    quantizer: SplitQuantizer, latents: jax.Array, active: jax.Array, slots: jax.Array
) -> Quantized:
    """Latents [B, T, D] as the codebooks have them.

    The gradient of what comes out goes to the latents through the projections, as though the codewords were the vectors.

    Args:
      quantizer: whose codebooks are read.
      latents: what the encoder gave.
      active: [B, Q] bool, which codebooks a row uses: the first few of each of the two quantizers.
      slots: [B, T] int32, the codeword that may move to this frame's vector, or -1.
    """
    split = quantizer.num_semantic
    first = _quantize(quantizer.semantic, latents, active[:, :split], slots)
    second = _quantize(quantizer.acoustic, latents, active[:, split:], slots)
    sums = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first[2], second[2])
    codes = jnp.concatenate([first[1], second[1]], axis=-1)
    return Quantized(first[0] + second[0], first[0], codes, sums)


def _quantize(quantizer: ResidualQuantizer, latents, active, slots):
    x = latents.astype(jnp.float32)
    if quantizer.input_proj is not None:
        x = jnp.matmul(x, quantizer.input_proj[...].astype(jnp.float32), precision=EXACT)
    size = quantizer.embed_sum.shape[1]
    moves = jax.nn.one_hot(slots, size, dtype=jnp.float32)  # -1: nowhere
    books = jax.lax.stop_gradient((quantizer.embed_sum[...], quantizer.cluster_usage[...]))

    def one(residual, book):
        embed_sum, usage, used = book  # used: [B]
        codebook = embed_sum / jnp.maximum(usage, USAGE_FLOOR)[:, None]
        vectors = jax.lax.stop_gradient(residual)
        cross = jnp.einsum("BTC,VC->BTV", vectors, codebook, precision=EXACT)
        squares = jnp.sum(vectors**2, -1, keepdims=True) + jnp.sum(codebook**2, -1)
        codes = jnp.argmin(jnp.sqrt(jnp.maximum(squares - 2 * cross, 0)), axis=-1)
        weight = used.astype(jnp.float32)[:, None, None]
        chosen = codebook[codes] * weight
        chose = jax.nn.one_hot(codes, size, dtype=jnp.float32) * weight
        may = moves * weight
        sums = BookSums(
            jnp.einsum("BTV,BTC->VC", chose, vectors, precision=EXACT),
            chose.sum((0, 1)),
            jnp.einsum("BTV,BTC->VC", may, vectors, precision=EXACT),
            may.sum((0, 1)),
            jnp.sum(weight * (residual - chosen) ** 2) / residual.shape[-1],
        )
        return residual - chosen, (chosen, codes.astype(jnp.int32), sums)

    _, (chosen, codes, sums) = jax.lax.scan(one, x, (*books, active.T))
    quantized = x + jax.lax.stop_gradient(chosen.sum(0) - x)
    if quantizer.output_proj is not None:
        quantized = jnp.matmul(quantized, quantizer.output_proj[...].astype(jnp.float32))
    return quantized, jnp.moveaxis(codes, 0, -1), sums


class Codebooks(NamedTuple):
    """The moving averages of Q codebooks."""

    embed_sum: jax.Array  # [Q, V, C] float32
    cluster_usage: jax.Array  # [Q, V] float32


def follow(
    books: Codebooks, sums: BookSums, *, decay: float, dead_below: float, move: jax.Array
) -> Codebooks:
    """The averages after a step.

    Args:
      books: the averages before it.
      sums: of the whole batch. A codebook that no row used stays as it is.
      decay: of the averages, per step.
      dead_below: a codeword is dead when its usage is below this part of the mean usage.
      move: [] bool, whether dead codewords move now, each to its candidate, with the mean usage.
    """
    used = (sums.counts.sum(-1) > 0)[:, None]
    usage = decay * books.cluster_usage + (1 - decay) * sums.counts
    total = decay * books.embed_sum + (1 - decay) * sums.vectors
    mean = usage.mean(-1, keepdims=True)
    moves = move & (usage < dead_below * mean) & (sums.num_candidates > 0)
    target = sums.candidates / jnp.maximum(sums.num_candidates, 1)[..., None]
    total = jnp.where(moves[..., None], target * mean[..., None], total)
    usage = jnp.where(moves, mean, usage)
    return Codebooks(
        jnp.where(used[..., None], total, books.embed_sum),
        jnp.where(used, usage, books.cluster_usage),
    )


def draw_slots(key: jax.Array, rows: int, frames: int, size: int) -> jax.Array:
    """[B, T] int32: for each of `size` codewords at most one frame of the batch that it may move to; -1 elsewhere."""
    count = rows * frames
    slots = jax.random.permutation(key, max(count, size))[:count].reshape(rows, frames)
    return jnp.where(slots < size, slots, -1).astype(jnp.int32)


def k_means(key: jax.Array, x: jax.Array, size: int, rounds: int) -> tuple[jax.Array, jax.Array]:
    """Points x [n, C], n >= size -> (centres [size, C], members of each [size]).

    Lloyd's algorithm from `size` different points that the key draws. A centre that has lost its points stays.
    """
    centres = x[jax.random.choice(key, x.shape[0], (size,), replace=False)]

    def members(centres):
        one_hot = jax.nn.one_hot(nearest(x, centres), size, dtype=jnp.float32)
        return one_hot.sum(0), jnp.matmul(one_hot.T, x, precision=EXACT)

    def once(_, centres):
        counts, sums = members(centres)
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], centres)

    centres = jax.lax.fori_loop(0, rounds, once, centres)
    return centres, members(centres)[0]


def nearest(x: jax.Array, centres: jax.Array) -> jax.Array:
    """[n, C], [V, C] -> the index [n] of the nearest centre."""
    cross = jnp.matmul(x, centres.T, precision=EXACT)
    return jnp.argmin(jnp.sum(centres**2, -1) - 2 * cross, axis=-1)


def begin_codebooks(
    quantizer: SplitQuantizer, latents: jax.Array, key: jax.Array, *, rounds: int, usage: float
) -> tuple[Codebooks, Codebooks]:
    """Codebooks of the semantic and the acoustic quantizer by k-means on latents [n, D], each on what those before it leave.

    `usage`: how many frames a step has; the codewords' usage adds up to it.
    """
    out = []
    for i, part in enumerate((quantizer.semantic, quantizer.acoustic)):
        x = latents.astype(jnp.float32)
        if part.input_proj is not None:
            x = jnp.matmul(x, part.input_proj[...].astype(jnp.float32), precision=EXACT)
        books, size, _ = part.embed_sum.shape
        keys = jax.random.split(jax.random.fold_in(key, i), books)

        def one(x, key, size=size):
            centres, counts = k_means(key, x, size, rounds)
            share = jnp.maximum(counts, 1) / x.shape[0] * usage
            book = Codebooks(centres * share[:, None], share)
            return x - centres[nearest(x, centres)], book

        out.append(jax.lax.scan(one, x, keys)[1])
    return tuple(out)
