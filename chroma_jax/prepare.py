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

from chroma_jax import cli


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the command only: other commands have flags of the same names."""
    to = dict(flag_values=values)
    cli.path_flag("manifest", None, "JSON lines, one spoken answer each", **to)
    cli.path_flag("checkpoint", None, "directory or Hub id of the weights", **to)
    cli.path_flag("out", None, "directory of the dataset", **to)
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
        number, count = _join(given.coordinator, count, number)

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

    def meet(problem: str = "") -> None:
        _meet(moments.pop(0), problem, number, count)

    try:
        done = prepare(
            *request, process_id=number, num_processes=count, only_finish=given.finish, say=_say, before_loading=meet
        )  # fmt: skip
    except _OtherFailedError:
        raise
    except (ValueError, OSError) as e:
        _say(f"process {number} failed and waits for the others: {e}")
        meet(str(e))  # they need not go on
        raise
    while moments:
        meet()
    if done is None and number == 0:
        prepare(*request, only_finish=True, say=_say)  # now all shards are there


class _OtherFailedError(ValueError):
    """Another process of the job met an error."""


def _join(coordinator: str | None, count: int, number: int) -> tuple[int, int]:
    """Joins the job: (id of this process, number of processes)."""
    import jax

    # Finished shards stay, so SIGTERM may end a process as ever: nothing needs to be saved.
    jax.config.update("jax_enable_preemption_service", False)
    asked = {}
    if coordinator:
        asked = dict(coordinator_address=coordinator, num_processes=count, process_id=number)
    jax.distributed.initialize(**asked)
    return jax.process_index(), jax.process_count()


def _meet(moment: str, problem: str, number: int, count: int) -> None:
    """Waits for all processes, however far behind; raises _OtherFailedError if another one has a problem."""
    # JAX's public barriers are collectives, which do not wait for long on every platform.
    from jax._src import distributed

    service, key = distributed.global_state.client, f"chroma_jax.prepare/{moment}"
    service.key_value_set(f"{key}/{number}", f"{problem}.")  # an empty value is none
    service.wait_at_barrier(key, 7 * 24 * 3600 * 1000)
    said = [service.blocking_key_value_get(f"{key}/{i}", 60_000)[:-1] for i in range(count)]
    failed = [i for i, theirs in enumerate(said) if theirs]
    if failed and not problem:
        raise _OtherFailedError(f"process {failed[0]} failed: {said[failed[0]]}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
