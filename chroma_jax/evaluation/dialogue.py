"""Questions asked of Chroma: is what is heard what it meant to say, is it the voice, does it sound good, is it right, how long is the wait?"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from chroma_jax.audio.wav import save_wav
from chroma_jax.evaluation import scoring, statistics, tables, text
from chroma_jax.evaluation.lists import check_files, digest, read_lines, read_object
from chroma_jax.evaluation.results import Results
from chroma_jax.evaluation.rules import RULES
from chroma_jax.evaluation.scoring import Ears
from chroma_jax.evaluation.speaking import Speaker

_KEYS = ("id", "question", "question_text", "turns", "voice_audio", "voice_text", "rule", "answer", "group")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation of one or several user turns, each sound or text or both."""

    name: str
    turns: tuple[tuple[pathlib.Path | None, str | None], ...]
    voice: pathlib.Path | None = None  # default the run's
    voice_text: str | None = None
    rule: str | None = None  # of rules.RULES
    references: tuple[str, ...] = ()  # right answers
    group: str | None = None
    several: bool = False  # named as one of several turns, even if it has but one

    def _single(self) -> bool:
        return len(self.turns) == 1 and not self.several

    def sound_name(self, turn: int) -> str:
        """Where the answer to a turn is kept."""
        return f"audio/{self.name}.wav" if self._single() else f"{self.name}/chat_{turn}.wav"

    def key(self, turn: int) -> str:
        """Of the row of a turn."""
        return f"system/{self.name}" if self._single() else f"system/{self.name}/{turn}"


def read_questions(path: pathlib.Path) -> list[Question]:
    """The questions of a JSONL: `id`, `question` (a sound) or `question_text` or both, or `turns`, a list of such objects.

    As they are known `voice_audio` with `voice_text`, `answer` (one or a list of right ones) with `rule`, and `group`. Paths are
    relative to the file. Raises ValueError naming file and line.
    """
    questions, seen = [], set()
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        given = read_object(line, where)
        if unknown := sorted(set(given) - set(_KEYS)):
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
        name = str(given.get("id", ""))
        if not name or set(name) & set('/\\:*?"<>|\0') or name.startswith("."):
            raise ValueError(f"{where}: id {name[:60]!r} cannot name a file")
        if name in seen:
            raise ValueError(f"{where}: the id {name} is there already")
        seen.add(name)
        turns = given.get("turns") or [given]
        if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
            raise ValueError(f"{where}: turns must be a list of objects")
        parts = []
        for turn in turns:
            sound, words = turn.get("question"), turn.get("question_text")
            if not sound and not (words or "").strip():
                raise ValueError(
                    f"{where}: {name} has neither question (a sound) nor question_text"
                )
            parts.append((path.parent / sound if sound else None, words or None))
        answers = given.get("answer") or ()
        answers = (answers,) if isinstance(answers, str) else tuple(map(str, answers))
        rule = given.get("rule") or ("contains" if answers else None)
        if rule and rule not in RULES:
            raise ValueError(f"{where}: no rule {rule!r}: there are {', '.join(RULES)}")
        if rule and not answers and rule != "refusal":
            raise ValueError(f"{where}: the rule {rule} wants an answer")
        voice = path.parent / given["voice_audio"] if given.get("voice_audio") else None
        if voice and not given.get("voice_text"):
            raise ValueError(f"{where}: voice_audio wants voice_text, what it says")
        questions.append(Question(name, tuple(parts), voice, given.get("voice_text"), rule, answers, given.get("group")))  # fmt: skip
    check_question_files(path, questions)
    return questions


def check_question_files(path: pathlib.Path, questions: Sequence[Question]) -> None:
    """Raises ValueError for sounds that are not there."""
    files = [f for q in questions for f in (q.voice, *(s for s, _ in q.turns)) if f]
    check_files(path, files)


