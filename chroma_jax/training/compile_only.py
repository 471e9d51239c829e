"""Compiles the real training step for a TPU slice on a machine that has none, and reports what it would need and do.

The `libtpu` package (extra `tpu`) holds the compiler and describes any slice. Nothing is run: parameters exist as shapes.

Times are the compiler's estimates and simple bounds, not measurements.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax import sharding
from chroma_jax.config import ChromaConfig
from chroma_jax.data.batch import Batch
from chroma_jax.training import flops, hlo
from chroma_jax.training.config import TrainConfig
from chroma_jax.training.step import build

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
    """What Google publishes of a TPU generation (cloud.google.com/tpu/docs), per chip.

    `clock`: cycles per second, from peak = 2 * multipliers * clock.
    """

    hbm: int  # bytes
    peak: float  # bfloat16 operations per second
    bandwidth: float  # HBM, bytes per second
    interconnect: float  # bytes per second, all links, one direction
    clock: float


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.2e12, 150e9, 1.05e9),
    "v5e": Chip(16 * GIB, 197e12, 0.82e12, 100e9, 1.5e9),
    "v5p": Chip(95 * GIB, 459e12, 2.77e12, 300e9, 1.75e9),
    "v6e": Chip(32 * GIB, 918e12, 1.64e12, 224e9, 1.75e9),
}


class BatchSize(NamedTuple):
    """Static sizes of a batch. With prompt and chunks 0, Reasoner states are precomputed."""

    rows: int
    text: int  # answer tokens
    frames: int  # answer frames, 12.5 per second
    voice_ids: int
    voice_frames: int
    prompt: int = 0  # question prompt and answer tokens
    chunks: int = 0  # two seconds of question audio each


def batch_shapes(cfg: ChromaConfig, size: BatchSize) -> Batch:
    """A batch of shapes."""
    audio, books = cfg.reasoner.audio, cfg.num_codebooks

    def of(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((size.rows, *shape), dtype)

    runs_reasoner = size.prompt > 0
    hidden = of(size.text, cfg.reasoner.text.hidden_size, dtype=jnp.bfloat16)
    chunks = of(size.chunks, audio.chunk_frames, audio.num_mel_bins, dtype=jnp.float32)
    return Batch(
        prompt_ids=of(size.prompt) if runs_reasoner else None,
        prompt_lengths=of() if runs_reasoner else None,
        chunks=chunks if runs_reasoner else None,
        chunk_lengths=of(size.chunks) if runs_reasoner else None,
        hidden=None if runs_reasoner else hidden,
        text=of(size.text),
        text_lengths=of(),
        frames=of(size.frames, books),
        frame_lengths=of(),
        voice_ids=of(size.voice_ids),
        voice_id_lengths=of(),
        voice_frames=of(size.voice_frames, books),
        voice_frame_lengths=of(),
        record_ids=None,
    )


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


def report(
    topology: str, cfg: ChromaConfig, train_cfg: TrainConfig, size: BatchSize, slices: int = 1
) -> dict[str, Any]:
    """Compiles the step and measures the program.

    Args:
      topology: see `topology_devices`.
      cfg: the model.
      train_cfg: the stage; its mesh is laid over the chips (default: all of them on "fsdp").
      size: the global batch.
      slices: number of such slices, joined by the data-center network.

    Returns:
      Numbers per chip unless their name says otherwise; bytes, seconds, operations. `fits` compares with the chip's HBM.

    Raises:
      ValueError: an unknown topology, a mesh or batch that does not divide. A program that does not fit the chip's memory
        is no error: `fits` is False and `error` says what the compiler said.
    """
    devices = topology_devices(topology, slices)
    chip = CHIPS[topology.partition(":")[0]]
    mesh = sharding.make_mesh(train_cfg.mesh or {"fsdp": -1}, devices)
    trainer = build(cfg, train_cfg, mesh)
    batch = batch_shapes(cfg, size)
    chips = len(devices)
    out: dict[str, Any] = dict(
        topology=topology,
        slices=slices,
        chips=chips,
        mesh=dict(mesh.shape),
        rows=size.rows,
        remat=train_cfg.remat,
        hbm_bytes=chip.hbm,
    )
    begin = time.monotonic()
    try:
        with _not_cached():
            compiled = trainer.lower(batch).compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e) and "memory" not in str(e).lower():
            raise
        return out | dict(fits=False, error=str(e).strip().splitlines()[0][:300])
    out["compile_seconds"] = time.monotonic() - begin

    memory = compiled.memory_analysis()
    # Frozen parameters that the step does not read (the Codec) are no arguments of the program, but they are held.
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(trainer.abstract())
    )
    arguments = max(memory.argument_size_in_bytes, held)
    peak = (
        arguments
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    cost = compiled.cost_analysis() or {}
    counts = hlo.count(compiled.as_text())
    # In a ring an all-reduce is a reduce-scatter and an all-gather; the others pass their bytes once.
    passed = sum(
        nbytes * (2 if kind == "all-reduce" else 1)
        for kind, (_, nbytes) in counts.collectives.items()
    )
    executed = flops.flops(trainer._train, *trainer.abstract(), batch) / chips
    plain = build(cfg, _without_remat(train_cfg), None)
    needed = flops.flops(plain._train, *plain.abstract(), batch) / chips

    bounds = {
        "compute": executed / chip.peak,
        "memory": counts.hbm_bytes / chip.bandwidth,
        "interconnect": passed / chip.interconnect,
    }
    compiler = None if counts.cycles is None else counts.cycles / chip.clock
    seconds = max(compiler or 0.0, *bounds.values())
    positions = size.voice_ids + size.voice_frames + 3 + 2 * size.text + size.frames
    audio = size.rows * size.frames / cfg.codec.frame_rate
    return out | dict(
        fits=peak <= chip.hbm,
        held_bytes=arguments,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        peak_bytes=peak,
        flops_executed=executed,
        flops_needed=needed,
        bytes_moved=counts.hbm_bytes,
        collectives=counts.collectives,
        # The compiler's own sum counts loop bodies once, and may be negative where it has no cost for an operation.
        optimal_seconds_loops_once=cost.get("optimal_seconds"),
        compiler_seconds=compiler,
        bounds=bounds,
        limit=max(bounds, key=bounds.get),
        seconds=seconds,
        tokens_per_second=size.rows * positions / seconds / chips,
        audio_seconds_per_second=audio / seconds / chips,
        mfu=needed / chip.peak / seconds,
    )


@contextlib.contextmanager
def _not_cached() -> Iterator[None]:
    """Without a chip a program can be put into the persistent compilation cache, but not read from it."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _without_remat(train_cfg: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train_cfg, remat="none", mesh=None)


