r"""Judges speech and dialogue: one task a call, named first.

    python -m chroma_jax.evaluate speech --list=meta.lst --wavs=DIR --out=RESULTS       scores sounds that lie there
    python -m chroma_jax.evaluate listening --first=DIR --second=DIR --names=ours,theirs --out=SHEET      makes a page
    python -m chroma_jax.evaluate listening --key=SHEET/key.csv --answers=A.csv,B.csv --system=ours --out=RESULTS
    python -m chroma_jax.evaluate report --results=RESULTS,OTHERS --out=report.html     one page with tables and plots

`python -m chroma_jax.evaluate TASK --help` lists a task's flags. Every task writes each item's values as it goes to
`items.jsonl` (a run that was stopped goes on where it was), then `summary.json` and `table.md`. Exit code 2 and one line on
standard error for anything that you can mend.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable

from absl import flags

from chroma_jax import cli


class _Define:
    """The flags of a task: absl's, by kind."""

    def __init__(self, values: flags.FlagValues):
        self.string = functools.partial(flags.DEFINE_string, flag_values=values)
        self.path = functools.partial(cli.path_flag, flag_values=values)
        self.paths = functools.partial(cli.path_list_flag, flag_values=values)
        self.number = functools.partial(flags.DEFINE_float, flag_values=values)
        self.integer = functools.partial(flags.DEFINE_integer, flag_values=values)
        self.choice = functools.partial(flags.DEFINE_enum, flag_values=values)
        self.switch = functools.partial(flags.DEFINE_bool, flag_values=values)


def _wanted(given: flags.FlagValues, *names: str) -> None:
    for name in names:
        if not given[name].value:
            raise cli.CommandError(f"no --{name}: {given[name].help}")


def _judge_flags(define: _Define) -> None:
    define.string("words", "whisper-base", "the ASR: whisper-base, faster-whisper:DIR, or none")
    define.string(
        "speaker",
        "resemblyzer",
        "who judges voices: resemblyzer, wavlm-large:FILE, wavlm-base-plus-sv:DIR, or none",
    )
    define.string("mos", "distillmos", "who scores the sound: distillmos, dnsmos, utmos:FILE, or none")  # fmt: skip
    define.string("language", "en", "of the texts; zh counts characters")
    define.integer("workers", 1, "sounds scored side by side; no value depends on it", lower_bound=1)  # fmt: skip


def _ears(given: flags.FlagValues):
    from chroma_jax.evaluation.scoring import Ears, Names

    return Ears(Names(given.words, given.speaker, given.mos), given.language)


def _say(summary: dict) -> None:
    from chroma_jax.evaluation import tables

    print(tables.page(summary), flush=True)


# --- speech ---------------------------------------------------------------------------------------------------------------


def _speech_flags(define: _Define) -> None:
    define.path("list", None, "meta.lst (2 to 5 fields between |) or JSONL of what is spoken")
    define.path("wavs", None, "folder of <name>.wav to score")
    define.path("out", None, "folder of the results")
    define.string("system", None, "what the table calls it; default the folder's name")
    define.integer("seed", 0, "of the intervals", lower_bound=0)
    _judge_flags(define)


def _speech(given: flags.FlagValues) -> None:
    from chroma_jax.evaluation import speech
    from chroma_jax.evaluation.lists import read_list

    _wanted(given, "list", "out", "wavs")
    path, wavs = pathlib.Path(given.list), pathlib.Path(given.wavs)
    speech.check_texts(read_list(path), given.language, given.list)
    summary = speech.run(
        path,
        wavs,
        pathlib.Path(given.out),
        _ears(given),
        system=given.system or wavs.resolve().name,
        seed=given.seed,
        workers=given.workers,
    )
    _say(summary)


# --- listening ------------------------------------------------------------------------------------------------------------


def _listening_flags(define: _Define) -> None:
    define.string("first", None, "folder of <name>.wav of the system that is tested")
    define.string("second", None, "folder of <name>.wav of the one it is compared with")
    define.list("names", None, "what the results call the two, as ours,theirs")
    define.list("dimensions", ["naturalness"], "naturalness, similarity (plays the prompts of --list first), or both")  # fmt: skip
    define.string("list", None, "meta.lst or JSONL of what is spoken; default all that both folders have")  # fmt: skip
    define.integer("items", 15, "pairs for each dimension", lower_bound=1)
    define.integer("training", 2, "pairs shown first that do not count", lower_bound=0)
    define.integer("identical", 2, "pairs of one sound, as checks", lower_bound=0)
    define.choice("scale", "preference", ["preference", "cmos"], "A, B, same, hard to tell; or -3 to 3")  # fmt: skip
    define.string("title", "Listening test", "of the page")
    define.string("key", None, "to score: key.csv of the sheet")
    define.list("answers", None, "to score: the CSVs that came back")
    define.string("system", None, "to score: the system that is tested")
    define.string("out", None, "folder of the sheet that is made, or of the results")
    define.integer("seed", 0, "of the draw, or of the intervals", lower_bound=0)


def _listening(given: flags.FlagValues) -> None:
    from chroma_jax.evaluation.listening import answers, sheet

    if given.key or given.answers:
        _wanted(given, "key", "answers", "system", "out")
        paths = [pathlib.Path(p) for p in given.answers]
        out = pathlib.Path(given.out)
        _say(answers.score(pathlib.Path(given.key), paths, out, system=given.system, seed=given.seed))  # fmt: skip
        return
    _wanted(given, "first", "second", "names", "out")
    if len(given.names) != 2:
        raise cli.CommandError(f"--names wants two, as ours,theirs, got {len(given.names)}")
    out = pathlib.Path(given.out)
    made = sheet.build(
        pathlib.Path(given.first),
        pathlib.Path(given.second),
        out,
        names=tuple(given.names),
        dimensions=given.dimensions,
        list_path=pathlib.Path(given.list) if given.list else None,
        items=given.items,
        training=given.training,
        identical=given.identical,
        scale=given.scale,
        title=given.title,
        seed=given.seed,
    )
    print(
        f"sheet {made['version']}: {made['items']} pairs; {made['common']} names in both folders, "
        f"{made['left_out']} in one alone.\nHand out {out / 'page'}; keep {out / 'key.csv'}."
    )


# --- report ---------------------------------------------------------------------------------------------------------------


def _report_flags(define: _Define) -> None:
    define.paths("results", None, "folders of results, one or several between commas")
    define.path("out", None, "HTML file to write")


def _report(given: flags.FlagValues) -> None:
    from chroma_jax.evaluation import report

    _wanted(given, "results", "out")
    report.write([pathlib.Path(f) for f in given.results], pathlib.Path(given.out))


TASKS: dict[str, tuple[Callable, Callable]] = {
    "speech": (_speech_flags, _speech),
    "listening": (_listening_flags, _listening),
    "report": (_report_flags, _report),
}


def define_flags(task: str, values: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the command only: other commands have flags of the same names."""
    TASKS[task][0](_Define(values))


def main(task: str, given: flags.FlagValues = flags.FLAGS) -> None:
    """Runs a task on its flags."""
    TASKS[task][1](given)


if __name__ == "__main__":
    task = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    if task in TASKS:
        define_flags(task)
        cli.run(functools.partial(main, task))
    elif set(sys.argv) & {"-h", "--help"} and not task:
        print(__doc__)
    else:
        cli.fail(f"{f'no task {task!r}' if task else 'no task'}: there are {', '.join(TASKS)}")
