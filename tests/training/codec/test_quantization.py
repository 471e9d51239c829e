"""Moving codebooks against plain loops over frames."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_codec as small
from flax import nnx

from chroma_jax.model.codec.quantizer import SplitQuantizer
from chroma_jax.training.codec import quantization
from chroma_jax.training.codec.quantization import BookSums, Codebooks

CFG = small.codec_config()
B, T, Q, V, C = 3, 7, CFG.num_quantizers, CFG.codebook_size, CFG.codebook_dim


@pytest.fixture(scope="module")
def given():
    """A quantizer, latents, which codebooks rows use, slots."""
    quantizer = SplitQuantizer(CFG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for part in (quantizer.semantic, quantizer.acoustic):
        usage = rng.uniform(0.5, 2, part.cluster_usage.shape).astype(np.float32)
        part.cluster_usage = nnx.Param(jnp.asarray(usage))
    latents = jnp.asarray(2 * rng.normal(size=(B, T, CFG.hidden_size)), jnp.float32)
    active = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    slots = np.asarray(quantization.draw_slots(jax.random.key(1), B, T, V))
    return quantizer, latents, jnp.asarray(active), jnp.asarray(slots)


def by_hand(quantizer, latents, active, slots):
    """A frame at a time: (sum of codewords before the output projection per part, codes, sums)."""
    sums = BookSums(
        np.zeros((Q, V, C)), np.zeros((Q, V)), np.zeros((Q, V, C)), np.zeros((Q, V)), np.zeros(Q)
    )
    codes, out = np.zeros((B, T, Q), int), np.zeros((B, T, CFG.hidden_size))
    book = 0
    for part in (quantizer.semantic, quantizer.acoustic):
        table = np.asarray(part.embed_sum[...]) / np.asarray(part.cluster_usage[...])[..., None]
        for b in range(B):
            for t in range(T):
                residual = np.asarray(latents[b, t]) @ np.asarray(part.input_proj[...])
                chosen = np.zeros(C)
                for i, words in enumerate(table):
                    code = int(np.argmin(((words - residual) ** 2).sum(1)))
                    codes[b, t, book + i] = code
                    if not active[b, book + i]:
                        continue
                    sums.vectors[book + i, code] += residual
                    sums.counts[book + i, code] += 1
                    if slots[b, t] >= 0:
                        sums.candidates[book + i, slots[b, t]] += residual
                        sums.num_candidates[book + i, slots[b, t]] += 1
                    sums.commitment[book + i] += ((residual - words[code]) ** 2).mean()
                    chosen, residual = chosen + words[code], residual - words[code]
                out[b, t] += chosen @ np.asarray(part.output_proj[...])
        book += len(table)
    return out, codes, sums


def test_quantize_and_its_sums(given):
    quantized, _, codes, sums = jax.jit(quantization.quantize)(*given)
    want, want_codes, want_sums = by_hand(*given)
    np.testing.assert_allclose(quantized, want, atol=2e-4)
    for row, depth in enumerate((4, 2, 1)):
        np.testing.assert_array_equal(codes[row, :, :depth], want_codes[row, :, :depth])
    for name, got, wanted in zip(BookSums._fields, sums, want_sums, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4, err_msg=name)


def test_codes_are_those_of_the_model(given):
    quantizer, latents, _, slots = given
    out = jax.jit(quantization.quantize)(quantizer, latents, jnp.ones((B, Q), bool), slots)
    codes = jax.jit(SplitQuantizer.encode)(quantizer, latents)
    np.testing.assert_array_equal(out.codes, codes)
    decode = jax.jit(SplitQuantizer.decode)
    np.testing.assert_allclose(out.latents, decode(quantizer, codes), atol=1e-5)
    np.testing.assert_allclose(out.semantic, decode(quantizer, codes[..., :1]), atol=1e-5)


def test_gradients_pass_straight(given):
    """As though each part gave back what its input projection gave it; and none to the codebooks."""
    quantizer, latents, active, slots = given
    cotangent = np.random.default_rng(2).normal(size=latents.shape).astype(np.float32)

    def value(latents, quantizer):
        return (quantization.quantize(quantizer, latents, active, slots).latents * cotangent).sum()

    straight = sum(
        cotangent @ np.asarray(part.output_proj[...]).T @ np.asarray(part.input_proj[...]).T
        for part in (quantizer.semantic, quantizer.acoustic)
    )
    got, of_quantizer = jax.jit(jax.grad(value, argnums=(0, 1)))(latents, quantizer)
    np.testing.assert_allclose(got, straight, rtol=1e-3, atol=1e-4)
    for part in (of_quantizer.semantic, of_quantizer.acoustic):
        assert not np.asarray(part.embed_sum[...]).any()
        assert np.abs(np.asarray(part.output_proj[...])).min() > 0


def test_commitment_pulls_the_latents_alone(given):
    quantizer, latents, active, slots = given

    def value(latents, quantizer):
        return quantization.quantize(quantizer, latents, active, slots).sums.commitment.sum()

    pulled, of_quantizer = jax.jit(jax.grad(value, argnums=(0, 1)))(latents, quantizer)
    assert np.abs(np.asarray(pulled)).max() > 1e-3
    assert not np.asarray(of_quantizer.acoustic.embed_sum[...]).any()


def test_follow_against_a_loop():
    rng = np.random.default_rng(3)
    books = Codebooks(rng.normal(size=(2, 4, 3)), np.array([[1, 2, 3, 4.0], [1, 1, 1, 1]]))
    counts = np.array([[0, 1, 5, 2.0], [0, 0, 0, 0]])  # nobody used the second codebook
    sums = BookSums(
        rng.normal(size=(2, 4, 3)), counts, np.zeros((2, 4, 3)), np.zeros((2, 4)), np.zeros(2)
    )
    got = quantization.follow(books, sums, decay=0.9, dead_below=0.1, move=jnp.asarray(True))
    for v in range(4):
        usage = 0.9 * books.cluster_usage[0, v] + 0.1 * counts[0, v]
        total = 0.9 * books.embed_sum[0, v] + 0.1 * sums.vectors[0, v]
        np.testing.assert_allclose(got.cluster_usage[0, v], usage, rtol=1e-5)
        np.testing.assert_allclose(got.embed_sum[0, v], total, rtol=1e-5)
    np.testing.assert_allclose(got.embed_sum[1], books.embed_sum[1], rtol=1e-6)
    np.testing.assert_allclose(got.cluster_usage[1], books.cluster_usage[1], rtol=1e-6)


@pytest.mark.parametrize("move", [True, False])
def test_dead_codewords_move_when_it_is_time(move):
    usage = np.array([[1.0, 0.01, 0.01, 3.0]])
    books = Codebooks(np.arange(12.0).reshape(1, 4, 3), usage)
    # A vector for the second and the last; none for the third, which is as dead as the second.
    candidates = np.zeros((1, 4, 3))
    candidates[0, 1], candidates[0, 3] = [7, 8, 9], [1, 1, 1]
    sums = BookSums(np.zeros((1, 4, 3)), usage, candidates, np.array([[0, 1, 0, 1.0]]), np.zeros(1))
    got = quantization.follow(books, sums, decay=1.0, dead_below=0.1, move=jnp.asarray(move))
    words = np.asarray(got.embed_sum / got.cluster_usage[..., None])[0]
    was = (books.embed_sum / usage[..., None])[0]
    np.testing.assert_allclose(words[[0, 2, 3]], was[[0, 2, 3]], rtol=1e-5)
    np.testing.assert_allclose(words[1], [7, 8, 9] if move else was[1], rtol=1e-5)
    np.testing.assert_allclose(got.cluster_usage[0, 1], usage.mean() if move else 0.01, rtol=1e-5)


@pytest.mark.parametrize(("rows", "frames", "size"), [(2, 3, 10), (4, 5, 8)])
def test_slots_go_to_different_codewords(rows, frames, size):
    slots = np.asarray(quantization.draw_slots(jax.random.key(0), rows, frames, size))
    used = np.sort(slots[slots >= 0])
    assert slots.shape == (rows, frames) and slots.max() < size
    assert len(used) == len(set(used.tolist())) == min(rows * frames, size)
    other = np.asarray(quantization.draw_slots(jax.random.key(1), rows, frames, size))
    assert (slots != other).any()


def test_k_means_finds_clusters_and_is_deterministic():
    rng = np.random.default_rng(4)
    middles = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    x = jnp.asarray(np.repeat(middles, 30, 0) + 0.1 * rng.normal(size=(120, 2)), jnp.float32)
    run = jax.jit(quantization.k_means, static_argnums=(2, 3))
    centres, counts = run(jax.random.key(3), x, 12, 10)
    again, _ = run(jax.random.key(3), x, 12, 10)
    np.testing.assert_array_equal(centres, again)
    assert counts.sum() == 120
    # Lloyd's rounds, by hand, from the same points.
    want = np.asarray(x)[
        np.asarray(jax.random.choice(jax.random.key(3), 120, (12,), replace=False))
    ]
    for _ in range(10):
        owner = ((np.asarray(x)[:, None] - want[None]) ** 2).sum(-1).argmin(1)
        want = np.stack(
            [
                np.asarray(x)[owner == v].mean(0) if (owner == v).any() else want[v]
                for v in range(12)
            ]
        )
    np.testing.assert_allclose(centres, want, atol=1e-4)


def test_first_codebooks_leave_less_and_less():
    quantizer = SplitQuantizer(CFG, rngs=nnx.Rngs(1))
    latents = jnp.asarray(np.random.default_rng(5).normal(size=(400, CFG.hidden_size)), jnp.float32)
    begin = jax.jit(quantization.begin_codebooks, static_argnames=("rounds", "usage"))
    books = begin(quantizer, latents, jax.random.key(0), rounds=6, usage=20.0)
    np.testing.assert_allclose(books[1].cluster_usage.sum(-1), 20, rtol=0.05)
    part, x = (
        quantizer.acoustic,
        np.asarray(latents) @ np.asarray(quantizer.acoustic.input_proj[...]),
    )
    assert books[1].embed_sum.shape == part.embed_sum.shape
    left = [(x**2).mean()]
    for embed_sum, usage in zip(*(np.asarray(a) for a in books[1]), strict=True):
        words = embed_sum / usage[:, None]
        x = x - words[((x[:, None] - words) ** 2).sum(-1).argmin(1)]
        left.append((x**2).mean())
    assert all(b < 0.8 * a for a, b in itertools.pairwise(left))
