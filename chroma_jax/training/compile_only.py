"""Compiles the real training step for a TPU slice on a machine that has none, and reports what it would need and do.

The `libtpu` package (extra `tpu`) holds the compiler and describes any slice. Nothing is run: parameters exist as shapes.

Times are estimates, not measurements. The compiler says how many cycles each operation of its program takes, but not what it
expects of collectives: those are counted with the published speed of the links that they run over.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chroma_jax import sharding
from chroma_jax.config import ChromaConfig
from chroma_jax.cost import flops, hlo
from chroma_jax.cost.program import Memory, amount, bytes_held, compile_into, dumped, with_text
from chroma_jax.cost.tpu import (
    GIB,
    kernel_cycles,
    of_device,
    topology_devices,
    torus,
    transfer_seconds,
)
from chroma_jax.data.batch import Batch
from chroma_jax.data.plan import Shape, round_up
from chroma_jax.data.voices import VoiceLimits
from chroma_jax.training.config import TrainConfig
from chroma_jax.training.step import Trainer, build


class BatchSize(NamedTuple):
    """Static sizes of a batch. With prompt and chunks 0, Reasoner states are precomputed."""

    rows: int
    text: int  # answer tokens
    frames: int  # answer frames, 12.5 per second
    voice_ids: int
    voice_frames: int
    prompt: int = 0  # question prompt and answer tokens
    chunks: int = 0  # two seconds of question audio each


def size_of(data: Any, rows: int | None = None, hidden: bool | None = None) -> BatchSize:
    """The largest batch of a configuration.

    Args:
      data: the `data` of a `run_config.RunConfig`.
      rows: instead of its batch size.
      hidden: whether Reasoner states are precomputed; default: where it sets no `max_prompt`.

    Raises:
      ValueError: it does not bound the sizes of a batch.
    """
    if data.max_text is None or data.max_frames is None:
        raise ValueError(
            "--compile_only needs the size of a batch: set data.max_text and data.max_frames "
            "(and data.max_prompt and data.max_chunks unless Reasoner states are precomputed)"
        )
    hidden = not data.max_prompt if hidden is None else hidden
    voice = VoiceLimits()
    shape = round_up(
        Shape(
            prompt=data.max_prompt or 1,
            chunks=data.max_chunks or 1,
            text=data.max_text,
            frames=data.max_frames,
            voice_ids=voice.max_tokens,
            voice_frames=voice.max_frames,
        )
    )
    return BatchSize(
        rows=data.batch_size if rows is None else rows,
        text=shape.text,
        frames=shape.frames,
        voice_ids=shape.voice_ids,
        voice_frames=shape.voice_frames,
        prompt=0 if hidden else shape.prompt,
        chunks=shape.chunks if data.max_chunks and not hidden else 0,
    )


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


def report(
    topology: str,
    cfg: ChromaConfig,
    train_cfg: TrainConfig,
    size: BatchSize,
    slices: int = 1,
    codegen: bool = True,
) -> dict[str, Any]:
    """Compiles the step and measures the program.

    Args:
      topology: see `topology_devices`.
      cfg: the model.
      train_cfg: the stage; its mesh is laid over the chips (default: all of them on "fsdp").
      size: the global batch.
      slices: number of such slices, joined by the data-center network.
      codegen: False ends the compiler when program, schedule and memory are settled, before it makes machine code and counts
        cycles: nine tenths of its time. For looking around.

    Returns:
      Numbers per chip unless their name says otherwise; bytes, seconds, operations. `fits` compares with the chip's HBM.

    Raises:
      ValueError: an unknown topology, a mesh or batch that does not divide. A program that does not fit the chip's memory
        is no error: `fits` is False and `error` says what the compiler said.
    """
    devices = topology_devices(topology, slices)
    chip = of_device(topology, len(devices) // slices)
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
        make = _compiled if codegen else _scheduled
        text, memory, optimal = make(trainer, batch, (topology, cfg, train_cfg, size, slices))
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e) and "memory" not in str(e).lower():
            raise
        return out | dict(fits=False, error=str(e).strip().splitlines()[0][:300])
    out["compile_seconds"] = time.monotonic() - begin

    # Frozen parameters that the step does not read (the Codec) are no arguments of the program, but they are held.
    arguments = max(memory.arguments, bytes_held(trainer.abstract()))
    peak = arguments + memory.temporary + memory.code
    counts = hlo.count(text)
    beside, alone = (
        sum(
            t.runs * transfer_seconds(t, mesh.devices.ravel().tolist(), chip, torus(topology))
            for t in counts.transfers
            if t.overlapped == overlapped
        )
        for overlapped in (True, False)
    )
    executed = flops.flops(trainer._train, *trainer.abstract(), batch) / chips
    plain = build(cfg, _without_remat(train_cfg), None)
    needed = flops.flops(plain._train, *plain.abstract(), batch) / chips

    bounds = {
        "compute": executed / chip.peak,
        "memory": counts.hbm_bytes / chip.bandwidth,
        "interconnect": beside + alone,
    }
    kernels = sum(k.runs * kernel_cycles(k, chip) for k in counts.kernels) / chip.clock
    compiler = None if counts.cycles is None else counts.cycles / chip.clock + kernels
    # Without the compiler's word: one after the other.
    busy = compiler or bounds["compute"] + bounds["memory"] + kernels
    seconds = max(busy, bounds["compute"], bounds["memory"], beside) + alone
    positions = size.voice_ids + size.voice_frames + 3 + 2 * size.text + size.frames
    audio = size.rows * size.frames / cfg.codec.frame_rate
    return out | dict(
        fits=peak <= chip.hbm,
        held_bytes=arguments,
        temporary_bytes=memory.temporary,
        code_bytes=memory.code,
        peak_bytes=peak,
        flops_executed=executed,
        flops_needed=needed,
        bytes_moved=counts.hbm_bytes,
        collectives=counts.collectives,
        # The compiler's own sum counts loop bodies once, and may be negative where it has no cost for an operation.
        optimal_seconds_loops_once=optimal,
        compiler_seconds=compiler,
        kernel_seconds=kernels,
        waiting_seconds=alone,
        bounds=bounds,
        limit=max(bounds, key=bounds.get),
        seconds=seconds,
        tokens_per_second=size.rows * positions / seconds / chips,
        audio_seconds_per_second=audio / seconds / chips,
        mfu=needed / chip.peak / seconds,
    )


def _compiled(trainer: Trainer, batch: Batch, _) -> tuple[str, Memory, float | None]:
    """The program as text, its memory, and the compiler's own estimate of its time."""
    compiled, text = with_text(trainer.lower(batch))
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = Memory(
        memory.argument_size_in_bytes + new,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    return text, sizes, cost.get("optimal_seconds")


def _scheduled(trainer: Trainer, batch: Batch, call: tuple) -> tuple[str, Memory, None]:
    """The same of a program that has no machine code yet. Another process compiles, and is ended there."""
    with tempfile.TemporaryDirectory() as dump:
        process = multiprocessing.get_context("spawn").Process(
            target=_compile_again, args=(dump, *call), daemon=True
        )
        process.start()
        text = ""
        while not text and process.is_alive():
            process.join(0.5)
            if dumped(dump, "after_optimizations_after_buffer_assignment"):
                process.join(1.0)  # until it is written to its end
                text = dumped(dump, "after_optimizations_after_buffer_assignment")
        if not text:
            raise RuntimeError("the compiler ended without a program: see what it printed")
        usage = dumped(dump, "after_optimizations-memory-usage-report")
        process.kill()
        process.join()
    total = int(re.search(r"Total bytes: (\d+)", usage)[1])
    # Arguments, results and temporaries; the results are the state, which takes the place of arguments.
    state, _ = trainer.abstract()
    read = hlo.parameter_bytes(text)
    return text, Memory(read, max(0, total - read - bytes_held(state)), 0), None


def _compile_again(dump, topology, cfg, train_cfg, size, slices) -> None:
    mesh = sharding.make_mesh(train_cfg.mesh or {"fsdp": -1}, topology_devices(topology, slices))
    compile_into(build(cfg, train_cfg, mesh).lower(batch_shapes(cfg, size)), dump)


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
            f"{kind}: {number} of {amount(nbytes, 'B')} in all"
            for kind, (number, nbytes) in r["collectives"].items()
        ]
        bounds = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in r["bounds"].items())
        compiler = r["compiler_seconds"]
        rows += [
            ("fits", "yes" if r["fits"] else "NO"),
            ("memory per chip", f"{r['peak_bytes'] / GIB:.2f} of {r['hbm_bytes'] / GIB:.0f} GiB ({share:.0%})"),
            ("of it state, temporaries", f"{r['held_bytes'] / GIB:.2f}, {r['temporary_bytes'] / GIB:.2f} GiB"),
            ("operations per chip, with remat", amount(r["flops_executed"], "FLOP")),
            ("operations per chip, needed", amount(r["flops_needed"], "FLOP")),
            ("HBM traffic per chip", amount(r["bytes_moved"], "B")),
            ("collectives per chip", "; ".join(kinds) or "none"),
            ("lower bounds", bounds),
            ("limited by", r["limit"]),
            ("compiler's estimate without collectives", f"{1e3 * compiler:.1f} ms" if compiler else "unknown"),
            ("of it attention kernels", f"{1e3 * r['kernel_seconds']:.1f} ms"),
            ("waiting for collectives", f"{1e3 * r['waiting_seconds']:.1f} ms"),
            ("estimated step", f"{1e3 * r['seconds']:.1f} ms"),
            ("positions per second per chip", f"{r['tokens_per_second']:,.0f}"),
            ("audio seconds per second per chip", f"{r['audio_seconds_per_second']:,.1f}"),
            ("estimated MFU", f"{r['mfu']:.1%}"),
            ("compile time", f"{r['compile_seconds']:.0f} s"),
        ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
