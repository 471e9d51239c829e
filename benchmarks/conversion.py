"""Peak memory and time of the converter and of the export at the released model's size, against a plain file copy.

    python benchmarks/conversion.py [--dir=DIR] [--json=FILE] [--tiny]

Makes a random checkpoint of Chroma-4B's shapes and dtypes on disk (Reasoner in bfloat16, the rest in float32, vision tower
included, three shards, 14 GB), then, each with a cold page cache and ending with the data on the disk: copies its files,
converts it, exports the result, copies again; and compares the exported tensors with the source, bit by bit. Needs about
45 GB of free space in --dir (default: a temporary directory), and gives it back.

Memory is the process's peak resident set (ru_maxrss), and the peak of what it alone holds, sampled every 20 ms
(Anonymous in /proc/PID/smaps_rollup), which leaves out mapped files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags

from chroma_jax.checkpoint import params
from chroma_jax.checkpoint.safetensors_io import DTYPES, Writer, bits, read_tensor
from chroma_jax.checkpoint.torch_files import INDEX_FILE, open_torch
from chroma_jax.checkpoint.torch_table import leaf_for
from chroma_jax.config import ChromaConfig, chroma_4b, hf, tiny
from chroma_jax.model.chroma import abstract_model

_DIR = flags.DEFINE_string("dir", None, "where to work; default: a new temporary directory")
_JSON = flags.DEFINE_string("json", None, "file to write the figures to")
_TINY = flags.DEFINE_bool("tiny", False, "a tiny model: tries the program, measures nothing")

Tensors = dict[str, tuple[tuple[int, ...], np.dtype]]


def vision_tower() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the Thinker's vision tower: 32 blocks of width 1280."""
    width, ff, merged, out = 1280, 3420, 5120, 2048
    yield "thinker.visual.patch_embed.proj.weight", (width, 3, 2, 14, 14)
    for i in range(32):
        block = f"thinker.visual.blocks.{i}"
        for norm in ("norm1", "norm2"):
            yield f"{block}.{norm}.weight", (width,)
        linears = [(f"attn.{name}", width, width) for name in ("q", "k", "v", "proj")]
        linears += [
            ("mlp.gate_proj", ff, width),
            ("mlp.up_proj", ff, width),
            ("mlp.down_proj", width, ff),
        ]
        for name, rows, columns in linears:
            yield f"{block}.{name}.weight", (rows, columns)
            yield f"{block}.{name}.bias", (rows,)
    yield "thinker.visual.merger.ln_q.weight", (width,)
    for name, rows in (("mlp.0", merged), ("mlp.2", out)):
        yield f"thinker.visual.merger.{name}.weight", (rows, merged)
        yield f"thinker.visual.merger.{name}.bias", (rows,)


def checkpoint_tensors(cfg: ChromaConfig) -> Tensors:
    """Name -> shape and dtype of everything in a released checkpoint."""
    shapes = dict(vision_tower())
    for path, param in params.flatten(abstract_model(cfg)).items():
        leaf = leaf_for(path, param.shape)
        shapes |= dict.fromkeys(leaf.names, leaf.torch_shape)
    dtype = lambda name: DTYPES["BF16" if name.startswith("thinker.") else "F32"]  # noqa: E731
    return {name: (shape, dtype(name)) for name, shape in sorted(shapes.items())}


def nbytes(tensors: Tensors) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


