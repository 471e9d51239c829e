"""Compiling for TPU slices without one, and the counting of what the program does."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import small_training as small

from chroma_jax.training import compile_only, flops, hlo, tpu
from chroma_jax.training.compile_only import BatchSize
from chroma_jax.training.run_config import DataConfig

SIZE = BatchSize(rows=8, text=3, frames=6, voice_ids=3, voice_frames=2)
needs_libtpu = pytest.mark.skipif(not tpu.available(), reason="needs the TPU compiler (libtpu)")


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


MODULE = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%slice_of_stack (p: f32[6,100], i: s32[]) -> f32[1,100] {
  %p0 = f32[6,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %ds = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,100}
}

%cond (t: (s32[], f32[6,100])) -> pred[] {
  %t0 = (s32[], f32[6,100]) parameter(0)
  %limit = s32[] constant(6)
  %i0 = s32[] get-tuple-element(%t0), index=0
  ROOT %lt = pred[] compare(%i0, %limit), direction=LT
}

%body (t: (s32[], f32[6,100])) -> (s32[], f32[6,100]) {
  %t1 = (s32[], f32[6,100]) parameter(0)
  %i1 = s32[] get-tuple-element(%t1), index=0
  %stack = f32[6,100]{1,0} get-tuple-element(%t1), index=1
  %row = f32[1,100]{1,0} fusion(%stack, %i1), kind=kLoop, calls=%slice_of_stack, backend_config={"estimated_cycles":"10"}
  %ag = f32[4,100]{1,0:T(8,128)S(1)} all-gather(%row), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %out = (s32[], f32[6,100]) tuple(%i1, %stack)
}

ENTRY %main (x: f32[6,100]) -> f32[6,100] {
  %x = f32[6,100]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[6,100]) tuple(%zero, %x)
  %loop = (s32[], f32[6,100]) while(%init), condition=%cond, body=%body
  %y = f32[6,100]{1,0} get-tuple-element(%loop), index=1
  %ar = f32[6,100]{1,0} all-reduce(%y), channel_id=2, to_apply=%add, backend_config={"estimated_cycles":"7"}
  ROOT %z = f32[6,100]{1,0} negate(%ar)
}
"""


def test_a_program_is_counted_with_its_loops():
    counts = hlo.count(MODULE)
    assert counts.collectives == {"all-gather": (6, 6 * 1600), "all-reduce": (1, 2400)}
    assert counts.cycles == 6 * 10 + 7
    # In the loop: a row read and written by the fusion (with its index) and read by the gather, whose result is not in main memory.
    in_loop = 6 * (400 + 4 + 400 + 400)
    assert counts.hbm_bytes == in_loop + 2 * 2400 + 2 * 2400


PARTS = """HloModule m, is_scheduled=true

%inner (p: f32[6,100], i: s32[]) -> f32[100] {
  %p0 = f32[6,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %ds = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,100}
  ROOT %b = f32[100]{0} bitcast(%ds)
}

%outer (p: f32[6,100], i: s32[]) -> f32[100] {
  %q0 = f32[6,100]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %f = f32[100]{0} fusion(%q0, %q1), kind=kLoop, calls=%inner
  ROOT %n = f32[100]{0} negate(%f)
}

%two_results (p: f32[6,100], i: s32[], x: f32[100]) -> (f32[6,100], f32[100]) {
  %r0 = f32[6,100]{1,0} parameter(0)
  %r1 = s32[] parameter(1)
  %r2 = f32[100]{0} parameter(2)
  %new = f32[1,100]{1,0} bitcast(%r2)
  %dus = f32[6,100]{1,0} dynamic-update-slice(%r0, %new, %r1, %r1)
  ROOT %both = (f32[6,100]{1,0}, f32[100]{0}) tuple(%dus, %r2)
}

%part (p: s8[800]) -> s8[80] {
  %s0 = s8[800]{0} parameter(0)
  ROOT %s = s8[80]{0:T(8)S(1)} slice(%s0), slice={[0:80]}
}

ENTRY %main (x: f32[6,100], i: s32[], w: s8[800]) -> f32[6,100] {
  %x = f32[6,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = s8[800]{0} parameter(2)
  OPERATION
}
"""