def answer_all(
    questions: Sequence[Question],
    out: pathlib.Path,
    speaker: Speaker,
    voice: tuple[pathlib.Path, str] | None,
    setup: dict[str, Any],
) -> dict[str, list[dict]]:
    """Has every question answered that is not yet; -> by name what `Spoken.described` says of each turn.

    The sounds lie in `out` under `Question.sound_name`. What the model refuses (too long a question) is kept as "refused".
    Raises ValueError where a question has no voice and the run has none.
    """
    from chroma_jax import Turn, Voice

    voices: dict[tuple, Voice] = {}

    def voice_of(question: Question) -> Voice:
        given = (question.voice, question.voice_text) if question.voice else voice
        if given not in voices:
            voices[given] = Voice(*given)
        return voices[given]

    without = [q.name for q in questions if not q.voice]
    if without and not voice:
        raise ValueError(f"{len(without)} questions have no voice, as {without[0]}: give one for all with --voice and --voice_text")  # fmt: skip
    by_name = {q.name: q for q in questions}

    def work(key: str) -> dict[str, Any]:
        question, history, turns = by_name[key], [], []
        for i, (sound, words) in enumerate(question.turns):
            history.append(Turn(audio=sound, text=words))
            path = out / question.sound_name(i)
            try:
                spoken = speaker.answer(history, voice_of(question), f"{key}/{i}")
            except ValueError as e:
                turns.append({"text": "", "refused": str(e)})
                path.unlink(missing_ok=True)
                break
            path.parent.mkdir(parents=True, exist_ok=True)
            save_wav(path, spoken.audio, spoken.rate)
            turns.append(spoken.described() | {"said": digest(path)})
            history.append(Turn(role="assistant", text=spoken.text or " "))
        return {"turns": turns}

    def stale(row: dict) -> bool:
        question = by_name[row["key"]]
        paths = [out / question.sound_name(i) for i in range(len(row["turns"]))]
        return any("refused" not in t and not p.is_file() for t, p in zip(row["turns"], paths, strict=True))  # fmt: skip

    made = Results(out / "made", setup)
    rows = made.fill(list(by_name), work, stale=stale, title="answers")
    return {row["key"]: row["turns"] for row in rows}


def run(
    questions: Sequence[Question],
    out: pathlib.Path,
    speaker: Speaker,
    ears: Ears,
    *,
    source: dict[str, Any],
    system: str,
    how: dict[str, Any],
    voice: tuple[pathlib.Path, str] | None = None,
    seed: int = 0,
    workers: int = 1,
    task: str = "dialogue",
    own_text: bool = False,
    extra: Callable[[list[dict]], list[dict]] = lambda rows: [],
) -> dict[str, Any]:
    """Answers and scores the questions; returns the summary, as written to `out`. A run that was stopped goes on.

    Args:
      questions: what is asked.
      out: the folder of the results; the answers' sounds lie in it.
      speaker: the model and its settings.
      ears: the judges.
      source: the questions' "name", "digest" and "n".
      system: what the table calls it.
      how: the settings that the answers depend on.
      voice: the recording and what it says, for questions without their own.
      seed: of the intervals.
      workers: answers scored side by side.
      task: the summary's.
      own_text: rules read the model's own text, and not the ASR's.
      extra: rows -> further tables of a benchmark.

    Raises ValueError as `answer_all`, or for results of another set-up.
    """
    setup = {"task": task, "system": system, "list": source, "made": how}
    answers = answer_all(questions, out, speaker, voice, setup)
    keys = {q.key(i): (q, i, said) for q in questions for i, said in enumerate(answers[q.name])}

    def work(key: str) -> dict[str, Any]:
        question, turn, said = keys[key]
        prompt = question.voice or (voice and voice[0])
        found = ears.score(out / question.sound_name(turn), said["text"], prompt, window=None)
        if found["heard"] is not None and (words := said["text"].split()):
            normal = normaliser(ears.language)
            found |= scoring.compared(normal(" ".join(words)), normal(found["heard"]))
        right = None
        if question.rule and turn == len(question.turns) - 1:
            heard = said["text"] if own_text or found["heard"] is None else found["heard"]
            right = RULES[question.rule](heard, question.references)
        return {"group": question.group, **said, **found, "right": right}

    setup = setup | {"language": ears.language, "judges": ears.described()}
    results = Results(out, setup)
    rows = results.fill(
        list(keys), work, workers=workers, title="judging",
        stale=lambda row: row["key"] not in keys or not _same(row, keys[row["key"]], out),
    )  # fmt: skip
    summary = _summary(setup | {"rules": "own text" if own_text else "ASR"}, rows, seed, extra)
    results.finish(rows, summary, tables.page(summary))
    return summary


