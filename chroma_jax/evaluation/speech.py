"""Given texts spoken in given voices, by the protocol of Seed-TTS-eval: are the words right, is it the voice, does it sound good?"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

from chroma_jax.audio.wav import save_wav
from chroma_jax.evaluation import scoring, tables, text
from chroma_jax.evaluation.judges import similarity
from chroma_jax.evaluation.lists import Item, digest, read_list
from chroma_jax.evaluation.results import Results
from chroma_jax.evaluation.scoring import Ears
from chroma_jax.evaluation.speaking import Speaker

_MOST_SPEAKERS = 20  # that a table of their own is made for
OTHERS = 4  # speakers that each prompt is compared with, for the floor


def check_texts(items: list[Item], language: str, where: str) -> None:
    """Raises ValueError for a text that has no words once it is normalised."""
    for item in items:
        if not text.seed_tts(item.text, language).split():
            raise ValueError(f"{where}: the text of {item.name} has no words: {item.text[:60]!r}")


def make(
    items: list[Item],
    folder: pathlib.Path,
    speaker: Speaker,
    setup: dict[str, Any],
    voice: tuple[pathlib.Path, str] | None = None,
) -> dict[str, int]:
    """Has every text said that is not yet: `folder/wavs/<name>.wav`. A run that was stopped goes on.

    `voice`, a recording and what it says, is for items without a prompt. What the model refuses is a missing sound, and its reason
    stands in `folder/made/items.jsonl`. Returns how many ended by which reason ("stop" is the only one that a listener wants).
    Raises ValueError for an item that has no voice.
    """
    from chroma_jax import Voice

    by_name = {item.name: item for item in items}
    for item in items:
        if not (item.prompt and item.prompt_text) and not voice:
            raise ValueError(
                f"{item.name} has no prompt with its text: give a voice for all with --voice and --voice_text"
            )
    voices: dict[tuple, Voice] = {}

    def path_of(name: str) -> pathlib.Path:
        return folder / "wavs" / f"{name}.wav"

    def work(name: str) -> dict[str, Any]:
        item = by_name[name]
        given = (item.prompt, item.prompt_text) if item.prompt and item.prompt_text else voice
        if given not in voices:
            voices[given] = Voice(*given)
        try:
            spoken = speaker.say(item.text, voices[given], name)
            save_wav(path_of(name), spoken.audio, spoken.rate)
        except ValueError as e:
            return {"finish_reason": "refused", "why": str(e)}
        return spoken.described()

    (folder / "wavs").mkdir(parents=True, exist_ok=True)
    rows = Results(folder / "made", setup).fill(
        list(by_name),
        work,
        title="speaking",
        stale=lambda r: r["finish_reason"] != "refused" and not path_of(r["key"]).is_file(),
    )
    reasons = [r["finish_reason"] for r in rows]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def run(
    list_path: pathlib.Path,
    wavs: pathlib.Path,
    out: pathlib.Path,
    ears: Ears,
    *,
    system: str,
    how: dict[str, Any] | None = None,
    codec: Callable[[pathlib.Path], tuple[Any, int]] | None = None,
    seed: int = 0,
    workers: int = 1,
) -> dict[str, Any]:
    """Scores `<name>.wav` of every item of the list, and the anchors beside them; returns the summary, as written to `out`.

    Args:
      list_path: see `lists.read_list`.
      wavs: the folder of the system's sounds; one that is not there has a word error rate of 1.
      out: the folder of the results. A run that was stopped goes on.
      ears: the judges.
      system: what the table calls it.
      how: how its sounds were made, where that is known; goes to the summary.
      codec: a prompt's path -> what the Codec leaves of it (samples, rate), for the ceiling.
      seed: of the intervals.
      workers: sounds scored side by side; no value depends on it.

    Raises ValueError for a bad list, a folder that is not there or empty of its names, results of another set-up.
    """
    items = read_list(list_path)
    check_texts(items, ears.language, str(list_path))
    if not wavs.is_dir():
        raise ValueError(f"no such folder: {wavs}")
    if not any((wavs / f"{item.name}.wav").exists() for item in items):
        raise ValueError(
            f"{wavs}: has none of the list's {len(items)} sounds, as {items[0].name}.wav"
        )
    setup = {
        "task": "speech",
        "system": system,
        "list": {"name": list_path.name, "digest": digest(list_path), "n": len(items)},
        "language": ears.language,
        "judges": ears.described(),
        "made": how,
    }
    results = Results(out, setup)
    rows: dict[str, list[dict]] = {}

    def score(title: str, sounds: dict[str, tuple[pathlib.Path, str | None, pathlib.Path | None]]) -> None:  # fmt: skip
        prefix = title.split()[0]
        keys = {f"{prefix}/{name}": given for name, given in sounds.items()}
        rows[title] = results.fill(
            list(keys),
            lambda key: ears.score(*keys[key]),
            workers=workers,
            stale=lambda row: not scoring.unchanged(row, keys[row["key"]][0]),
            title=title,
        )

    score("system", {i.name: (wavs / f"{i.name}.wav", i.text, i.prompt) for i in items})
    score("recording", {i.name: (i.recording, i.text, i.prompt) for i in items if i.recording})
    prompts = {i.prompt: i for i in items if i.prompt}
    score("codec", _through_codec(prompts, codec, out / "codec") if codec else {})
    rows["other"] = _others(prompts, ears, results, workers) if ears.speaker else []
    summary = _summary(setup, items, rows, seed)
    results.finish([r for part in rows.values() for r in part], summary, tables.page(summary))
    return summary


def _through_codec(
    prompts: dict[pathlib.Path, Item], codec: Callable, folder: pathlib.Path
) -> dict[str, tuple]:
    folder.mkdir(exist_ok=True)
    made = {}
    for path, item in prompts.items():
        name = f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"
        target = folder / f"{name}.wav"
        if not target.exists():
            save_wav(target, *codec(path))
        made[name] = (target, item.prompt_text, path)
    return made


def _others(
    prompts: dict[pathlib.Path, Item], ears: Ears, results: Results, workers: int
) -> list[dict]:
    """Prompts against prompts of other speakers: those that follow in the list. Where speakers are not named, another file is another."""
    paths = list(prompts)
    pairs = {}
    for step in range(1, OTHERS + 1):
        for i, one in enumerate(paths):
            other = paths[(i + step) % len(paths)]
            speakers = {prompts[p].speaker for p in (one, other)}
            if one != other and (len(speakers) == 2 or speakers == {None}):
                pairs.setdefault(frozenset((one, other)), (one, other))
    keys = {f"other/{a.stem}/{b.stem}/{i}": (a, b) for i, (a, b) in enumerate(pairs.values())}

    def compare(key: str) -> dict[str, Any]:
        voices = [ears.prompt(path) for path in keys[key]]
        known = all(v is not None for v in voices)
        sim = round(similarity(*voices), 4) if known else None
        return {"missing": None, "sim": sim, "mos": None}

    return results.fill(list(keys), compare, workers=workers, title="other")


_ROWS = {
    "recording": "human recording",
    "codec": "prompt through the Codec",
    "other": "another speaker",
}
_NONE = {
    "recording": "the list names no recordings",
    "codec": "no checkpoint was given",
    "other": "the list has no two speakers, or no judge of speakers was asked",
}


def _summary(
    setup: dict, items: list[Item], rows: dict[str, list[dict]], seed: int
) -> dict[str, Any]:
    found = {k: scoring.means(part, seed) for k, part in rows.items()}
    label = setup["system"]
    table = [
        scoring.table_row(_ROWS.get(k, label), found[k]) for k in rows if k == "system" or rows[k]
    ]
    absent = [f"{_ROWS[k]}: {why}" for k, why in _NONE.items() if not rows[k]]
    long = sum((r["seconds"] or 0) > scoring.WINDOW for r in rows["system"])
    note = [
        f"{setup['list']['name']} ({setup['list']['digest']}), n = {setup['list']['n']}, language {setup['language']}.",
        f"Judges: {tables.judges_note(setup['judges'])}.",
        "WER: mean over utterances, and over the corpus; Seed-TTS-eval's normalisation; a missing sound counts as 1. "
        "SIM: against the original prompt. [95 % bootstrap intervals over items], "
        f"seed {seed}.",
        *([f"Rows left out: {'; '.join(absent)}."] if absent else []),
        *([f"{long} sounds are longer than the {scoring.WINDOW} s that the ASR hears."] if long else []),
    ]  # fmt: skip
    if setup["made"]:
        how = ", ".join(f"{k} {v}" for k, v in setup["made"].items())
        note.append(
            f"How it was made: {how}. The Reasoner's text was forced to the target; its states are computed on it."
        )
    return {
        **setup,
        **scoring.plain(found["system"]),
        "seed": seed,
        "anchors": {k: scoring.plain(found[k]) for k in _ROWS if rows[k]},
        "tables": [
            {"title": f"Speech: {label}", "rows": table, "note": " ".join(note)},
            *_by_speaker(items, rows["system"], seed),
        ],
        "plots": ["wer", "sim", "mos", "seconds"],
    }


def _by_speaker(items: list[Item], rows: list[dict], seed: int) -> list[dict[str, Any]]:
    """A table with a row for each speaker, where the list names several."""
    speakers = dict.fromkeys(item.speaker for item in items if item.speaker)
    if not 1 < len(speakers) <= _MOST_SPEAKERS:
        return []
    table = []
    for speaker in speakers:
        own = [r for i, r in zip(items, rows, strict=True) if i.speaker == speaker]
        table.append(scoring.table_row(speaker, scoring.means(own, seed)))
    return [{"title": "By speaker", "rows": table, "note": "The same sounds as above."}]
