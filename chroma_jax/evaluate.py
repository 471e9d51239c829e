r"""Judges speech and dialogue: one task a call, named first.

    python -m chroma_jax.evaluate speech --list=meta.lst --wavs=DIR --out=RESULTS       scores sounds that lie there
    python -m chroma_jax.evaluate speech --list=meta.lst --checkpoint=DIR --out=RESULTS the same, spoken by Chroma
    python -m chroma_jax.evaluate dialogue --questions=Q.jsonl --checkpoint=DIR --out=RESULTS
    python -m chroma_jax.evaluate uro --data=URO-Bench-data --checkpoint=DIR --out=RESULTS [--judge_url=http://...]
    python -m chroma_jax.evaluate big_bench_audio --data=DIR --checkpoint=DIR --out=RESULTS
    python -m chroma_jax.evaluate voicebench --data=mmsu.jsonl --checkpoint=DIR --out=RESULTS
    python -m chroma_jax.evaluate latency --questions=Q.jsonl --checkpoint=DIR --voice=V.wav --voice_text=... --out=RESULTS
    python -m chroma_jax.evaluate codec --checkpoint=DIR --manifest=sounds.jsonl --out=RESULTS     through the Codec and back
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
from chroma_jax.evaluation.lists import digest


class _Define:
    """The flags of a task: absl's, by kind."""

    def __init__(self, values: flags.FlagValues):
        self.string = functools.partial(flags.DEFINE_string, flag_values=values)
        self.list = functools.partial(flags.DEFINE_list, flag_values=values)
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


def _model_flags(define: _Define) -> None:
    define.path(
        "checkpoint",
        None,
        "directory (Hub layout or converted) or Hub id of the weights",
        remote=True,
    )
    define.choice("dtype", None, ["float32", "bfloat16", "float16"], "default as stored")
    define.choice("quantize", None, ["int8", "fp8"], "hold kernels in eight bits; default as stored")  # fmt: skip
    define.number("max_seconds", 30.0, "longest speech")
    define.number("temperature", 0.0, "of the speech codes; 0 is greedy")
    define.integer("top_k", 0, "keep the k likeliest speech codes; 0 keeps all")
    define.number("text_temperature", 0.0, "of the text; 0 is greedy")
    define.path("voice", None, "a recording to speak like, where the list has none")
    define.string("voice_text", None, "exactly what it says")


def _voice(given: flags.FlagValues) -> tuple[pathlib.Path, str] | None:
    """The voice for all, checked."""
    if bool(given.voice) != bool(given.voice_text):
        raise cli.CommandError("--voice and --voice_text go together: a recording and what it says")
    if not given.voice:
        return None
    from chroma_jax import Voice

    Voice(given.voice, given.voice_text)
    return pathlib.Path(given.voice), given.voice_text


def _how(given: flags.FlagValues) -> dict:
    """The settings that what is spoken depends on."""
    names = ("checkpoint", "dtype", "quantize", "max_seconds", "temperature", "top_k", "text_temperature", "voice", "seed")  # fmt: skip
    return {k: given[k].value for k in names if given[k].value is not None}


def _speaker(given: flags.FlagValues):
    from chroma_jax import Chroma, Sampling, TokenSampling
    from chroma_jax.evaluation.speaking import Speaker

    sampling = Sampling(
        temperature=given.temperature,
        top_k=given.top_k,
        text=TokenSampling(temperature=given.text_temperature),
    )
    chroma = Chroma.from_pretrained(given.checkpoint, dtype=given.dtype, quantize=given.quantize)
    return Speaker(chroma, max_seconds=given.max_seconds, sampling=sampling, seed=given.seed)


def _say(summary: dict) -> None:
    from chroma_jax.evaluation import tables

    print(tables.page(summary), flush=True)


# --- speech ---------------------------------------------------------------------------------------------------------------


def _speech_flags(define: _Define) -> None:
    define.path("list", None, "meta.lst (2 to 5 fields between |) or JSONL of what is spoken")
    define.path(
        "wavs", None, "folder of <name>.wav to score, instead of a checkpoint that makes them"
    )
    define.path("out", None, "folder of the results")
    define.string("system", None, "what the table calls it; default the folder's name")
    define.integer("seed", 0, "of the intervals and of what is spoken", lower_bound=0)
    _model_flags(define)
    _judge_flags(define)


