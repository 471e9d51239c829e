"""Makes the checkpoint that training from scratch begins with: random weights, and a tokenizer and codebooks of the data.

    python -m chroma_jax.create --size=debug --manifest=data.jsonl --out=DIR

The manifest is that of `python -m chroma_jax.prepare`: its texts teach the tokenizer, its answers' sound sets the Codec's codebooks. The
directory is then the --checkpoint of prepare and of the first stage of training; nothing in it can speak yet. Exit code 2 and
one line on standard error for anything that you can mend.
"""

from __future__ import annotations

import sys

from absl import flags

from chroma_jax import cli


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the command only: other commands have flags of the same names."""
    from chroma_jax.training.run_config import SIZES

    to = dict(flag_values=values)
    flags.DEFINE_enum("size", None, sorted(SIZES), "of the model", **to)
    cli.path_flag("manifest", None, "JSON lines, one spoken answer each", **to)
    cli.path_flag("out", None, "directory of the checkpoint", **to)
    flags.DEFINE_integer("vocab_size", 1024, "tokens at most, bytes and control tokens included", **to)  # fmt: skip
    flags.DEFINE_float("codebook_seconds", 600.0, "sound that the codebooks are made from, at most", lower_bound=0.0, **to)  # fmt: skip
    cli.path_flag("ears", "", "whose first layers the audio encoder begins with: whisper-base, or a directory in CTranslate2's format", **to)  # fmt: skip
    cli.path_flag("codec", "", "a trained Codec in Mimi's layout, or a Chroma with one, to take as it is", **to)  # fmt: skip
    flags.DEFINE_integer("seed", 0, "of the weights", lower_bound=0, upper_bound=2**32 - 1, **to)
    flags.DEFINE_bool("overwrite", False, "replace the checkpoint that is at --out", **to)


def main(given: flags.FlagValues = flags.FLAGS) -> None:
    """The command, once flags are parsed."""
    for name in ("size", "manifest", "out"):
        if not given[name].value:
            raise cli.CommandError(f"--{name} is missing (--help lists the flags)")
    from chroma_jax.training.creation import create
    from chroma_jax.training.run_config import SIZES

    create(
        given.out,
        SIZES[given.size](),
        given.manifest,
        vocab_size=given.vocab_size,
        codebook_seconds=given.codebook_seconds,
        ears=given.ears,
        codec=given.codec,
        seed=given.seed,
        overwrite=given.overwrite,
        say=_say,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
