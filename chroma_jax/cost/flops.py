"""Floating-point operations of a JAX function, from its jaxpr: products and convolutions, loops counted in full."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def flops(function: Callable, *args: Any) -> int:
    """Multiplications and additions of the matrix products and convolutions of function(*args); args may be shapes.

    What a gradient computes again (remat) is counted again. Of branches, the most expensive counts.
    """
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
            )
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // out_features
        elif name == "cond":
            total += max(_of(branch.jaxpr) for branch in params["branches"])
        else:
            repeats = params["length"] if name == "scan" else 1
            for value in params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += repeats * _of(inner)
    return total
