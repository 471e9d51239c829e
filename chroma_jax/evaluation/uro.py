"""URO-Bench: a model over its folders, the files that its own scripts read, and what can be scored here.

Data: `ROOT/<basic|pro>/<Set>/test.jsonl` (Hub: Honggao/URO-Bench). Results: `OUT/eval/<track>/<Set>/` with `audio/0000.wav ...`,
`question_text.jsonl`, `pred_text.jsonl`, `gt_text.jsonl`, `asr_text.jsonl`; sets of several turns have `<id>/chat_<round>.wav` and
`output_with_text.jsonl`. Repeat, the ASR's WER and a MOS are computed here as the benchmark does, with the judges that are named;
closed answers by rule, which it gives to a language model; open ones by a judge behind an endpoint.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from chroma_jax.evaluation import dialogue, statistics, tables, text
from chroma_jax.evaluation.dialogue import Question
from chroma_jax.evaluation.endpoint import Endpoint
from chroma_jax.evaluation.lists import digest, read_lines, read_object
from chroma_jax.evaluation.results import Results, write_json, write_text
from chroma_jax.evaluation.scoring import Ears

TRACKS = ("basic", "pro")
# Mode of each set, without the language at its end.
MODES = {
    "Repeat": "wer",
    **dict.fromkeys(("Summary", "StoralEval", "TruthfulEval", "LCSTS", "CodeSwitching"), "semi-open"),
    **dict.fromkeys(("GaokaoEval", "Gsm8kEval", "MLC", "HSK5", "SQuAD", "OpenbookQA", "APE"), "qa"),
    **dict.fromkeys(("ClothoEval", "MuChoEval", "MLCpro"), "qa"),
    **dict.fromkeys(("AlpacaEval", "CommonEval", "WildchatEval", "Claude", "Wildchat"), "open"),
    "MtBenchEval": "multi", "UnderEmotion": "ue", "Safety": "sf", "SpeakerAware": "sa", "SRT": "srt",
    "GenEmotion": "ge", "GenStyle": "gs", "Multilingual": "ml",
}  # fmt: skip
# What the basic track's English sets are said to measure.
ABILITIES = {
    "understanding": ("Repeat", "Summary", "GaokaoEval"),
    "reasoning": ("StoralEval", "TruthfulEval", "Gsm8kEval", "MLC"),
    "oral conversation": ("AlpacaEval", "CommonEval", "WildchatEval"),
}
_NUMBERS = ("Gsm8kEval", "APE")
_GOOD_REPEAT = 0.5  # the most errors of a repetition that counts


def find_sets(
    root: pathlib.Path, wanted: Sequence[str] = ()
) -> list[tuple[str, str, pathlib.Path]]:
    """(track, set, test.jsonl) of the sets that lie under `root`, or of those that are wanted.

    Raises ValueError where there are none, a wanted one is not there, or its kind is not known.
    """
    found = [(t, p.parent.name, p) for t in TRACKS for p in sorted(root.glob(f"{t}/*/test.jsonl"))]
    if not found:
        raise ValueError(f"{root}: wanted URO-Bench's layout, as {root}/basic/Repeat/test.jsonl")
    if absent := [w for w in wanted if w not in {name for _, name, _ in found}]:
        raise ValueError(
            f"{root}: has no set {absent[0]}: there are {', '.join(n for _, n, _ in found)}"
        )
    chosen = [f for f in found if not wanted or f[1] in wanted]
    for _, name, path in chosen:
        if _base(name) not in MODES:
            raise ValueError(f"{path}: is no set of URO-Bench that is known: {name}")
    return chosen


def read_set(name: str, path: pathlib.Path) -> list[Question]:
    """The questions of a set. Raises ValueError naming file and line for foreign layouts and sounds that are not there."""
    questions = []
    for number, (at, line) in enumerate(read_lines(path)):
        where = f"{path}:{at}"
        given = read_object(line, where)
        several = "dialogue" in given
        rounds = given["dialogue"] if several else [given]
        try:
            rounds = sorted(rounds, key=lambda r: r.get("round", 0))
            turns = tuple((path.parent / r["source_wav"], r.get("source_text", "")) for r in rounds)
            targets = [_joined(r.get("target_text") or r.get("source_text", "")) for r in rounds]
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{where}: wanted source_wav and source_text, or a dialogue of them") from e  # fmt: skip
        rule = _rule(name, targets[-1]) if MODES[_base(name)] == "qa" else None
        wanted = rounds[-1].get("target_text") or rounds[-1].get("source_text", "")
        references = tuple(wanted) if isinstance(wanted, list) else (str(wanted),)
        label = str(given.get("id", number)) if several else f"{number:04d}"
        # The question is heard; its text is for the judges alone.
        heard = tuple((sound, None) for sound, _ in turns)
        questions.append(Question(label, heard, None, None, rule, references, None, several))
    dialogue.check_question_files(path, questions)
    return questions


def run(
    root: pathlib.Path,
    out: pathlib.Path,
    *,
    sets: Sequence[str] = (),
    endpoint: Endpoint | None = None,
    ears: Ears,
    system: str,
    seed: int = 0,
    workers: int = 1,
    **asked: Any,
) -> dict[str, Any]:
    """Runs a model over the sets; returns the summary, as written to `out`. A run that was stopped goes on.

    Args:
      root: the benchmark's data.
      out: the folder of the results.
      sets: names of those to run; default all that are there.
      endpoint: the judge of open answers; without one they are written and not scored.
      ears: the judges of sound.
      system: what the table calls it.
      seed: of the intervals.
      workers: as for `dialogue.run`.
      asked: the other arguments of `dialogue.run`: speaker, how, voice.

    Raises ValueError as `find_sets`, `read_set`, `dialogue.run` and the endpoint.
    """
    chosen = [(t, n, p, read_set(n, p)) for t, n, p in find_sets(root, sets)]
    table, plain = [], {}
    for track, name, path, questions in chosen:
        folder = out / "eval" / track / name
        source = {"name": f"{track}/{name}", "digest": digest(path), "n": len(questions)}
        dialogue.run(
            questions, folder, source=source, ears=ears, system=system, seed=seed, workers=workers,
            task="uro", **asked,
        )  # fmt: skip
        rows = [json.loads(line) for line in (folder / "items.jsonl").read_text("utf-8").splitlines()]  # fmt: skip
        _write_files(path, questions, rows, folder)
        score, how = _score(name, path, questions, rows, folder, endpoint, workers, seed, ears.language)  # fmt: skip
        row, values = _row(track, name, questions, rows, score, how, seed)
        table.append(row)
        plain[f"{track}/{name}"] = values
    summary = _summary(system, ears, endpoint, table, plain, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "summary.json", summary)
    write_text(out / "table.md", tables.page(summary))
    write_text(out / "items.jsonl", "")
    return summary


def _base(name: str) -> str:
    return re.sub(r"-(en|zh)$", "", name)


def _joined(texts: str | list[str]) -> str:
    return " / ".join(map(str, texts)) if isinstance(texts, list) else str(texts)


def _rule(name: str, target: str) -> str:
    if _base(name) in _NUMBERS:
        return "number"
    return "option" if re.match(r"^\W*[A-D](?:[.):\s]|$)", target) else "contains"


def _lines(values: Sequence[str]) -> str:
    return "".join(json.dumps({f"{i:04d}": v}, ensure_ascii=False) + "\n" for i, v in enumerate(values))  # fmt: skip


def _write_files(
    path: pathlib.Path, questions: Sequence[Question], rows: list[dict], folder: pathlib.Path
) -> None:
    """The files of the benchmark's scripts."""
    given = [read_object(line, str(path)) for _, line in read_lines(path)]
    by_key = {r["key"]: r for r in rows}

    def said(question: Question, turn: int, what: str) -> str:
        row = by_key.get(question.key(turn), {})
        if what == "heard" and row.get("missing") is not None:
            return " "
        return row.get(what) or ("" if what == "text" else " ")

    if questions[0].several:
        for name, what in (("output_with_text.jsonl", "text"), ("asr_text.jsonl", "heard")):
            lines = []
            for question, item in zip(questions, given, strict=True):
                rounds = sorted(item["dialogue"], key=lambda r: r.get("round", 0))
                spoken = [r | {"output_text": said(question, i, what)} for i, r in enumerate(rounds)]  # fmt: skip
                lines.append({"id": item.get("id", question.name), "num_round": len(rounds), "dialogue": spoken})  # fmt: skip
            write_text(folder / name, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))  # fmt: skip
        return
    source = [str(g.get("source_text", "")) for g in given]
    write_text(folder / "question_text.jsonl", _lines(source))
    targets = [_joined(g.get("target_text") or s) for g, s in zip(given, source, strict=True)]
    write_text(folder / "gt_text.jsonl", _lines(targets))
    write_text(folder / "pred_text.jsonl", _lines([said(q, 0, "text") for q in questions]))
    write_text(folder / "asr_text.jsonl", _lines([said(q, 0, "heard") for q in questions]))


