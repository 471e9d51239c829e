r"""Trains Backbone and Decoder over the frozen Reasoner.

    python -m chroma_jax.train --config=configs/debug.py --workdir=out/debug/run
    python -m chroma_jax.train --config=configs/chroma_4b.py --workdir=DIR --config.data.train=DATA --config.data.batch_size=64
    python -m chroma_jax.train --config=configs/chroma_4b.py --compile_only=v5p:2x2x4

The same command started again goes on where the newest checkpoint stands. At the end the trained model is in WORKDIR/model, for
`python -m chroma_jax.generate --checkpoint=WORKDIR/model`. SIGTERM and Ctrl-C save after the step that is running. On several machines
run it on each with --distributed. Exit code 2 and one line on standard error for anything that you can mend.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from absl import flags, logging

from chroma_jax import cli


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the command only: other commands have flags of the same names."""
    try:
        from ml_collections import config_flags
    except ImportError:
        cli.fail("training needs ml_collections and more: pip install 'chroma_jax[train]'")
    to = dict(flag_values=values)
    config_flags.DEFINE_config_file("config", None, "file with get_config(); --config.key=value changes it", **to)  # fmt: skip
    flags.DEFINE_string("workdir", None, "directory of the run: checkpoints, scalars, the trained model", **to)  # fmt: skip
    flags.DEFINE_enum("export", "end", ["end", "now", "never"], "write WORKDIR/model: after the last step; now, without a step; never", **to)  # fmt: skip
    flags.DEFINE_bool("distributed", False, "one of several processes: calls jax.distributed.initialize", **to)  # fmt: skip
    flags.DEFINE_string("coordinator", None, "address:port of process 0, where --distributed cannot find it by itself", **to)  # fmt: skip
    flags.DEFINE_integer("num_processes", None, "with --coordinator: how many there are", **to)
    flags.DEFINE_integer("process_id", None, "with --coordinator: which this is, from 0", **to)
    flags.DEFINE_string("compile_only", None, "a TPU slice such as v5p:2x2x4: compile the step for it, report, and train nothing", **to)  # fmt: skip
    flags.DEFINE_integer("slices", 1, "with --compile_only: how many of them", lower_bound=1, **to)


def main(given: flags.FlagValues = flags.FLAGS) -> None:
    """The command, once flags are parsed."""
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
    from chroma_jax.training.run_config import RunConfig

    config = RunConfig.from_dict(given.config)
    if given.compile_only:
        print(compile_only(config, given.compile_only, given.slices))
        return
    if given.distributed:
        import jax

        jax.distributed.initialize(**(asked if all(told) else {}))

    from chroma_jax.training.loop import train

    if not logging.vlog_is_on(1):
        logging.set_verbosity(logging.WARNING)  # Orbax tells its life at each save
    outcome = train(config, given.workdir, export=given.export, say=_say)
    if outcome.signal == signal.SIGINT:
        sys.exit(130)


def compile_only(config: Any, topology: str, slices: int) -> str:
    """The report on a step with the configuration's largest batch, as a table."""
    from chroma_jax.data.plan import Shape, round_up
    from chroma_jax.data.voices import VoiceLimits
    from chroma_jax.training import compile_only as compiler

    data, voice = config.data, VoiceLimits()
    if data.max_text is None or data.max_frames is None:
        raise cli.CommandError(
            "--compile_only needs the size of a batch: set data.max_text and data.max_frames "
            "(and data.max_prompt and data.max_chunks unless Reasoner states are precomputed)"
        )
    shape = round_up(
        Shape(data.max_prompt or 1, data.max_chunks or 1, data.max_text, data.max_frames,
              voice.max_tokens, voice.max_frames)
    )  # fmt: skip
    size = compiler.BatchSize(
        rows=data.batch_size,
        text=shape.text,
        frames=shape.frames,
        voice_ids=shape.voice_ids,
        voice_frames=shape.voice_frames,
        prompt=shape.prompt if data.max_prompt else 0,
        chunks=shape.chunks if data.max_prompt and data.max_chunks else 0,
    )
    report = compiler.report(topology, config.model.sizes(), config.train, size, slices)
    return compiler.markdown(report)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
