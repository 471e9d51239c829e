"""Compiling for TPU slices without one."""

import dataclasses
import re

import pytest
import small_training as small

from chroma_jax.cost import tpu
from chroma_jax.training import compile_only
from chroma_jax.training.compile_only import BatchSize
from chroma_jax.training.run_config import DataConfig

SIZE = BatchSize(rows=8, text=3, frames=6, voice_ids=3, voice_frames=2)
needs_libtpu = pytest.mark.skipif(not tpu.available(), reason="needs the TPU compiler (libtpu)")


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