def _speech(given: flags.FlagValues) -> None:
    from chroma_jax.evaluation import speech
    from chroma_jax.evaluation.lists import read_list

    _wanted(given, "list", "out")
    if bool(given.wavs) == bool(given.checkpoint):
        raise cli.CommandError(
            "no --wavs: name a folder of sounds, or a --checkpoint that makes them"
            if not given.wavs
            else "--wavs and --checkpoint exclude each other"
        )
    path, out = pathlib.Path(given.list), pathlib.Path(given.out)
    items = read_list(path)
    speech.check_texts(items, given.language, given.list)
    voice = _voice(given)
    ears = _ears(given)  # a judge that is missing is told before any speech is made
    how, codec, wavs = None, None, pathlib.Path(given.wavs) if given.wavs else out / "wavs"
    if given.checkpoint:
        speaker = _speaker(given)
        how = _how(given)
        ended = speech.make(items, out, speaker, how | {"list": digest(path)}, voice)
        how, codec = how | {"ended by": ended}, speaker.through_codec
    summary = speech.run(
        path,
        wavs,
        out,
        ears,
        system=given.system or pathlib.Path(given.wavs or given.checkpoint).resolve().name,
        how=how,
        codec=codec,
        seed=given.seed,
        workers=given.workers,
    )
    _say(summary)


# --- dialogue -------------------------------------------------------------------------------------------------------------


def _dialogue_flags(define: _Define) -> None:
    define.path(
        "questions", None, "JSONL: id, question (a sound) or question_text, answer, rule, ..."
    )
    define.path("out", None, "folder of the results")
    define.string("system", None, "what the table calls it; default the checkpoint's name")
    define.integer("seed", 0, "of the answers and the intervals", lower_bound=0)
    _model_flags(define)
    _judge_flags(define)


def _dialogue(given: flags.FlagValues) -> None:
    from chroma_jax.evaluation import dialogue

    _wanted(given, "questions", "checkpoint", "out")
    path = pathlib.Path(given.questions)
    questions = dialogue.read_questions(path)
    source = {"name": path.name, "digest": digest(path), "n": len(questions)}
    _say(dialogue.run(questions, pathlib.Path(given.out), source=source, **_asked(given)))


def _asked(given: flags.FlagValues) -> dict:
    """What all tasks that ask Chroma give to `dialogue.run`: the voice and the judges are checked before the weights are read."""
    voice, ears = _voice(given), _ears(given)
    return dict(
        speaker=_speaker(given),
        ears=ears,
        system=given.system or pathlib.Path(given.checkpoint).name,
        how=_how(given),
        voice=voice,
        seed=given.seed,
        workers=given.workers,
    )


# --- benchmarks -----------------------------------------------------------------------------------------------------------


def _benchmark_flags(define: _Define) -> None:
    define.path("data", None, "the benchmark's folder; of VoiceBench <set>.jsonl")
    define.path("out", None, "folder of the results")
    define.string("system", None, "what the table calls it; default the checkpoint's name")
    define.integer("seed", 0, "of the answers and the intervals", lower_bound=0)
    _model_flags(define)
    _judge_flags(define)


def _uro_flags(define: _Define) -> None:
    _benchmark_flags(define)
    define.list(
        "sets", [], "names of URO-Bench's sets, as Repeat,Gsm8kEval; default all that are there"
    )
    define.string("judge_url", None, "OpenAI-compatible endpoint that scores open answers, as https://api.openai.com/v1")  # fmt: skip
    define.string("judge_model", "gpt-4o-mini", "its name there")
    define.string("judge_key", "OPENAI_API_KEY", "the environment variable that holds the endpoint's key")  # fmt: skip


def _uro(given: flags.FlagValues) -> None:
    from chroma_jax.evaluation import uro
    from chroma_jax.evaluation.endpoint import Endpoint

    _wanted(given, "data", "checkpoint", "out")
    root = pathlib.Path(given.data)
    for _, name, path in uro.find_sets(root, given.sets):
        uro.read_set(name, path)
    judge = given.judge_url and Endpoint(given.judge_url, given.judge_model, key_variable=given.judge_key)  # fmt: skip
    _say(uro.run(root, pathlib.Path(given.out), sets=given.sets, endpoint=judge, **_asked(given)))


def _big_bench_audio(given: flags.FlagValues) -> None:
    from chroma_jax.evaluation import benchmarks

    _wanted(given, "data", "checkpoint", "out")
    _say(benchmarks.big_bench_audio(pathlib.Path(given.data), pathlib.Path(given.out), **_asked(given)))  # fmt: skip


def _voicebench(given: flags.FlagValues) -> None:
    from chroma_jax.evaluation import benchmarks

    _wanted(given, "data", "checkpoint", "out")
    _say(benchmarks.voicebench(pathlib.Path(given.data), pathlib.Path(given.out), **_asked(given)))


