"""TPU slices, their links, and what the compiler knows of them."""

from typing import NamedTuple

import pytest

from chroma_jax.cost import hlo, tpu

needs_libtpu = pytest.mark.skipif(not tpu.available(), reason="needs the TPU compiler (libtpu)")


class At(NamedTuple):
    coords: tuple[int, int, int]
    slice_index: int = 0


def test_the_time_of_collectives():
    chip = tpu.CHIPS["v5e"]
    square = [At((x, y, 0)) for x in range(4) for y in range(4)]
    hop = tpu.HOP

    def seconds(kind, group, closed=(False, False, False), devices=square):
        transfer = hlo.Transfer(kind, 1, 1600, group, True)
        return tpu.transfer_seconds(transfer, devices, chip, closed)

    # Both axes at once: two links into a corner. 15 of 16 parts come from elsewhere.
    both = 1500 / (2 * chip.link) + 6 * hop
    assert seconds("all-gather", None) == pytest.approx(both)
    assert seconds("all-reduce", tuple(range(16))) == pytest.approx(2 * both)
    # One axis, open and closed to a ring.
    assert seconds("all-gather", (0, 1, 2, 3)) == pytest.approx(1200 / chip.link + 3 * hop)
    ring = seconds("all-gather", (0, 4, 8, 12), (True, True, False))
    assert ring == pytest.approx(600 / chip.link + 2 * hop)
    assert seconds("all-gather", (5,)) == 0
    # Two slices: each chip sends its sixteenth over the network.
    two = [*square, *(device._replace(slice_index=1) for device in square)]
    network = 2 * 100 / 2 / chip.network
    assert seconds("all-reduce", None, devices=two) == pytest.approx(network + 2 * both)


@pytest.mark.parametrize(
    ("topology", "closed"),
    [
        ("v5e:4x4", (False, False, False)),
        ("v6e:16x16", (True, True, False)),
        ("v5e:8x16", (False, True, False)),
        ("v5p:2x2x4", (False, False, False)),
        ("v5p:4x4x8", (True, True, True)),
    ],
)
def test_axes_closed_to_rings(topology, closed):
    assert tpu.torus(topology) == closed


@pytest.mark.parametrize("name", ["v5e", "h100:8", "v9:2x2"])
def test_unknown_topologies(name):
    with pytest.raises(ValueError, match=f"topology {name!r} must be v4, v5e, v5p, v6e"):
        tpu.topology_devices(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(tpu, "available", lambda: False)
    with pytest.raises(ValueError, match="needs the libtpu package"):
        tpu.topology_devices("v5e:2x2")


@needs_libtpu
def test_topologies_that_the_compiler_does_not_know():
    with pytest.raises(ValueError, match="libtpu does not describe topology 'v5e:3x17'"):
        tpu.topology_devices("v5e:3x17")
