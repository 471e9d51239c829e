"""The page of a listening test: a folder to hand out, and a key to keep.

OUT/page/index.html   opens from the disk, no server; the items are inside
OUT/page/audio/       sounds under names that say nothing, of one rate and equal loudness
OUT/key.csv           which sound is whose: for scoring alone
"""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import io
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from chroma_jax.audio.wav import load_audio, save_wav
from chroma_jax.evaluation.lists import read_list
from chroma_jax.evaluation.results import write_text

RATE = 24_000
LOUDNESS = -23.0  # LUFS, of EBU R 128; less where a peak would pass full scale
_PEAK = 0.99
SCALES = {"preference": "a, b, same or unsure", "cmos": "B against A, -3 to 3"}
QUESTIONS = {
    "naturalness": "Which one sounds more natural?",
    "similarity": "Which voice is more like the voice of the reference?",
}
KEY_COLUMNS = ("version", "scale", "item", "dimension", "kind", "file", "system", "source")
SAME, INTACT, BROKEN = "same", "intact", "broken"  # whose the sounds of the checks are


class _Pair(NamedTuple):
    item: str
    dimension: str
    kind: str  # "trial", "training", or a check: "identical", "broken"
    sounds: tuple[tuple[str, str, np.ndarray], ...]  # (system, source, samples) of both
    reference: np.ndarray | None


def build(
    first: pathlib.Path,
    second: pathlib.Path,
    out: pathlib.Path,
    *,
    names: tuple[str, str],
    dimensions: Sequence[str] = ("naturalness",),
    list_path: pathlib.Path | None = None,
    items: int = 15,
    identical: int = 2,
    training: int = 2,
    scale: str = "preference",
    title: str = "Listening test",
    seed: int = 0,
) -> dict[str, Any]:
    """Makes the page and its key from two folders of WAVs with the same names.

    Args:
      first: sounds of the system that is tested.
      second: sounds of the one that it is compared with.
      out: where `page/` and `key.csv` are made; must not hold a sheet.
      names: what the results call the two.
      dimensions: of QUESTIONS; "similarity" plays the list's prompt as a reference.
      list_path: see `lists.read_list`; gives prompts, and which names are used; default all that both folders have.
      items: pairs for each dimension, drawn by the seed; all where there are fewer.
      identical: pairs of one sound, to see who hears differences where there are none; beside them one pair has a spoilt sound.
      training: pairs shown first, which do not count.
      scale: of SCALES.
      title: of the page.
      seed: of the draw, the names and which sound is which.

    Returns:
      "version", "items", "common" (names that both folders have) and "left_out".

    Raises ValueError for folders without a common name, no prompts for "similarity", an unknown dimension or scale, a sheet that is there.
    """
    for dimension in dimensions:
        if dimension not in QUESTIONS:
            raise ValueError(f"no dimension {dimension!r}: there are {', '.join(QUESTIONS)}")
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}: there are {', '.join(SCALES)}")
    if len(set(names)) < 2 or {*names} & {SAME, INTACT, BROKEN, ""}:
        raise ValueError(
            f"the two systems want names of their own, got {names[0]!r} and {names[1]!r}"
        )
    if (out / "key.csv").exists() or (out / "page").exists():
        raise ValueError(f"{out}: has a sheet already; answers to it would be lost")
    common, left_out, prompts = _common(first, second, list_path)
    if "similarity" in dimensions and not all(prompts.get(n) for n in common):
        raise ValueError("similarity needs the voices to compare with: --list with prompts")
    rng = np.random.default_rng(seed)
    pairs = []
    for dimension in dimensions:
        picked = list(rng.permutation(common)[: items + training])
        for i, name in enumerate(picked):
            kind = "training" if i < min(training, len(picked) - 1) else "trial"
            sounds = tuple(
                (system, name, _level(load_audio(folder / f"{name}.wav", RATE)))
                for system, folder in zip(names, (first, second), strict=True)
            )
            reference = None
            if dimension == "similarity":
                reference = _level(load_audio(prompts[name], RATE))
            pairs.append(_Pair(f"{dimension}-{i}", dimension, kind, sounds, reference))
        pairs += _checks(pairs[-len(picked) :], dimension, identical, rng)
    version = _write(out, pairs, rng, scale=scale, title=title)
    return {"version": version, "items": len(pairs), "common": len(common), "left_out": left_out}


