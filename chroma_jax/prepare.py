r"""Makes training data: a manifest of sound files and texts -> a dataset of dialogue records.

    python -m chroma_jax.prepare --manifest=data.jsonl --checkpoint=DIR_OR_HUB_ID --out=DIR

Each line of the manifest is one JSON object, paths relative to the manifest:

    {"question": "q/1.wav", "answer_text": "It is four.", "answer_audio": "a/1.wav", "speaker": "ada"}

or with "question_text" instead of a sound, and optionally "id", "language", "turns" (the earlier conversation), "voice_audio" and
"voice_text" (a reference recording). While training, a record's voice prompt is another answer of the same speaker; where there is none,
its own voice_audio; and where it has none, the answer itself.

Every row is checked before work starts. An interrupted run goes on where it was when it is started again. On several machines that
share a file system run the same command with --num_processes and --process_id (or with --distributed, or by one of launch/); the
process that ends last completes the dataset. Exit code 2 and one line on standard error for anything that you can mend.
"""

from __future__ import annotations

import dataclasses
import sys

from absl import flags

from chroma_jax import cli, jobs

_A_WEEK_MS = 7 * 24 * 3600 * 1000


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the command only: other commands have flags of the same names."""
    to = dict(flag_values=values)
    cli.path_flag("manifest", None, "JSON lines, one spoken answer each", **to)
    cli.path_flag("checkpoint", None, "directory or Hub id of the weights", **to, remote=True)
    cli.path_flag("out", None, "directory of the dataset", **to, remote=True)
    flags.DEFINE_enum("on_bad_row", "fail", ["fail", "skip"], "bad rows: stop, or leave out", **to)
    flags.DEFINE_enum("check", "full", ["full", "headers"], "before starting: read all sound, or only headers", **to)  # fmt: skip
    flags.DEFINE_bool("precompute_hidden", False, "run the Reasoner now: training never will", **to)
    flags.DEFINE_enum("hidden_dtype", "bfloat16", ["bfloat16", "float16", "float32"], "of the Reasoner's states", **to)  # fmt: skip
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of the Reasoner; default as stored", **to)  # fmt: skip
    flags.DEFINE_float("max_voice_seconds", 10.0, "longer voice prompts are cut", **to)
    flags.DEFINE_integer("max_voice_tokens", 96, "voice prompts with more text are cut", **to)
    flags.DEFINE_string("system_prompt", None, "replaces the default one; empty for none", **to)
    flags.DEFINE_integer("shard_size", 256, "rows per shard, what an interruption can lose", **to)
    flags.DEFINE_float("batch_seconds", 160.0, "sound that a device encodes at a time", **to)
    flags.DEFINE_integer("batch_tokens", 8192, "positions that a device thinks at a time", **to)
    flags.DEFINE_integer("threads", 8, "that read sound", **to)
    flags.DEFINE_integer("num_processes", 1, "processes that share the work", **to)
    flags.DEFINE_integer("process_id", 0, "which of them this is, from 0", **to)
    flags.DEFINE_bool("distributed", False, "take number and id of the process from jax.distributed", **to)  # fmt: skip
    flags.DEFINE_string("coordinator", None, "address for --distributed where it is not found by itself", **to)  # fmt: skip
    flags.DEFINE_bool("finish", False, "only complete a dataset whose shards are all there", **to)


def main(given: flags.FlagValues = flags.FLAGS) -> None:
    """The command, once flags are parsed."""
    for name in ("manifest", "checkpoint", "out"):
        if not given[name].value:
            raise cli.CommandError(f"--{name} is missing (--help lists the flags)")
    if given.coordinator and not given.distributed:
        raise cli.CommandError("--coordinator is for --distributed")
    number, count = given.process_id, given.num_processes
    if given.distributed:
        asked = {}
        if given.coordinator:
            asked = dict(
                coordinator_address=given.coordinator, num_processes=count, process_id=number
            )
        # Finished shards stay, so SIGTERM may end a process as ever: nothing needs to be saved.
        number, count = jobs.join(asked, saves_on_sigterm=False)

    from chroma_jax.data.prepare import Options, prepare

    fields = {field.name for field in dataclasses.fields(Options)} - {"system_prompt"}
    options = Options(**{name: given[name].value for name in fields})
    if given.system_prompt is not None:
        options = dataclasses.replace(options, system_prompt=given.system_prompt)
    request = (given.manifest, given.checkpoint, given.out, options)
    if not given.distributed:
        who = dict(process_id=number, num_processes=count)
        prepare(*request, **who, only_finish=given.finish, say=_say)
        return
    moments = ["checked", "done"]

    def meet() -> None:
        """Waits for all processes, however far behind."""
        jobs.client().wait_at_barrier(f"chroma_jax.prepare/{moments.pop(0)}", _A_WEEK_MS)

    with jobs.together():
        done = prepare(
            *request, process_id=number, num_processes=count, only_finish=given.finish, say=_say, before_loading=meet
        )  # fmt: skip
        while moments:
            meet()
        if done is None and number == 0:
            prepare(*request, only_finish=True, say=_say)  # now all shards are there


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
