"""One recording heard by the judges of a run: words, voice, opinion."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np

from chroma_jax.audio.wav import AudioError
from chroma_jax.evaluation import judges, lists, statistics, tables, text
from chroma_jax.evaluation.judges import sound

WINDOW = 30  # seconds that Seed-TTS-eval's ASR hears of a recording


class Names(NamedTuple):
    """Which judges to open; "none" for no such judge."""

    words: str = "whisper-base"
    speaker: str = "resemblyzer"
    mos: str = "distillmos"


class Ears:
    """The judges of a run, opened once. Prompts' voices are kept. May be used from several threads.

    Raises ValueError for a judge that is not there: before any work.
    """

    def __init__(self, names: Names, language: str = "en"):
        self.language = language
        self.words = judges.recognizer(names.words, language) if names.words != "none" else None
        self.speaker = judges.speaker(names.speaker) if names.speaker != "none" else None
        self.mos = judges.mos(names.mos) if names.mos != "none" else None
        self._prompts: dict[pathlib.Path, np.ndarray | None] = {}

    def described(self) -> dict[str, dict[str, str]]:
        """What is printed beside the figures."""
        given = {"WER": self.words, "SIM": self.speaker, "MOS": self.mos}
        return {k: judges.describe(j) for k, j in given.items() if j}

    def prompt(self, path: pathlib.Path) -> np.ndarray | None:
        """The voice of a prompt."""
        if path not in self._prompts:
            self._prompts[path] = self.speaker(*sound.read(path))
        return self._prompts[path]

    def score(
        self,
        path: pathlib.Path,
        reference: str | None,
        prompt: pathlib.Path | None,
        *,
        window: float | None = WINDOW,
    ) -> dict[str, Any]:
        """What the judges say of a file; one that is missing or unreadable has none of its words right.

        Args:
          path: of the sound.
          reference: what it should say, if that is known.
          prompt: the voice it should have, if there is one.
          window: seconds of it that are heard for their words; None for all.

        Returns:
          For each measure a value or None: "wer" with "edits" (substitutions, deletions, insertions), "words" and
          "missing_at_end", "sim", "mos", "seconds", "heard"; "missing" says why there is no sound, None where there is.
        """
        found: dict[str, Any] = {"missing": None, "sound": None, "seconds": None}
        nothing = dict.fromkeys(("heard", "wer", "edits", "words", "missing_at_end", "sim", "mos"))
        try:
            if not path.is_file():
                raise AudioError("no such file")
            found["sound"] = lists.digest(path)
            samples, rate = sound.read(path)
        except (AudioError, OSError) as e:
            found["missing"] = str(e).replace(str(path), path.name)
            return found | nothing | self._compared(reference, "")
        found["seconds"] = round(len(samples) / rate, 3)
        found |= nothing
        if self.words:
            window = len(samples) if window is None else int(window * rate)
            found["heard"] = self.words(samples[:window], rate)
            found |= self._compared(reference, found["heard"])
        if self.speaker and prompt:
            voice, wanted = self.speaker(samples, rate), self.prompt(prompt)
            if voice is not None and wanted is not None:
                found["sim"] = round(judges.similarity(voice, wanted), 4)
        if self.mos and (value := self.mos(samples, rate)) is not None:
            found["mos"] = round(value, 3)
        return found

    def _compared(self, reference: str | None, heard: str) -> dict[str, Any]:
        if not self.words or reference is None:
            return {}
        return compared(
            text.seed_tts(reference, self.language), text.seed_tts(heard, self.language)
        )


def compared(reference: str, heard: str) -> dict[str, Any]:
    """Errors between normalised texts, as items have them; none of a reference without words."""
    if not reference.split():
        return {}
    errors = text.errors(reference, heard)
    return {
        "wer": round(errors.rate, 6),
        "edits": list(errors[:3]),
        "words": errors.words,
        "missing_at_end": text.missing_at_end(reference, heard),
    }


def unchanged(row: dict, path: pathlib.Path) -> bool:
    """Whether an item's values are of the sound that lies there now."""
    if not path.is_file():
        return row["sound"] is None
    return row["sound"] == lists.digest(path)


def means(rows: list[dict], seed: int) -> dict[str, Any]:
    """The figures of items: estimates of "wer", "wer_corpus", "sim", "mos", and how many items each has."""
    said = [r for r in rows if r.get("wer") is not None]
    return {
        "n": len(rows),
        "missing": sum(r["missing"] is not None for r in rows),
        "wer": statistics.mean([r["wer"] for r in said], seed),
        "wer_corpus": statistics.ratio([sum(r["edits"]) for r in said], [r["words"] for r in said], seed),
        "missing_at_end": sum(r["missing_at_end"] for r in said),
        "sim": statistics.mean([r["sim"] for r in rows if r["sim"] is not None], seed),
        "mos": statistics.mean([r["mos"] for r in rows if r["mos"] is not None], seed),
    }  # fmt: skip


def table_row(name: str, found: dict[str, Any]) -> dict[str, str]:
    """A row of the table for `means`' figures."""
    return {
        "what": name,
        "n": str(found["n"]),
        "missing": str(found["missing"]),
        "WER, %": tables.estimate(found["wer"], 2, 100),
        "corpus WER, %": tables.estimate(found["wer_corpus"], 2, 100),
        "words missing at the end": str(found["missing_at_end"]) if found["wer"] else "–",
        "SIM": _with_count(tables.estimate(found["sim"], 3), found, "sim"),
        "MOS": _with_count(tables.estimate(found["mos"], 2), found, "mos"),
    }


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """`means`' figures as a summary has them: values, and their intervals apart."""
    values = {k: v.value if isinstance(v, statistics.Estimate) else v for k, v in found.items()}
    estimates = {k: v for k, v in found.items() if isinstance(v, statistics.Estimate)}
    values = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
    return values | {
        "intervals": {k: [round(v.low, 6), round(v.high, 6)] for k, v in estimates.items()},
        "counted": {k: v.n for k, v in estimates.items()},
    }


def _with_count(text: str, found: dict, key: str) -> str:
    """Says of how many items a mean is, where it is not of all."""
    estimate = found[key]
    return f"{text} (n {estimate.n})" if estimate and estimate.n != found["n"] else text