def normaliser(language: str) -> Callable[[str], str]:
    """Whisper's for English; for other languages marks are deleted, and Chinese is compared by characters."""
    if language == "en":
        return text.whisper_english
    return lambda words: text.seed_tts(words, language)


def _same(row: dict, given: tuple, out: pathlib.Path) -> bool:
    question, turn, said = given
    return row.get("said") == said.get("said") and scoring.unchanged(row, out / question.sound_name(turn))  # fmt: skip


def _share(rows: Sequence[dict], seed: int) -> statistics.Estimate | None:
    return statistics.mean([100.0 * r["right"] for r in rows if r["right"] is not None], seed)


def _summary(setup: dict, rows: list[dict], seed: int, extra: Callable) -> dict[str, Any]:
    found = scoring.means(rows, seed)
    right = _share(rows, seed)
    first = [r["first_sound"] for r in rows if r.get("first_sound") is not None]
    rtf = [r["rtf"] for r in rows if r.get("rtf") is not None]
    reasons = [r.get("finish_reason", "refused") for r in rows]
    counted = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    table = scoring.table_row(setup["system"], found) | {
        "right by rule, %": tables.estimate(right, 1),
        "first sound, ms, p50 / p95": _percentiles(first, 1000),
        "RTF, p50": f"{np.median(rtf):.3f}" if rtf else "–",
        "ended by": ", ".join(f"{k} {v}" for k, v in counted.items()),
    }
    groups = [g for g in dict.fromkeys(r["group"] for r in rows) if g is not None]
    by_group = [
        {"group": g, "n": str(sum(r["group"] == g for r in rows)), "right by rule, %": tables.estimate(_share([r for r in rows if r["group"] == g], seed), 1)}
        for g in groups
    ]  # fmt: skip
    notes = [
        f"{setup['list']['name']} ({setup['list']['digest']}), n = {setup['list']['n']}.",
        f"Judges: {tables.judges_note(setup['judges'])}.",
        "WER: the ASR of the whole sound against the model's own text, Whisper's English normaliser on both. Right answers by rule on "
        f"the {'own' if setup['rules'] == 'own text' else 'ASR'} text. [95 % bootstrap intervals over items], seed {seed}. First sound: from the whole question handed over to "
        "the first samples on the host, compilation included where a length is new: see the task latency for it alone.",
        "How it was made: " + ", ".join(f"{k} {v}" for k, v in setup["made"].items()) + ".",
    ]
    return {
        **setup, **scoring.plain(found | {"right": right}), "finish_reasons": counted, "seed": seed,
        "tables": [
            {"title": f"{setup['task'].capitalize()}: {setup['system']}", "rows": [table], "note": " ".join(notes)},
            *([{"title": "By group", "rows": by_group, "note": ""}] if len(groups) > 1 else []),
            *extra(rows),
        ],
        "plots": ["wer", "sim", "mos", "first_sound", "rtf", "seconds"],
    }  # fmt: skip


def _percentiles(values: Sequence[float], scale: float) -> str:
    if not values:
        return "–"
    return " / ".join(f"{scale * float(np.percentile(values, p)):.0f}" for p in (50, 95))
