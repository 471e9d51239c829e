"""What a Codec leaves of speech: sounds go through it and back, and are judged as any system's are (`evaluation/speech.py`).

OUT/list.jsonl, OUT/wavs     the sounds as a list for `speech`, and what came back
OUT/items.jsonl, ...         the results; the originals are the table's recordings, the ceiling
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from chroma_jax.audio.wav import load_audio, save_wav
from chroma_jax.checkpoint.codec_files import load_any_codec
from chroma_jax.config import CodecConfig
from chroma_jax.evaluation import speech
from chroma_jax.evaluation.lists import check_files, read_lines, read_object
from chroma_jax.evaluation.scoring import Ears
from chroma_jax.model.codec import Codec

_ROOM = 2  # seconds that sounds are filled up to a multiple of: programs are few


class Sound(NamedTuple):
    """One recording and what it says."""

    name: str
    audio: pathlib.Path
    text: str
    speaker: str | None


def run(
    source: str,
    manifest: pathlib.Path,
    out: pathlib.Path,
    ears: Ears,
    *,
    per_speaker: int,
    num_codebooks: int | None = None,
    seed: int = 0,
    workers: int = 1,
) -> dict[str, Any]:
    """Judges a Codec on recordings; returns the summary, as written to `out`.

    Args:
      source: a Codec in Mimi's layout, or a whole Chroma.
      manifest: JSON lines with "audio" (relative to it), "text", and as they are known "id" and "speaker".
      out: the folder of everything.
      ears: the judges.
      per_speaker: recordings of each speaker at most, the last ones.
      num_codebooks: of the first how many codebooks sound is made; None: all.
      seed, workers: as in `speech.run`.

    Raises ValueError for what is no Codec, a manifest that cannot be read, and as `speech.run`.
    """
    sounds = read_manifest(manifest, per_speaker)
    for sound in sounds:
        speech.check_texts([sound], ears.language, str(manifest))
    cfg, codec = load_any_codec(source)
    reconstruct(cfg, codec, sounds, out / "wavs", num_codebooks)
    listed = out / "list.jsonl"
    with open(listed, "w", encoding="utf-8") as f:
        for sound in sounds:
            audio = str(sound.audio.resolve())
            row = dict(name=sound.name, text=sound.text, prompt=audio, recording=audio)
            f.write(json.dumps(row | {"speaker": sound.speaker}, ensure_ascii=False) + "\n")
    books = cfg.num_quantizers if num_codebooks is None else num_codebooks
    system = f"{pathlib.Path(source).name}, {books} codebooks"
    return speech.run(
        listed,
        out / "wavs",
        out,
        ears,
        system=system,
        how={"codec": source},
        seed=seed,
        workers=workers,
    )


def read_manifest(path: pathlib.Path, per_speaker: int) -> list[Sound]:
    """The last `per_speaker` recordings of each speaker. Raises ValueError naming the line that is wrong."""
    by_speaker: dict[str | None, list[Sound]] = {}
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        row = read_object(line, where)
        for key in ("audio", "text"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{where}: {key} is missing")
        audio = path.parent / row["audio"]
        sound = Sound(str(row.get("id", audio.stem)), audio, row["text"], row.get("speaker"))
        by_speaker.setdefault(sound.speaker, []).append(sound)
    sounds = [sound for of_one in by_speaker.values() for sound in of_one[-per_speaker:]]
    check_files(path, [sound.audio for sound in sounds])
    return sounds


def reconstruct(
    cfg: CodecConfig,
    codec: Codec,
    sounds: list[Sound],
    folder: pathlib.Path,
    num_codebooks: int | None = None,
) -> None:
    """Writes `<name>.wav` of every sound, through the codec and back."""
    folder.mkdir(parents=True, exist_ok=True)
    through = jax.jit(lambda codec, wave: codec.decode(codec.encode(wave, None, num_codebooks)))
    room = _ROOM * cfg.sampling_rate // cfg.frame_samples * cfg.frame_samples
    for sound in sounds:
        wave = load_audio(str(sound.audio), cfg.sampling_rate)
        filled = np.pad(wave, (0, -len(wave) % room))
        made = np.asarray(through(codec, filled[None]))[0, : len(wave)]
        save_wav(folder / f"{sound.name}.wav", np.clip(made, -1, 1), cfg.sampling_rate)
