"""Converts checkpoints between PyTorch and chroma_jax.

    python -m chroma_jax.convert --source=DIR_OR_HUB_ID --out=DIR [--dtype=bfloat16] [--quantize=int8]
    python -m chroma_jax.convert --export --source=CONVERTED_DIR --out=DIR

The first form reads a Chroma checkpoint of the Hub's layout (config.json and safetensors), from a directory or from the
Hub (--source=FlashLabs/Chroma-4B), and writes a directory of ours. The second form writes such a directory as a checkpoint
that PyTorch reads, bit by bit what was converted. The output appears only when it is complete.

Exit code 2 and one line on standard error for anything that you can mend: wrong usage, a damaged or foreign checkpoint, an
output that cannot be written.
"""

from __future__ import annotations

import signal
import sys
import time

from absl import flags

from chroma_jax import cli


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the command only: other commands have flags of the same names."""
    to = dict(flag_values=values)
    cli.path_flag("source", None, "what to convert: a directory, or a Hub id such as FlashLabs/Chroma-4B", **to)  # fmt: skip
    cli.path_flag("out", None, "the directory to make", **to, remote=True)
    flags.DEFINE_enum(
        "dtype",
        None,
        ["bfloat16", "float32", "float16"],
        "what Reasoner, Backbone and Decoder are stored in (the Codec keeps its dtype); default: every tensor keeps its dtype",
        **to,
    )
    flags.DEFINE_enum(
        "quantize",
        None,
        ["int8", "fp8"],
        "hold kernels and tables in eight bits, for generation only; default: as they are",
        **to,
    )
    flags.DEFINE_bool("export", False, "the other way: from a converted directory to a PyTorch checkpoint", **to)  # fmt: skip
    flags.DEFINE_bool("overwrite", False, "replace the checkpoint that is at --out", **to)


def main(given: flags.FlagValues = flags.FLAGS) -> None:
    """The command, once flags are parsed."""
    for name in ("source", "out"):
        if not given[name].value:
            raise cli.CommandError(f"--{name} is missing (--help lists the flags)")
    if given.export and (given.dtype or given.quantize):
        name = "dtype" if given.dtype else "quantize"
        raise cli.CommandError(
            f"--export writes the dtypes that were converted; it takes no --{name}"
        )

    # Work for the host alone: an accelerator stays free for whoever uses it.
    import jax

    jax.config.update("jax_platforms", "cpu")
    from chroma_jax import checkpoint

    # As for Ctrl-C: what is half written is swept away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    start = time.perf_counter()
    try:
        if given.export:
            checkpoint.export(given.source, given.out, overwrite=given.overwrite)
        else:
            checkpoint.convert(
                given.source,
                given.out,
                given.dtype,
                overwrite=given.overwrite,
                say=_say,
                quantize=given.quantize,
            )
    except checkpoint.CheckpointError as e:
        summary, *details = str(e).splitlines()
        for line in details:
            _say(line)
        raise cli.CommandError(summary) from e
    _say(f"wrote {given.out} in {time.perf_counter() - start:.1f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
