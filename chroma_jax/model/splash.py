"""Causal attention by the splash kernel that comes with JAX for TPUs (FlashAttention, arXiv 2205.14135).

It holds one block of logits at a time on the chip, for the gradient as well, and skips blocks of which the mask leaves nothing.

Axes: B batch, T positions, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from chroma_jax.sharding import ROW_AXES

# The side of a block at most, and what it is a multiple of: the lanes of a vector register. By libtpu's simulation of the kernel at 1280
# positions, which the longest records have, 640 is faster than 256 and 1280 on v5e, v5p and v6e.
_BLOCK, _LANES = 640, 128
# Keys and values of one head up to here, and their gradients, are on the chip at once.
_WHOLE = 2560


def causal(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """Softmax attention of q [B, T, N, H] over k, v [B, T, K, H] up to each position's own -> [B, N, T, H].

    On one device, or under `jax.set_mesh` with one of our meshes. Against the plain way, q is rounded once more (it takes the
    scale before the product), and probabilities are not divided by their sum before the second product but after it.
    `interpret` runs it on any device, slowly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _local(q, k, v, interpret)
    rows, tensor = math.prod(mesh.shape[axis] for axis in ROW_AXES), mesh.shape["tensor"]
    heads = "tensor" if q.shape[2] % tensor == 0 else None
    if heads and k.shape[2] % tensor:
        # Fewer kv heads than devices: each device gets those of its own heads.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    rows = ROW_AXES if q.shape[0] % rows == 0 else None
    specs = (P(rows, None, heads, None),) * 3
    local = lambda q, k, v: _local(q, k, v, interpret)  # noqa: E731
    # The compiler cannot divide a kernel: each device runs it on its rows and heads.
    return jax.shard_map(local, in_specs=specs, out_specs=P(rows, heads), check_vma=False)(q, k, v)


def pad(x: jax.Array, axis: int) -> jax.Array:
    """x with zeros after the positions that are its `axis`, up to a length that `causal` takes without adding its own."""
    room = [(0, 0)] * x.ndim
    room[axis] = (0, _padded(x.shape[axis])[0] - x.shape[axis])
    return jnp.pad(x, room) if room[axis][1] else x


def causal_share(width: int) -> float:
    """The share of all logits that the kernel computes in the forward pass."""
    padded, side = _padded(width)
    blocks = padded // side
    return (blocks + 1) / (2 * blocks)


def _padded(width: int) -> tuple[int, int]:
    """The length that the kernel computes `width` positions with, and the side of its blocks."""
    blocks = -(-width // _BLOCK)
    side = -(-width // (blocks * _LANES)) * _LANES
    return blocks * side, side


def _local(q, k, v, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes half a second

    (_, width, heads, head_dim), dtype = q.shape, q.dtype
    padded, side = _padded(width)
    layout = splash.QKVLayout.SEQ_MINOR
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((padded, padded))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=side,
            block_kv=side,
            **_backward_blocks(padded, side),
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) / math.sqrt(head_dim)).astype(dtype)
    q, k, v = (pad(x, 1).swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(q, k, v)[:, :, :width]


def _backward_blocks(padded: int, side: int) -> dict[str, int | bool]:
    """One kernel for all gradients, over all keys at once, as far as they fit; else one for those of k and v and one for q's.

    The one kernel over parts of the keys would leave parts of q's gradient to be added up, which takes longer than it saves.
    """
    if padded <= _WHOLE:
        return dict(
            block_q_dkv=side,
            block_kv_dkv=padded,
            block_kv_dkv_compute=side,
            use_fused_bwd_kernel=True,
        )
    return dict(block_q_dkv=side, block_kv_dkv=side, block_q_dq=side, block_kv_dq=side)
