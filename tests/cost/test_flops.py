"""Operations of a function are counted with its loops, gradients and branches."""

import jax
import jax.numpy as jnp

from chroma_jax.cost import flops


def test_flops_of_loops_gradients_and_convolutions():
    x, w = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)

    def layers(x, w, policy=None):
        layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        if policy is not None:
            layer = jax.checkpoint(layer, policy=policy)
        return jax.lax.scan(layer, x, w)[0].sum()

    one = 2 * 4 * 8 * 8
    assert flops.flops(layers, x, w) == 5 * one
    assert flops.flops(jax.grad(layers, argnums=(0, 1)), x, w) == 3 * 5 * one
    again = lambda x, w: layers(x, w, jax.checkpoint_policies.nothing_saveable)  # noqa: E731
    assert flops.flops(jax.grad(again, argnums=(0, 1)), x, w) == 4 * 5 * one
    assert flops.flops(jax.jit(layers), x, w) == 5 * one
    signal, kernel = jnp.zeros((2, 10, 3)), jnp.zeros((4, 3, 7))
    conv = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")
    )
    assert flops.flops(conv, signal, kernel) == 2 * (2 * 7 * 7) * 4 * 3
    branch = lambda p, x: jax.lax.cond(p, lambda x: x @ x.T, lambda x: jnp.zeros((4, 4)), x)  # noqa: E731
    assert flops.flops(branch, True, x) == 2 * 4 * 4 * 8