@pytest.mark.parametrize(
    ("operation", "nbytes"),
    [
        # A part, the index, and the result; one is 400 bytes, the whole 2400.
        ("%y = f32[100]{0} fusion(%x, %i), kind=kLoop, calls=%outer", 400 + 4 + 400),
        # What is written in place, and a second result, from a value read once.
        (
            "%y = (f32[6,100]{1,0}, f32[100]{0}) fusion(%x, %i, %f), kind=kLoop, calls=%two_results",
            400 + 400 + 4,
        ),
        # Into other memory.
        ("%y = ((s8[800]{0}), s8[80]{0:T(8)S(1)}, s32[]{:S(2)}) async-start(%w), calls=%part", 80),
        ("%y = s8[80]{0:T(8)S(1)} async-done(%w)", 0),
    ],
    ids=["nested slice", "update in place", "prefetch", "its end"],
)
def test_parts_of_values(operation, nbytes):
    assert hlo.count(PARTS.replace("OPERATION", operation)).hbm_bytes == nbytes


def test_kernels_are_told_apart():
    call = (
        "%splash_mha_fwd.1 = (bf16[1,2,1280,64]{3,2,1,0}) custom-call(%i, %q), "
        'custom_call_target="tpu_custom_call", frontend_attributes={}'
    )
    q = "%q = bf16[1,2,64,1280]{3,2,1,0:T(8,128)S(1)} bitcast(%x)"
    (kernel,) = hlo.count(PARTS.replace("OPERATION", f"{q}\n  {call}")).kernels
    assert kernel == hlo.Kernel("splash_mha_fwd.1", 1, ((), (1, 2, 64, 1280)))
    chip = tpu.CHIPS["v5e"]._replace(attention=(3.0, 7.0))
    # Three of four blocks of 640 x 640, twice.
    assert tpu.kernel_cycles(kernel, chip) == 2 * 3 * 640**2 / 1024 * 3.0
    back = kernel._replace(name="splash_mha_dkv_no_residuals")
    assert tpu.kernel_cycles(back, chip) == 2 * 4 * 640**2 / 1024 * 7.0
    assert tpu.kernel_cycles(kernel._replace(name="other"), chip) == 0


def test_a_collective_in_pieces_is_counted_once():
    piece = "  %ag2 = f32[4,100]{1,0} all-gather(%row), channel_id=1, dimensions={0}\n  ROOT %out"
    assert hlo.count(MODULE.replace("  ROOT %out", piece)).collectives["all-gather"][0] == 6
    # Another kind under the same channel (the edges that a padded reduce-scatter exchanges) is another collective.
    other = piece.replace("all-gather", "collective-permute")
    both = hlo.count(MODULE.replace("  ROOT %out", other)).collectives
    assert both["all-gather"] == (6, 6 * 1600) and both["collective-permute"][0] == 6


def test_what_collectives_run_beside():
    alone = {t.kind: t.overlapped for t in hlo.count(MODULE).transfers}
    assert alone == {"all-gather": False, "all-reduce": False}
    halves = MODULE.replace(" all-reduce(", " all-reduce-start(")
    assert {t.kind: t.overlapped for t in hlo.count(halves).transfers}["all-reduce"]
    fused = MODULE.replace("dynamic_slice_sizes={1,100}", "dynamic_slice_sizes={1,100}\n  %in = f32[2]{0} all-to-all(%ds), channel_id=9")  # fmt: skip
    assert {t.kind: t.overlapped for t in hlo.count(fused).transfers}["all-to-all"]


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("replica_groups={}", None),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", None),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1)),
    ],
)
def test_groups_of_collectives(written, group):
    text = MODULE.replace("to_apply=%add, backend", f"{written}, to_apply=%add, backend")
    found = {t.kind: t.group for t in hlo.count(text).transfers}
    assert found == {"all-gather": (0, 1, 2, 3), "all-reduce": group}


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