def write_checkpoint(directory: str, cfg: ChromaConfig, tensors: Tensors, shards: int = 3) -> None:
    """Random weights: slices of one block of normal numbers, each tensor from an offset of its own."""
    rng = np.random.default_rng(0)
    block = (0.02 * rng.standard_normal(2**24)).astype(np.float32)
    blocks = {dtype: block.astype(dtype) for dtype in {dtype for _, dtype in tensors.values()}}
    files: list[Tensors] = [{} for _ in range(shards)]
    seen, total = 0, nbytes(tensors)
    for name, (shape, dtype) in tensors.items():
        files[min(seen * shards // total, shards - 1)][name] = (shape, dtype)
        seen += math.prod(shape) * dtype.itemsize
    weight_map = {}
    for i, content in enumerate(files, 1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        writer = Writer(os.path.join(directory, file), content)
        for name, (shape, dtype) in content.items():
            source, size = blocks[dtype], math.prod(shape)
            tensor, at = np.empty(size, dtype), 0
            offset = int(rng.integers(source.size))
            while at < size:
                piece = source[offset : offset + size - at]
                tensor[at : at + piece.size] = piece
                at, offset = at + piece.size, 0
            writer.write(name, tensor.reshape(shape))
            weight_map[name] = file
        writer.finish()
        writer.close()
    with open(os.path.join(directory, INDEX_FILE), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f)
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(hf.write(cfg), f)


def forget(directory: str) -> None:
    """Writes everything out and drops the directory's files from the page cache."""
    os.sync()
    for root, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(root, name), "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclasses.dataclass
class Run:
    """One measured step."""

    what: str
    seconds: float
    bytes_read: int
    bytes_written: int
    cpu_seconds: float
    peak_rss_gb: float | None = None
    peak_private_gb: float | None = None


def size_of(directory: str) -> int:
    return sum(
        os.path.getsize(os.path.join(r, n)) for r, _, names in os.walk(directory) for n in names
    )


def timed_copy(what: str, source: str, out: str) -> Run:
    forget(source)
    start, cpu = time.perf_counter(), time.process_time()
    os.makedirs(out)
    for name in os.listdir(source):
        shutil.copyfile(os.path.join(source, name), os.path.join(out, name))
    os.sync()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    run = Run(what, seconds, size_of(source), size_of(out), cpu)
    shutil.rmtree(out)
    return run


def timed_command(what: str, source: str, out: str, *args: str) -> Run:
    forget(source)
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "chroma_jax.convert",
        f"--source={source}",
        f"--out={out}",
        *args,
    ]
    process = subprocess.Popen(command)
    private = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        private = max(private, anonymous_bytes(process.pid))
        time.sleep(0.02)
    os.sync()
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Run(
        what,
        seconds,
        size_of(source),
        size_of(out),
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024 / 1e9,
        private / 1e9,
    )


def anonymous_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as f:
            return next(
                (int(line.split()[1]) * 1024 for line in f if line.startswith("Anonymous:")), 0
            )
    except OSError:  # it has just ended
        return 0


def differences(source: str, exported: str) -> tuple[int, int]:
    """Tensors compared, and how many of them differ, bit by bit. The vision tower is not expected back."""
    before = open_torch(source).tensors
    after = open_torch(exported).tensors
    wanted = {name for name in before if not name.startswith("thinker.visual.")}
    bad = len(wanted ^ set(after))
    for name in wanted & set(after):
        a, b = read_tensor(before[name]), read_tensor(after[name])
        same = a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))
        bad += not same
    return len(wanted), bad


def main(argv: list[str]) -> None:
    del argv
    load = os.getloadavg()
    cfg = tiny() if _TINY.value else chroma_4b()
    tensors = checkpoint_tensors(cfg)
    with tempfile.TemporaryDirectory(dir=_DIR.value and os.path.expanduser(_DIR.value)) as work:
        source, copy, converted, exported = (
            os.path.join(work, n) for n in ("source", "copy", "converted", "exported")
        )
        os.makedirs(source)
        write_checkpoint(source, cfg, tensors)
        runs = [timed_copy("plain copy", source, copy)]
        runs += [timed_command("convert", source, converted)]
        runs += [timed_copy("plain copy again", source, copy)]
        runs += [timed_command("export", converted, exported, "--export")]
        compared, bad = differences(source, exported)
    copy_seconds = (runs[0].seconds + runs[2].seconds) / 2
    print(
        f"\n{len(tensors)} tensors, {nbytes(tensors) / 1e9:.2f} GB; {os.cpu_count()} CPU cores, "
        f"load before {load[0]:.1f}, after {os.getloadavg()[0]:.1f}\n"
    )
    print(
        "| step | read | written | time | times a copy | CPU time | peak resident | peak private |"
    )
    print("|---|---|---|---|---|---|---|---|")
    gb = lambda x: "" if x is None else f"{x:.2f} GB"  # noqa: E731
    for run in runs:
        print(
            f"| {run.what} | {gb(run.bytes_read / 1e9)} | {gb(run.bytes_written / 1e9)} | {run.seconds:.1f} s "
            f"| {run.seconds / copy_seconds:.2f} | {run.cpu_seconds:.1f} s | {gb(run.peak_rss_gb)} | {gb(run.peak_private_gb)} |"
        )
    print(f"\n{compared} exported tensors compared with the source: {bad} differ")
    if _JSON.value:
        figures = {
            "tensors": len(tensors),
            "bytes": nbytes(tensors),
            "cpu_count": os.cpu_count(),
            "python": platform.python_version(),
            "load_average": [load[0], os.getloadavg()[0]],
            "runs": [dataclasses.asdict(run) for run in runs],
            "compared": compared,
            "differ": bad,
        }
        with open(os.path.expanduser(_JSON.value), "w") as f:
            json.dump(figures, f, indent=1)
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
