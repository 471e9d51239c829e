"""Where every array of the system lives on a mesh of devices: one table, path -> PartitionSpec.

Mesh axes: "data" splits rows of a batch, "fsdp" splits rows and parameters (gathered where they are used), "tensor" splits
heads and feed-forward columns. The same table places parameters, their optimizer moments, LoRA factors and frozen
parameters; `constrain` pins activations inside the model and does nothing where there is no mesh.

Axes: B batch, S cache length, D width, N heads, K kv heads, H head dim, F ff width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")
ROWS = P(ROW_AXES)  # of any array whose leading axis is the batch


class Rule(NamedTuple):
    """Which parameters (a regular expression that their path ends with) are split how.

    `spec` is that of one layer: parameters stacked under "layers/" get a leading None. `heads_may_repeat`: where the tensor
    axis does not divide the number of heads, every shard of it holds all of them (few kv heads on many devices); for
    any other parameter that is an error.
    """

    pattern: str
    spec: P
    heads_may_repeat: bool = False


RULES = (
    # 79 M parameters of all shapes, not run in training or trained alone: a copy on each device.
    Rule(r"(codec|discriminator|distillation)/.+", P()),
    # Vectors are small.
    Rule(r"(scale|bias)", P()),
    Rule(r"(conv1|conv2|projection|q|k|v|o|up|down)_bias", P()),
    Rule(r"audio_encoder/unused_bos_eos", P()),
    # Reasoner.
    Rule(r"audio_encoder/conv[12]", P(None, None, "fsdp")),
    Rule(r"audio_encoder/projection", P("fsdp", None)),
    Rule(r"audio_encoder/layers/[qkv]", P("fsdp", "tensor", None), heads_may_repeat=True),
    Rule(r"audio_encoder/layers/o", P("tensor", None, "fsdp"), heads_may_repeat=True),
    Rule(r"reasoner/embedding", P("tensor", "fsdp")),
    Rule(r"reasoner/head", P("fsdp", "tensor")),
    # Backbone and Decoder: the audio vocabulary (2051 in the published model) is divided by nothing.
    Rule(r"backbone/audio_embedding", P(None, None, "fsdp")),
    Rule(r"backbone/head", P("fsdp", None)),
    Rule(r"decoder/projection", P("fsdp", None)),
    Rule(r"decoder/heads", P(None, "fsdp", None)),
    # The blocks.
    Rule(r"attention/q", P("fsdp", "tensor", None)),
    Rule(r"attention/[kv]", P("fsdp", "tensor", None), heads_may_repeat=True),
    Rule(r"attention/o", P("tensor", None, "fsdp")),
    Rule(r"layers/(gate|up)", P("fsdp", "tensor")),
    Rule(r"layers/down", P("tensor", "fsdp")),
)

# A LoRA factor takes its half of the kernel's spec: `a` the inputs', `b` the outputs'.
LORA_A, LORA_B = "lora_a", "lora_b"
# A quantised kernel's values lie as the kernel does; its scales have 1 for the axes that are summed over, and those are whole.
VALUES, SCALES = "values", "scales"


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all `devices` (default: `jax.devices()`) with the axes of `MESH_AXES`.

    Args:
      shape: size per axis; axes left out have size 1, and one may be -1: what the others leave.
      devices: the devices, in order.

    Raises:
      ValueError: an unknown axis, a size below 1, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = sorted(set(shape) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"unknown mesh axis {unknown[0]!r}; the axes are {', '.join(MESH_AXES)}")
    sizes = {axis: int(shape.get(axis, 1)) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"only one mesh axis may be -1, got {' and '.join(free)}")
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {axis} must have size 1 or more (or -1), got {size}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if len(devices) % fixed:
            raise ValueError(
                f"mesh {_shown(sizes)}: {fixed} does not divide the {len(devices)} devices"
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(
            f"mesh {_shown(sizes)} has {fixed} places for {len(devices)} devices; they must be equal"
        )
    grid = _arrange(devices, tuple(sizes.values()))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in a grid whose inner axes are close together on the interconnect, where the platform tells."""
    if len(devices) > 1 and getattr(devices[0], "platform", "cpu") == "tpu":
        from jax.experimental import mesh_utils  # it plans with the chips' coordinates

        slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
        if len(slices) > 1 and shape[0] % len(slices) == 0:
            per_slice = (shape[0] // len(slices), *shape[1:])
            across = (len(slices), *(1 for _ in shape[1:]))
            return mesh_utils.create_hybrid_device_mesh(
                per_slice, across, devices, allow_split_physical_axes=True
            )
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def spec_of(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The PartitionSpec of the parameter at `path`, or of an optimizer moment whose path ends like one.

    Raises:
      ValueError: no rule is for that path; or an axis does not divide the dimension it splits.
    """
    if len(shape) == 0:
        return P()  # counters
    kernel, _, factor = path.rpartition("/")
    is_factor = factor in (LORA_A, LORA_B)
    is_part = is_factor or factor in (VALUES, SCALES)
    rule = _rule_for(kernel if is_part else path)
    spec = tuple(rule.spec)
    if is_factor:
        # Of the kernel's axes, `a` keeps the inputs and `b` the outputs; the rank is whole.
        inputs = len(spec) - 1 if kernel.endswith("/o") else 1
        spec = (*spec[:inputs], None) if factor == LORA_A else (None, *spec[inputs:])
    if spec and is_stacked(path):
        spec = (None, *spec)
    if len(spec) > len(shape):
        raise ValueError(f"{path}: the sharding rule {rule.pattern!r} does not fit shape {shape}")
    fitted = []
    for size, axis in zip(shape, spec, strict=False):
        axis = None if factor == SCALES and size == 1 else axis
        if axis is not None and size % mesh.shape[axis]:
            if not (rule.heads_may_repeat and axis == "tensor"):
                raise ValueError(
                    f"{path} {tuple(shape)}: mesh axis {axis} of size {mesh.shape[axis]} does not divide {size}"
                )
            axis = None
        fitted.append(axis)
    return P(*fitted)


def is_stacked(path: str) -> bool:
    """Whether a parameter's leading axis counts layers (a list of unlike layers has numbers in its paths)."""
    return re.search(r"(^|/)layers/(?!\d)", path) is not None


def _rule_for(path: str) -> Rule:
    for rule in RULES:
        if re.search(rf"(^|/){rule.pattern}$", path):
            return rule
    raise ValueError(f"no sharding rule for parameter {path}")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of parameters, optimizer moments or a whole state (arrays or shapes).

    Raises ValueError as `spec_of` does.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def param_shardings(mesh: Mesh) -> Callable[[Any], Any]:
    """The function that `chroma_jax.checkpoint.load(..., shardings=...)` wants: abstract model -> shardings."""
    return lambda model: shardings(model, mesh)


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of KV caches: rows over "data" and "fsdp", kv heads over "tensor".

    Leaves are [L, B, S, C] (keys and values, heads side by side) or [B] (lengths). An axis that does not divide is left out.
    """

    def one(leaf):
        spec = P(None, ROW_AXES, None, "tensor") if len(leaf.shape) == 4 else ROWS
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh.shape))

    return jax.tree.map(one, cache)


def row_shards(mesh: Mesh | None) -> int:
    """Into how many parts the mesh cuts a batch."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROW_AXES)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Pins the layout of an activation inside jit, under `jax.set_mesh`; without one of our meshes it returns x as it is.

    Axes beyond the spec are whole. A mesh axis that does not divide its dimension is left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != set(MESH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, _fit(spec, x.shape, mesh.shape))


def _fit(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    padded = (*spec, *(None for _ in range(len(shape) - len(spec))))

    def fits(axes, size):
        names = axes if isinstance(axes, tuple) else (axes,)
        return axes is None or size % math.prod(sizes[name] for name in names) == 0

    pairs = zip(padded, shape, strict=True)
    return P(*(axes if fits(axes, size) else None for axes, size in pairs))


def _shown(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())
