"""Compiles prefill and one beat of the published sizes for a TPU, on a machine that has none, and prints what they need.

    pip install libtpu
    python benchmarks/tpu_compile.py [--topology=v6e:2x2] [--rows=1,8,32] [--quantize=int8] [--json=tpu.json]

Shapes only: no weights are made. Memory is that of one chip that holds the whole model in bfloat16, or in eight bits; the
beat's state is updated in place, so what it needs beyond arguments is its temporaries. Milliseconds are the cycles that the
compiler expects over the chip's clock: an estimate, to compare programs with.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from chroma_jax import Sampling
from chroma_jax.config import chroma_4b
from chroma_jax.config.types import QUANTIZED
from chroma_jax.cost import hlo, tpu
from chroma_jax.cost.program import with_text
from chroma_jax.engine import beat
from chroma_jax.engine.sampling import controls
from chroma_jax.model.chroma import abstract_model


def shapes(rows: int, quantize: str | None = None):
    """Model and arguments of prefill: an 8-second question, an 8-second voice, room for a 40-second answer."""
    config = chroma_4b().with_dtype("bfloat16").with_quantized(quantize)
    audio, books = config.reasoner.audio, config.num_codebooks
    array, ints = jax.ShapeDtypeStruct, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    prompt = beat.Prompt(
        ids=ints(rows, 256),
        lengths=ints(rows),
        chunks=array((rows, 4, audio.chunk_frames, audio.num_mel_bins), jnp.float32),
        chunk_lengths=ints(rows, 4),
        voice_ids=ints(rows, 64),
        voice_id_lengths=ints(rows),
        voice_frames=ints(rows, 128, books),
        voice_frame_lengths=ints(rows),
    )
    sampling = controls([Sampling(temperature=0.7, top_k=50)] * rows)
    sampling = jax.tree.map(lambda x: array(x.shape, x.dtype), sampling)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    return abstract_model(config), (prompt, sampling, keys, ints(rows))


def main() -> None:
    """Prints the table and writes JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v6e:2x2", help="one of its chips is used")
    parser.add_argument("--rows", default="1", metavar="N,M,...", help="streams in the batch")
    parser.add_argument("--quantize", choices=QUANTIZED, help="weights in eight bits")
    parser.add_argument("--json", type=os.path.expanduser, help="also write the table here")
    args = parser.parse_args()
    devices = tpu.topology_devices(args.topology)
    chip = devices[0]
    clock = tpu.of_device(args.topology, len(devices)).clock

    def on_chip(tree):
        place = SingleDeviceSharding(chip)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    rows = []
    for streams in map(int, args.rows.split(",")):
        model, arguments = shapes(streams, args.quantize)
        prefill = functools.partial(beat.prefill, reasoner_size=512, backbone_size=1536)
        state = jax.eval_shape(prefill, model, *arguments)
        programs = {
            "prefill": (jax.jit(prefill), (model, *arguments)),
            "beat": (jax.jit(beat.beat, donate_argnums=1), (model, state)),
        }
        for name, (program, inputs) in programs.items():
            start = time.perf_counter()
            compiled, text = with_text(program.lower(*on_chip(inputs)))
            seconds = time.perf_counter() - start
            memory, cycles = compiled.memory_analysis(), hlo.count(text).cycles
            rows.append(
                {
                    "streams": streams,
                    "program": name,
                    "compiler's estimate, ms": round(1e3 * cycles / clock, 1) if cycles else None,
                    "weights and inputs, GB": round(memory.argument_size_in_bytes / 1e9, 2),
                    "updated in place, MB": round(memory.alias_size_in_bytes / 1e6, 1),
                    "temporaries, MB": round(memory.temp_size_in_bytes / 1e6, 1),
                    "compilation, s": round(seconds, 1),
                }
            )
    print(f"jax {jax.__version__}, {chip.device_kind}, weights in {args.quantize or 'bfloat16'}\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if args.json:
        content = {"jax": jax.__version__, "device": chip.device_kind, "rows": rows}
        pathlib.Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
