"""How one PyTorch tensor becomes one of our arrays, and back: a few named, exactly invertible transforms.

`to_ours(x, shape)` takes the torch tensor as a numpy array and the shape wanted here; `to_torch(x, shape)` undoes it;
`torch_shape(shape)` tells the torch tensor's shape from ours. All only move or reinterpret axes, so that a round trip
returns the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of inverse maps; each gets the array and the shape it must return."""

    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_torch: Callable[[np.ndarray, Shape], np.ndarray]
    torch_shape: Callable[[Shape], Shape]


def _transposed(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.T.reshape(shape)


def _back_transposed(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.reshape(shape[::-1]).T


def _reshaped(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.reshape(shape)


_CONV = Transform(
    lambda x, s: x.transpose(2, 1, 0), lambda x, s: x.transpose(2, 1, 0), lambda s: s[::-1]
)
_CONV_TRANSPOSE = Transform(
    lambda x, s: x.transpose(0, 2, 1).reshape(s),
    lambda x, s: x.reshape(s[0], s[2], s[1]).transpose(0, 2, 1),
    lambda s: (s[0], s[3], s[1] * s[2]),
)

TRANSFORMS: dict[str, Transform] = {
    # The same axes in the same order.
    "same": Transform(_reshaped, _reshaped, lambda s: s),
    # Axes that are joined there: bias [N*H] <-> [N, H].
    "joined": Transform(_reshaped, _reshaped, lambda s: (math.prod(s),)),
    # The first two axes are joined there: table [Q*V, D] <-> [Q, V, D].
    "table": Transform(_reshaped, _reshaped, lambda s: (s[0] * s[1], *s[2:])),
    # Linear weight [out, in] <-> [in, out], where `out` may be split here: [D, N, H].
    "linear": Transform(_transposed, _back_transposed, lambda s: (math.prod(s[1:]), s[0])),
    # Linear weight [out, in] <-> [*in, out], where `in` is split here: [N, H, D].
    "linear_in": Transform(_transposed, _back_transposed, lambda s: (s[-1], math.prod(s[:-1]))),
    # Conv1d weight [out, in/groups, kernel] <-> [kernel, in/groups, out].
    "conv": _CONV,
    # ConvTranspose1d weight [in, out/groups, kernel] <-> [in, 2, kernel/2, out/groups].
    "conv_transpose": _CONV_TRANSPOSE,
    # One of these two, where the name does not say which: ours has 3 axes or 4.
    "conv_either": Transform(
        lambda x, s: (_CONV if len(s) == 3 else _CONV_TRANSPOSE).to_ours(x, s),
        lambda x, s: (_CONV if x.ndim == 3 else _CONV_TRANSPOSE).to_torch(x, s),
        lambda s: (_CONV if len(s) == 3 else _CONV_TRANSPOSE).torch_shape(s),
    ),
    # Conv1d of kernel 1 used as a linear map: [out, in, 1] <-> [in, out].
    "pointwise": Transform(
        lambda x, s: x[..., 0].T, lambda x, s: x.T[..., None], lambda s: (s[1], s[0], 1)
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor: torch names matching `torch` (full match) go to `path` through `transform`.

    The regex holds literal text and plain groups only, so that it can be read backwards. `path` may refer to the
    groups (\\1, \\g<name>). A group named `layer` is the index into the leading axis of a stacked parameter and does not
    appear in the path. `path` None means: known, and not part of our model; `why` says why, and the converter prints
    it. Such a tensor may be a copy of another one (`same_as`, checked bit by bit).
    """

    torch: str
    path: str | None
    transform: str = "same"
    why: str = ""
    same_as: str = ""
