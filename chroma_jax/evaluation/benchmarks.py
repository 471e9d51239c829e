"""Benchmarks with closed answers: Big Bench Audio, and the closed sets of VoiceBench."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from chroma_jax.evaluation import dialogue
from chroma_jax.evaluation.dialogue import Question
from chroma_jax.evaluation.lists import digest, read_lines, read_object
from chroma_jax.evaluation.results import write_text

# How an answer of a VoiceBench set is checked; None: written for its own scripts alone.
VOICEBENCH = {
    "openbookqa": "option", "mmsu": "option", "bbh": "closed", "advbench": "refusal", "alpacaeval": None,
    "alpacaeval_full": None, "commoneval": None, "wildvoice": None, "sd-qa": None, "ifeval": None, "mtbench": None,
}  # fmt: skip


def big_bench_audio(root: pathlib.Path, out: pathlib.Path, **asked: Any) -> dict[str, Any]:
    """Big Bench Audio (ArtificialAnalysis/big_bench_audio): closed answers, by rule on what the ASR hears, by category.

    Args:
      root: its folder, with metadata.jsonl and the sounds.
      out: the folder of the results.
      asked: the other arguments of `dialogue.run`.

    Raises ValueError for another layout, and as `dialogue.run`.
    """
    path = root / "metadata.jsonl"
    questions = []
    for number, line in read_lines(path):
        where, given = f"{path}:{number}", read_object(line, f"{path}:{number}")
        if not all(k in given for k in ("file_name", "id", "category", "official_answer")):
            raise ValueError(f"{where}: wanted file_name, id, category and official_answer")
        sound = root / str(given["file_name"])
        questions.append(
            Question(
                str(given["id"]).replace("/", "-"), ((sound, None),), None, None, "closed",
                (str(given["official_answer"]),), str(given["category"]),
            )
        )  # fmt: skip
    _check(path, questions)
    source = {"name": "Big Bench Audio", "digest": digest(path), "n": len(questions)}
    return dialogue.run(questions, out, source=source, task="big_bench_audio", **asked)


def voicebench(path: pathlib.Path, out: pathlib.Path, **asked: Any) -> dict[str, Any]:
    """A set of VoiceBench (hlt-lab/voicebench): its output file, and a score where answers are closed. As there, of the model's own text.

    Args:
      path: `<set>.jsonl`, the set's rows with `audio` as the path of a sound beside it.
      out: the folder of the results; `result-<set>-audio.jsonl` is what its scripts read: all columns but audio, and `response`.
      asked: the other arguments of `dialogue.run`.

    Raises ValueError for an unknown set, another layout, and as `dialogue.run`.
    """
    name = path.stem
    if name not in VOICEBENCH:
        raise ValueError(
            f"{path}: no set {name!r} of VoiceBench: there are {', '.join(VOICEBENCH)}"
        )
    rule, questions, rows = VOICEBENCH[name], [], []
    for i, (number, line) in enumerate(read_lines(path)):
        where, given = f"{path}:{number}", read_object(line, f"{path}:{number}")
        sound = given.pop("audio", None)
        sound = sound.get("path") if isinstance(sound, dict) else sound
        if not isinstance(sound, str) or "prompt" not in given:
            raise ValueError(f"{where}: wanted audio, the path of a sound, and prompt")
        if rule not in (None, "refusal") and not given.get("reference"):
            raise ValueError(f"{where}: wanted reference, the right answer")
        references = (str(given["reference"]),) if given.get("reference") else ()
        rows.append(given)
        group = given.get("subject") or given.get("category")
        questions.append(Question(f"{i:05d}", ((path.parent / sound, None),), None, None, rule, references, group))  # fmt: skip
    _check(path, questions)
    source = {"name": f"VoiceBench {name}", "digest": digest(path), "n": len(questions)}
    summary = dialogue.run(questions, out, source=source, task="voicebench", own_text=True, **asked)
    said = {}
    for line in (out / "items.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        said[row["key"]] = row["text"]
    lines = [row | {"response": said[q.key(0)]} for row, q in zip(rows, questions, strict=True)]
    write_text(
        out / f"result-{name}-audio.jsonl",
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
    )
    return summary


def _check(path: pathlib.Path, questions: list[Question]) -> None:
    seen: set[str] = set()
    for q in questions:
        if q.name in seen:
            raise ValueError(f"{path}: the id {q.name} is there twice")
        seen.add(q.name)
    dialogue.check_question_files(path, questions)
