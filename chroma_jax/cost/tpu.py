"""What is published of TPU chips and their links, and what libtpu describes of slices.

The `libtpu` package (extra `tpu`) holds the TPU compiler and describes any slice on any machine.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from chroma_jax.cost import hlo
from chroma_jax.model import splash

GIB = 2**30
# libtpu asks its machine what it is; these answers let it compile on any.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is claimed: several may compile at once
}


class Chip(NamedTuple):
    """What Google publishes of a TPU generation (cloud.google.com/tpu/docs, a page for each), per chip.

    `link` is the published interconnect bandwidth of a chip, halved if it is given for both directions, over its ports. `clock`
    is peak / (2 * multipliers): the compiler counts in cycles.

    `attention` is not published, but what libtpu 0.0.52 says when it simulates the schedule of the kernel of `model.splash` (its
    flag --xla_jf_dump_static_llo_profile_to) at 1280 positions of 64: cycles for a register of 1024 logits, forward and backward.
    v4 was not to be had: v5p's.
    """

    hbm: int  # bytes
    peak: float  # bfloat16 operations per second
    bandwidth: float  # HBM, bytes per second
    link: float  # bytes per second of one interconnect link, one direction
    network: float  # bytes per second between slices, one direction
    clock: float  # cycles per second
    attention: tuple[float, float]


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.2e12, 50e9, 3.1e9, 1.05e9, (4.7, 11.6)),
    "v5e": Chip(16 * GIB, 197e12, 0.819e12, 50e9, 3.1e9, 1.5e9, (8.8, 11.1)),
    "v5p": Chip(95 * GIB, 459e12, 2.765e12, 100e9, 6.25e9, 1.75e9, (4.7, 11.6)),
    "v6e": Chip(32 * GIB, 918e12, 1.638e12, 100e9, 12.5e9, 1.75e9, (6.0, 6.5)),
}
HOP = 1e-6  # seconds from chip to chip, before the first byte: a rule of thumb


def available() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def topology_devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a slice type such as "v5e:4x4", "v5p:2x2x4" or "v6e:16x16".

    Raises:
      ValueError: libtpu is not installed, or it knows no such topology.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS or ":" not in topology:
        raise ValueError(
            f"topology {topology!r} must be {', '.join(CHIPS)}, a colon and a shape, such as v5e:4x4"
        )
    if slices < 1:
        raise ValueError(f"the number of slices must be 1 or more, got {slices}")
    if not available():
        raise ValueError(
            "compiling for TPU needs the libtpu package: pip install 'chroma_jax[tpu]'"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except Exception as e:  # whatever the plugin raises, it is about the name
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(f"libtpu does not describe topology {topology!r}: {first}") from e


def of_device(topology: str, devices: int) -> Chip:
    """The figures of one device of a slice: a chip, or one core of it where libtpu counts cores (v4)."""
    generation, _, shape = topology.partition(":")
    cores = devices // math.prod(_dims(shape))
    chip = CHIPS[generation]
    return chip._replace(
        hbm=chip.hbm // cores,
        peak=chip.peak / cores,
        bandwidth=chip.bandwidth / cores,
        link=chip.link / cores,
        network=chip.network / cores,
    )


def kernel_cycles(kernel: hlo.Kernel, chip: Chip) -> float:
    """What one run of a kernel of `model.splash` takes; 0 for others.

    Forward it computes the blocks of logits that the causal mask leaves something of, backward all of them.
    """
    kinds = {"splash_mha_fwd": 0, "splash_mha_dkv": 1}
    kind = next((kinds[name] for name in kinds if kernel.name.startswith(name)), None)
    shapes = [shape for shape in kernel.operands if len(shape) == 4]
    if kind is None or not shapes:
        return 0.0
    rows, heads, _, width = shapes[0]  # of the queries
    share = splash.causal_share(width) if kind == 0 else 1.0
    return rows * heads * width**2 * share / 1024 * chip.attention[kind]


def _dims(shape: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.match(r"[\dx]+", shape)[0].strip("x").split("x"))


def torus(topology: str) -> tuple[bool, bool, bool]:
    """Whether each axis of a slice is closed to a ring: axes of 16 of v5e and v6e, all axes of v4 and v5p from 4x4x4 on."""
    generation, _, shape = topology.partition(":")
    dims = (*_dims(shape), 1, 1)[:3]
    if generation in ("v5e", "v6e"):
        return tuple(n == 16 for n in dims)
    return (all(n % 4 == 0 for n in dims),) * 3


def transfer_seconds(
    transfer: hlo.Transfer, devices: Sequence[Any], chip: Chip, closed: Sequence[bool]
) -> float:
    """How long one run of a collective takes at the published speed of the links.

    It goes over all axes that its group spans at once; at the end of an axis that is no ring a chip has one link instead of two,
    and sets the pace. A chip receives every byte but its own once, in an all-reduce twice. Between slices only a chip's own
    part goes over the network.

    Args:
      transfer: the collective.
      devices: device of each partition, with `coords` and, where there are several slices, `slice_index`.
      chip: figures.
      closed: see `torus`.
    """
    group = [devices[i] for i in transfer.group or range(len(devices))]
    slices = len({getattr(device, "slice_index", None) or 0 for device in group})
    chips = max(1, len(group) // slices)
    times = 2 if transfer.kind == "all-reduce" else 1
    seconds = 0.0
    if slices > 1:
        part = transfer.nbytes / chips
        seconds += times * part * (slices - 1) / slices / chip.network
    extents = [len({device.coords[axis] for device in group}) for axis in range(3)]
    if chips > 1:
        spans = [(n, ring) for n, ring in zip(extents, closed, strict=True) if n > 1]
        links = sum(2 if ring else 1 for _, ring in spans) or 1  # cores of one chip: as if a link
        hops = sum(n // 2 if ring else n - 1 for n, ring in spans)
        seconds += times * (
            transfer.nbytes * (chips - 1) / chips / (links * chip.link) + hops * HOP
        )
    return seconds