def test_the_size_of_a_configurations_batch():
    data = DataConfig(
        train="d", batch_size=8, num_shapes=1, max_prompt=1280, max_chunks=9, max_text=250, max_frames=512
    )  # fmt: skip
    size = compile_only.size_of(data)
    assert (size.rows, size.text, size.frames) == (8, 256, 512) and size.prompt >= 1280
    assert size.chunks >= 9 and size.voice_frames >= 125 and size.voice_ids >= 96
    hidden = compile_only.size_of(data, rows=64, hidden=True)
    assert (hidden.rows, hidden.prompt, hidden.chunks, hidden.text) == (64, 0, 0, 256)
    unbounded = dataclasses.replace(data, max_frames=None)
    with pytest.raises(ValueError, match="set data.max_text and data.max_frames"):
        compile_only.size_of(unbounded)


@pytest.mark.parametrize("name", ["v5e", "h100:8", "v9:2x2"])
def test_unknown_topologies(name):
    with pytest.raises(ValueError, match=f"topology {name!r} must be v4, v5e, v5p, v6e"):
        tpu.topology_devices(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(tpu, "available", lambda: False)
    with pytest.raises(ValueError, match="needs the libtpu package"):
        tpu.topology_devices("v5e:2x2")


@needs_libtpu
def test_report():
    config = small.train_config(
        compute_dtype="bfloat16",
        reasoner_dtype="bfloat16",
        remat="full",
        mesh={"data": 2, "fsdp": 2},
    )
    report = compile_only.report("v5e:2x2", small.CONFIG, config, SIZE)
    assert report["chips"] == 4 and report["fits"]
    assert 0 < report["held_bytes"] < report["peak_bytes"] < report["hbm_bytes"]
    # Parameters are gathered and gradients summed over "data".
    assert "all-gather" in report["collectives"]
    assert 0 < report["flops_needed"] < report["flops_executed"] < 1.5 * report["flops_needed"]
    assert report["bytes_moved"] > 0
    bounds = report["bounds"]
    assert bounds[report["limit"]] == max(bounds.values())
    assert report["compiler_seconds"] > 0
    waits = report["waiting_seconds"]
    assert (
        report["seconds"] >= max(report["compiler_seconds"], bounds["memory"]) + waits > waits > 0
    )
    assert 0 < report["mfu"] < 1
    table = compile_only.markdown(report)
    assert re.search(r"\| memory per chip \| \d+\.\d\d of 16 GiB", table)
    with pytest.raises(ValueError, match="8 places for 4 devices"):
        compile_only.report("v5e:2x2", small.CONFIG, small.change(config, mesh={"fsdp": 8}), SIZE)


@pytest.mark.slow
@needs_libtpu
def test_long_sequences_take_the_kernel():
    """Divided over rows and heads; the Decoder, whose sequences are short, does not."""
    heads = dataclasses.replace(small.CONFIG.backbone.llama, head_dim=64, max_positions=1024)
    cfg = dataclasses.replace(
        small.CONFIG, backbone=dataclasses.replace(small.CONFIG.backbone, llama=heads)
    )
    config = small.train_config(compute_dtype="bfloat16", mesh={"fsdp": 2, "tensor": 2})
    size = SIZE._replace(rows=4, text=100, frames=300)
    assert compile_only.report("v5e:2x2", cfg, config, size, codegen=False)["kernel_seconds"] > 0
    short = compile_only.report("v5e:2x2", cfg, config, SIZE, codegen=False)
    assert short["kernel_seconds"] == 0


@pytest.mark.slow
@needs_libtpu
def test_a_program_that_uses_the_sparse_cores():
    """v5p gathers there, with instructions that jaxlib does not read back."""
    config = small.train_config(mesh={"fsdp": -1})
    size = SIZE._replace(rows=4)
    report = compile_only.report("v5p:2x2x1", small.CONFIG, config, size)
    assert report["fits"] and report["hbm_bytes"] == 95 * 2**30
    early = compile_only.report("v5p:2x2x1", small.CONFIG, config, size, codegen=False)
    assert early["compiler_seconds"] is None and early["seconds"] > 0
    # The other process multiplies in another precision than the tests: sizes differ, numbers do not.
    counts = [{k: n for k, (n, _) in r["collectives"].items()} for r in (early, report)]
    assert counts[0] == counts[1]
    assert 0 < early["held_bytes"] < early["peak_bytes"]


@needs_libtpu
def test_topologies_that_the_compiler_does_not_know():
    with pytest.raises(ValueError, match="libtpu does not describe topology 'v5e:3x17'"):
        tpu.topology_devices("v5e:3x17")