def repeat_score(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of good repetitions (at most half of the words wrong), times one less their mean WER, × 100.

    As in the benchmark, the answer is what errors are divided by. Both are normalised already.
    """
    rates = [text.errors(a, r).rate if a.split() else 1.0 for a, r in zip(answers, references, strict=True)]  # fmt: skip
    good = [rate for rate in rates if rate <= _GOOD_REPEAT]
    return 100.0 * len(good) / len(rates) * (1 - sum(good) / len(good)) if good else 0.0


def _score(
    name: str, path: pathlib.Path, questions: Sequence[Question], rows: list[dict], folder: pathlib.Path,
    endpoint: Endpoint | None, workers: int, seed: int, language: str,
) -> tuple[Any, str]:  # fmt: skip
    """The set's score, 0 to 100 (an estimate or a number; None where it has none), and how it came about."""
    mode = MODES[_base(name)]
    by_key = {r["key"]: r for r in rows}
    if mode == "wer":
        normal = dialogue.normaliser(language)
        heard = [normal(by_key[q.key(0)]["heard"] or "") for q in questions]
        return repeat_score(heard, [normal(" / ".join(q.references)) for q in questions]), "exact"
    if mode == "qa":
        right = [100.0 * bool(by_key[q.key(0)]["right"]) for q in questions]
        return statistics.mean(right, seed), "rule"
    if mode not in ("open", "semi-open", "multi"):
        return None, "not scored here: URO-Bench's own scripts"
    if endpoint is None:
        return None, "not scored: needs --judge_url"
    given = [read_object(line, str(path)) for _, line in read_lines(path)]
    asked = {}
    for question, item in zip(questions, given, strict=True):
        rounds = sorted(item.get("dialogue", [item]), key=lambda r: r.get("round", 0))
        for i, part in enumerate(rounds):
            heard = by_key.get(question.key(i), {}).get("heard") or ""
            target = _joined(part.get("target_text") or "") if mode == "semi-open" else ""
            asked[question.key(i)] = (str(part.get("source_text", "")), heard, target or None)
    judged = Results(folder / "judged", {"judge": endpoint.name, "prompts": endpoint.digest})
    scores = judged.fill(
        list(asked),
        lambda key: {"heard": asked[key][1], "score": endpoint.score(*asked[key])},
        workers=workers,
        title=f"judging {name}",
        stale=lambda row: row["heard"] != asked[row["key"]][1],
    )
    return statistics.mean([r["score"] for r in scores], seed), f"judge {endpoint.model}"


def _row(track, name, questions, rows, score, how, seed) -> tuple[dict[str, str], dict[str, Any]]:
    wer = statistics.mean([r["wer"] for r in rows if r["wer"] is not None], seed)
    opinion = statistics.mean([r["mos"] for r in rows if r["mos"] is not None], seed)
    value = score.value if isinstance(score, statistics.Estimate) else score
    shown = "–" if score is None else f"{score:.2f}" if isinstance(score, float) else tables.estimate(score, 2)  # fmt: skip
    row = {
        "track": track, "set": name, "mode": MODES[_base(name)], "n": str(len(questions)),
        "missing": str(sum(r["missing"] is not None for r in rows)), "score": shown, "by": how,
        "ASR-WER, %": tables.estimate(wer, 2, 100), "MOS": tables.estimate(opinion, 2),
    }  # fmt: skip
    values = {"score": value, "by": how, "asr_wer": wer and wer.value, "mos": opinion and opinion.value, "n": len(questions)}  # fmt: skip
    return row, {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}


def _summary(system: str, ears: Ears, endpoint: Endpoint | None, table, plain, seed) -> dict[str, Any]:  # fmt: skip
    scored = {k: v["score"] for k, v in plain.items() if v["score"] is not None}
    means = {}
    for ability, names in ABILITIES.items():
        parts = [scored.get(f"basic/{n}", scored.get(f"basic/{n}-en")) for n in names]
        if None not in parts:
            means[ability] = round(sum(parts) / len(parts), 2)
    if means.keys() == ABILITIES.keys():
        means["overall"] = round(sum(scored[k] for k in scored if k.startswith("basic/") and not k.endswith("-zh")) / sum(map(len, ABILITIES.values())), 2)  # fmt: skip
    judges = ears.described()
    notes = [
        f"Judges: {tables.judges_note(judges)}{f'; open answers: {endpoint.name}, prompts of this project {endpoint.digest}' if endpoint else ''}.",
        "Scores are of the ASR's text, 0 to 100. Exact: the benchmark's formula. Rule: closed answers checked without a language model, not "
        "comparable with its qa scores. The files of its own scripts lie in eval/. [95 % bootstrap intervals over items], "
        f"seed {seed}.",
        *([f"Means: {', '.join(f'{k} {v}' for k, v in means.items())}."] if means else ["Means want all sets of an ability scored."]),
    ]  # fmt: skip
    return {
        "task": "uro", "system": system, "judges": judges, "sets": plain, "means": means, "seed": seed,
        "tables": [{"title": f"URO-Bench: {system}", "rows": table, "note": " ".join(notes)}], "plots": [],
    }  # fmt: skip
