r"""Trains Backbone and Decoder over the frozen Reasoner; with objective "text", a Reasoner; with "codec", a Codec (docs/codec.md).

    python -m chroma_jax.train --config=configs/debug.py --workdir=out/debug/speech
    python -m chroma_jax.train --config=configs/chroma_4b.py --workdir=DIR --config.data.train=DATA --config.data.batch_size=64
    python -m chroma_jax.train --config=configs/chroma_4b.py --compile_only=v5p:2x2x4

The same command started again goes on where the newest checkpoint stands. At the end the trained model is in WORKDIR/model, for
`python -m chroma_jax.generate --checkpoint=WORKDIR/model`. SIGTERM and Ctrl-C save after the step that is running, and end it with
exit code 143 or 130. On several machines run it on each with --distributed, or let one of launch/ do it. Exit code 2 and one line on
standard error for anything that you can mend.
"""

from __future__ import annotations

import logging as std_logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from chroma_jax import cli, jobs, paths


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the command only: other commands have flags of the same names."""
    try:
        from ml_collections import config_flags
    except ImportError:
        cli.fail("training needs ml_collections and more: pip install 'chroma_jax[train]'")
    to = dict(flag_values=values)
    # Keys are not its: `overrides` knows those that a file leaves out.
    config_flags.DEFINE_config_file("config", None, "file with get_config(); --config.key=value changes it", sys_argv=[], **to)  # fmt: skip
    cli.path_flag("workdir", None, "directory of the run: checkpoints, scalars, the trained model", **to, remote=True)  # fmt: skip
    flags.DEFINE_enum("export", "end", ["end", "now", "never"], "write WORKDIR/model: after the last step; now, without a step; never", **to)  # fmt: skip
    flags.DEFINE_bool("distributed", False, "one of several processes: calls jax.distributed.initialize", **to)  # fmt: skip
    flags.DEFINE_string("coordinator", None, "address:port of process 0, where --distributed cannot find it by itself", **to)  # fmt: skip
    flags.DEFINE_integer("num_processes", None, "with --coordinator: how many there are", **to)
    flags.DEFINE_integer("process_id", None, "with --coordinator: which this is, from 0", **to)
    flags.DEFINE_string("compile_only", None, "a TPU slice such as v5p:2x2x4: compile the step for it, report, and train nothing", **to)  # fmt: skip
    flags.DEFINE_integer("slices", 1, "with --compile_only: how many of them", lower_bound=1, **to)


def main(given: flags.FlagValues = flags.FLAGS, changes: Sequence[tuple[str, str]] = ()) -> None:
    """The command, once flags are parsed; `changes`: keys of the configuration and their values, as text."""
    if given.config is None:
        raise cli.CommandError("--config is missing, as in --config=configs/debug.py")
    if not (given.workdir or given.compile_only):
        raise cli.CommandError("--workdir is missing: name the directory of the run")
    asked = dict(
        coordinator_address=given.coordinator,
        num_processes=given.num_processes,
        process_id=given.process_id,
    )
    told = [value is not None for value in asked.values()]
    if any(told) and not (given.distributed and all(told)):
        raise cli.CommandError(
            "--coordinator, --num_processes and --process_id go together, with --distributed"
        )
    from chroma_jax.training.overrides import override
    from chroma_jax.training.run_config import RunConfig

    override(RunConfig, given.config, changes)
    config = RunConfig.from_dict(given.config)
    if given.compile_only:
        print(compile_only(config, given.compile_only, given.slices))
        return
    if given.distributed:
        jobs.join(asked if all(told) else {}, saves_on_sigterm=True)

    from chroma_jax.training.loop import train

    if not logging.vlog_is_on(1):
        # Orbax tells every thread's traceback of a save that fails; what fails is raised, too.
        logging.get_absl_logger().addFilter(
            lambda record: "orbax" not in record.pathname or record.levelno < std_logging.ERROR
        )
    with jobs.together():
        outcome = train(config, given.workdir, export=given.export, say=_say)
    if outcome.signal is not None:
        # As a shell says it: whoever started this process sees that there is more to do.
        sys.exit(128 + outcome.signal)


def compile_only(config: Any, topology: str, slices: int) -> str:
    """The report on a step with the configuration's largest batch, as a table."""
    from chroma_jax.training import compile_only as compiler

    if config.train.codec is not None:
        raise ValueError(
            "--compile_only compiles steps on dialogues, not those of objective 'codec'"
        )
    size = compiler.size_of(config.data)
    report = compiler.report(topology, config.model.sizes(), config.train, size, slices)
    return compiler.markdown(report)


def _say(line: str) -> None:
    print(line, flush=True)


def split_changes(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The command line, and what it changes in the configuration. Ends the command for a key without a value."""
    from chroma_jax.training.overrides import split

    try:
        return split(argv)
    except ValueError as e:
        cli.fail(e)


def check_config_file(argv: list[str]) -> None:
    """Opens a `~` in --config, and ends the command when that names no file. Left to absl, it would read as an unknown flag --config.key."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-config") or not (equals or argv[i + 1 : i + 2]):
            continue
        value = paths.expand(value if equals else argv[i + 1])
        if equals:
            argv[i] = f"{name}={value}"
        else:
            argv[i + 1] = value
        path = value.partition(":")[0]
        if path and not os.path.isfile(path):
            cli.fail(f"--config: {path}: no such file")


if __name__ == "__main__":
    check_config_file(sys.argv)
    define_flags()
    sys.argv, changes = split_changes(sys.argv)
    cli.run(lambda: main(changes=changes))