def _common(first: pathlib.Path, second: pathlib.Path, list_path: pathlib.Path | None):
    """Names that both have, how many only one has, and the prompts."""
    sets = []
    for folder in (first, second):
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder}")
        sets.append({p.stem for p in folder.glob("*.wav")})
    listed = {i.name: i.prompt for i in read_list(list_path)} if list_path else {}
    wanted = set(listed) or sets[0] | sets[1]
    common = sorted(wanted & sets[0] & sets[1])
    if not common:
        raise ValueError(f"{first} and {second} have no WAV of the same name")
    return common, len(wanted) - len(common), listed


def _checks(pairs: list[_Pair], dimension: str, identical: int, rng) -> list[_Pair]:
    """One sound twice, and one against itself under noise as loud as it is."""
    made = []
    for i in range(identical + 1):
        pair = pairs[i % len(pairs)]
        _, source, samples = pair.sounds[int(rng.integers(2))]
        if i < identical:
            kind, sounds = "identical", ((SAME, source, samples), (SAME, source, samples))
        else:
            noise = samples.std() * rng.standard_normal(len(samples)).astype(np.float32)
            kind = "broken"
            sounds = ((INTACT, source, samples), (BROKEN, source, _level(samples + noise)))
        made.append(_Pair(f"{dimension}-check-{i}", dimension, kind, sounds, pair.reference))
    return made


def _level(samples: np.ndarray) -> np.ndarray:
    """At the common loudness by BS.1770. A clip that is too short for it or silent stays as it is."""
    try:
        import pyloudnorm
    except ImportError as e:
        raise ValueError("equal loudness needs pyloudnorm: pip install pyloudnorm (in chroma_jax[evaluate])") from e  # fmt: skip
    meter = pyloudnorm.Meter(RATE)
    if len(samples) < 0.4 * RATE:
        return samples
    found = meter.integrated_loudness(samples.astype(np.float64))
    if not np.isfinite(found):
        return samples
    gain = 10 ** ((LOUDNESS - found) / 20)
    return (samples * min(gain, _PEAK / np.abs(samples).max())).astype(np.float32)


def _write(out: pathlib.Path, pairs: list[_Pair], rng, *, scale: str, title: str) -> str:
    partial = out / "page.partial"
    shutil.rmtree(partial, ignore_errors=True)
    audio = partial / "audio"
    audio.mkdir(parents=True)
    used: set[str] = set()
    sha = hashlib.sha256(json.dumps([scale, title]).encode())

    def sound(samples: np.ndarray) -> str:
        while (name := rng.bytes(6).hex()) in used:
            pass
        used.add(name)
        save_wav(audio / f"{name}.wav", samples, RATE)
        sha.update(name.encode() + (audio / f"{name}.wav").read_bytes())
        return name

    shown, key = [], []
    for pair in pairs:
        files = [sound(samples) for _, _, samples in pair.sounds]
        reference = sound(pair.reference) if pair.reference is not None else None
        for file, (system, source, _) in zip(files, pair.sounds, strict=True):
            key.append((scale, pair.item, pair.dimension, pair.kind, file, system, source))
        shown.append({
            "item": pair.item, "dimension": pair.dimension, "question": QUESTIONS[pair.dimension],
            "sounds": sorted(files), "reference": reference, "training": pair.kind == "training",
        })  # fmt: skip
    # Checks must not stand out: items get numbers in an order that says nothing, training first.
    order = rng.permutation(len(shown))
    ranked = sorted(range(len(shown)), key=lambda i: (not shown[i]["training"], order[i]))
    renamed = {shown[i]["item"]: f"{rank + 1:03d}" for rank, i in enumerate(ranked)}
    shown = [shown[i] | {"item": renamed[shown[i]["item"]]} for i in ranked]
    version = sha.hexdigest()[:12]
    content = {"version": version, "title": title, "scale": scale, "items": shown}
    page = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    inside = json.dumps(content).replace("<", "\\u003c")
    write_text(partial / "index.html", page.replace("{{SHEET}}", inside))
    rows = sorted((version, s, renamed[item], *rest) for s, item, *rest in key)
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([KEY_COLUMNS, *rows])
    write_text(out / "key.csv", file.getvalue())
    partial.rename(out / "page")
    return version
