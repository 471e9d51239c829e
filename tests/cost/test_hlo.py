"""What a compiled program does is read from its text."""

import pytest

from chroma_jax.cost import hlo, tpu

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