# --- latency --------------------------------------------------------------------------------------------------------------


def _latency_flags(define: _Define) -> None:
    define.path("questions", None, "JSONL of spoken questions: id and question, a sound")
    define.path("out", None, "folder of the results")
    define.string("system", None, "what the tables call it; default the checkpoint's name")
    define.integer("seed", 0, "of the answers", lower_bound=0)
    define.integer("repeats", 5, "runs of each question that count", lower_bound=1)
    define.integer("drop", 3, "runs before them that do not", lower_bound=1)
    define.list("streams", [], "numbers of streams that answer at once, as 1,4,16")
    define.number("stage_seconds", 38.8, "length of the reply in the table of stages; 0 for no such table")  # fmt: skip
    _model_flags(define)


def _latency(given: flags.FlagValues) -> None:
    from chroma_jax import Voice
    from chroma_jax.evaluation import dialogue, latency

    _wanted(given, "questions", "checkpoint", "out", "voice")
    voice = Voice(*_voice(given))
    questions = dialogue.read_questions(pathlib.Path(given.questions))
    if not all(n.isdigit() and int(n) for n in given.streams):
        raise cli.CommandError(f"--streams wants numbers, as 1,4,16, got {','.join(given.streams)}")
    speaker = _speaker(given)
    summary = latency.run(
        questions,
        pathlib.Path(given.out),
        speaker.chroma,
        voice,
        system=given.system or pathlib.Path(given.checkpoint).name,
        how=_how(given),
        max_seconds=given.max_seconds,
        sampling=speaker.sampling,
        seed=given.seed,
        repeats=given.repeats,
        drop=given.drop,
        streams=[int(n) for n in given.streams],
        stage_seconds=given.stage_seconds,
    )
    _say(summary)


# --- codec ----------------------------------------------------------------------------------------------------------------


def _codec_flags(define: _Define) -> None:
    define.path("checkpoint", None, "a Codec in Mimi's layout, or a whole Chroma")
    define.path("manifest", None, "JSON lines with audio, text, and as known id and speaker")
    define.path("out", None, "folder of the sounds and results")
    define.integer("per_speaker", 20, "recordings of each speaker, the last ones", lower_bound=1)
    define.integer("num_codebooks", 0, "make sound of the first so many; 0 for all", lower_bound=0)
    define.integer("seed", 0, "of the intervals", lower_bound=0)
    _judge_flags(define)


def _codec(given: flags.FlagValues) -> None:
    from chroma_jax.evaluation import codec

    _wanted(given, "checkpoint", "manifest", "out")
    summary = codec.run(
        given.checkpoint,
        pathlib.Path(given.manifest),
        pathlib.Path(given.out),
        _ears(given),
        per_speaker=given.per_speaker,
        num_codebooks=given.num_codebooks or None,
        seed=given.seed,
        workers=given.workers,
    )
    _say(summary)


# --- listening ------------------------------------------------------------------------------------------------------------


def _listening_flags(define: _Define) -> None:
    define.path("first", None, "folder of <name>.wav of the system that is tested")
    define.path("second", None, "folder of <name>.wav of the one it is compared with")
    define.list("names", None, "what the results call the two, as ours,theirs")
    define.list("dimensions", ["naturalness"], "naturalness, similarity (plays the prompts of --list first), or both")  # fmt: skip
    define.path("list", None, "meta.lst or JSONL of what is spoken; default all that both folders have")  # fmt: skip
    define.integer("items", 15, "pairs for each dimension", lower_bound=1)
    define.integer("training", 2, "pairs shown first that do not count", lower_bound=0)
    define.integer("identical", 2, "pairs of one sound, as checks", lower_bound=0)
    define.choice("scale", "preference", ["preference", "cmos"], "A, B, same, hard to tell; or -3 to 3")  # fmt: skip
    define.string("title", "Listening test", "of the page")
    define.path("key", None, "to score: key.csv of the sheet")
    define.paths("answers", None, "to score: the CSVs that came back")
    define.string("system", None, "to score: the system that is tested")
    define.path("out", None, "folder of the sheet that is made, or of the results")
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
    "dialogue": (_dialogue_flags, _dialogue),
    "uro": (_uro_flags, _uro),
    "big_bench_audio": (_benchmark_flags, _big_bench_audio),
    "voicebench": (_benchmark_flags, _voicebench),
    "latency": (_latency_flags, _latency),
    "codec": (_codec_flags, _codec),
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
