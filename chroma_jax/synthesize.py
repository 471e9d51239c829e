r"""Makes spoken training data: questions and answers written, spoken in many voices, heard again, kept or refused.

    python -m chroma_jax.synthesize --config=configs/synthesis/mini_dialogue.py --out=DIR
    python -m chroma_jax.synthesize --config=configs/synthesis/mini_dialogue.py --out=DIR --runner=DirectRunner --runner_option=--direct_num_workers=2
    python -m chroma_jax.synthesize --config=configs/synthesis/mini_dialogue.py --out=DIR --so_far

DIR/train.jsonl and DIR/validation.jsonl are manifests for `python -m chroma_jax.prepare`, DIR/sounds.jsonl lists the clips for a codec's
training, DIR/report.json counts what was refused, by reason. A run that was killed goes on when it is started again. --so_far makes the
manifests of what is finished, while another process may still be at work. Exit code 2 and one line on standard error for anything that
you can mend.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from chroma_jax import cli
from chroma_jax.train import check_config_file, split_changes


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the command only: other commands have flags of the same names."""
    try:
        from ml_collections import config_flags
    except ImportError:
        cli.fail("synthesis needs ml_collections and more: pip install 'chroma_jax[synthesis]'")
    to = dict(flag_values=values)
    config_flags.DEFINE_config_file("config", None, "file with get_config(); --config.key=value changes it", sys_argv=[], **to)  # fmt: skip
    cli.path_flag("out", None, "directory of the data", **to)
    flags.DEFINE_string("runner", "", "a runner of Apache Beam, as DirectRunner; default: this process", **to)  # fmt: skip
    flags.DEFINE_multi_string("runner_option", [], "an option of Beam, as --direct_num_workers=2; may be repeated", **to)  # fmt: skip
    flags.DEFINE_bool("so_far", False, "make nothing; manifests of the shards that are done", **to)


def main(given: flags.FlagValues = flags.FLAGS, changes: Sequence[tuple[str, str]] = ()) -> None:
    """The command, once flags are parsed; `changes`: keys of the configuration and their values, as text."""
    for name in ("config", "out"):
        if not given[name].value:
            raise cli.CommandError(f"--{name} is missing (--help lists the flags)")
    from chroma_jax.synthesis import runner, shards
    from chroma_jax.synthesis.config import SynthesisConfig
    from chroma_jax.training.overrides import override

    override(SynthesisConfig, given.config, changes)
    config = SynthesisConfig.from_dict(given.config)
    if given.so_far:
        report = shards.finish(given.out, config, partly=True)
    else:
        report = runner.run(given.out, config, runner=given.runner, runner_options=given.runner_option, say=_say)  # fmt: skip
    print(runner.describe(report))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    check_config_file(sys.argv)
    define_flags()
    sys.argv, asked = split_changes(sys.argv)
    cli.run(lambda: main(changes=asked))