def markdown(results: dict[str, Any]) -> str:
    """One report as a table of two columns."""
    r = results
    mesh = " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items())
    rows = [
        ("slice", f"{r['topology']}" + (f" x {r['slices']}" if r["slices"] > 1 else "")),
        ("chips", r["chips"]),
        ("mesh", mesh),
        ("rows per step", r["rows"]),
        ("remat", r["remat"]),
    ]
    if "error" in r:
        rows.append(("does not compile", r["error"]))
    else:
        share = r["peak_bytes"] / r["hbm_bytes"]
        kinds = [
            f"{kind}: {number} of {_amount(nbytes, 'B')} in all"
            for kind, (number, nbytes) in r["collectives"].items()
        ]
        bounds = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in r["bounds"].items())
        compiler = r["compiler_seconds"]
        rows += [
            ("fits", "yes" if r["fits"] else "NO"),
            ("memory per chip", f"{r['peak_bytes'] / GIB:.2f} of {r['hbm_bytes'] / GIB:.0f} GiB ({share:.0%})"),
            ("of it state, temporaries", f"{r['held_bytes'] / GIB:.2f}, {r['temporary_bytes'] / GIB:.2f} GiB"),
            ("operations per chip, with remat", _amount(r["flops_executed"], "FLOP")),
            ("operations per chip, needed", _amount(r["flops_needed"], "FLOP")),
            ("HBM traffic per chip", _amount(r["bytes_moved"], "B")),
            ("collectives per chip", "; ".join(kinds) or "none"),
            ("lower bounds", bounds),
            ("limited by", r["limit"]),
            ("compiler's estimate, loops counted", f"{1e3 * compiler:.1f} ms" if compiler else "unknown"),
            ("estimated step", f"{1e3 * r['seconds']:.1f} ms"),
            ("positions per second per chip", f"{r['tokens_per_second']:,.0f}"),
            ("audio seconds per second per chip", f"{r['audio_seconds_per_second']:,.1f}"),
            ("estimated MFU", f"{r['mfu']:.1%}"),
            ("compile time", f"{r['compile_seconds']:.0f} s"),
        ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _amount(value: float, unit: str) -> str:
    """12345678 -> "12.3 MB"."""
    power = min(max(int(math.log10(value) // 3), 0), 5) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {'kMGTP'[power - 1] if power else ''}{unit}"
