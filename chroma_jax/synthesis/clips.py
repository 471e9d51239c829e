"""Clips on disk: a voice says a text, anew with other seeds while filters refuse it, once for all rows, runs and processes.

    clips/ab/abcdef0123456789.flac    the sound, where it stayed
    clips/ab/abcdef0123456789.json    its scores, or why it went

A clip's name is a digest of everything that decides how it sounds: so it may be made twice, by two processes or after a kill, and
is the same. The JSON is written last: where it stands, the clip is whole.
"""

from __future__ import annotations

import json
import os
import random
import secrets
from typing import Any, NamedTuple

import numpy as np
import soundfile

from chroma_jax.data.files import write_atomically
from chroma_jax.synthesis import filters, sound
from chroma_jax.synthesis.config import SynthesisConfig, VoiceConfig, fingerprint
from chroma_jax.synthesis.filters import Typical, Verdict
from chroma_jax.synthesis.judging import Judges
from chroma_jax.synthesis.speakers import Speaker, open_speaker

QUESTION, ANSWER = "questions", "answers"  # what a clip is for

# What a voice says first: they make its typical pace and sound, and are what it can be prompted with.
PROMPTS = (
    "The morning sun is warm, and the birds sing in the garden.",
    "My brother has a small boat, and we sail on the lake.",
    "Please bring me a cup of tea and a piece of bread.",
    "Seven children play with a ball behind the old school.",
    "In the evening she reads a long book about the sea.",
    "The road to the village goes over a bridge and through a wood.",
)
_UNKNOWN = Typical()


class Clip(NamedTuple):
    """A clip that was made: `file` relative to the directory, None where it was refused for `reason`."""

    file: str | None
    reason: str | None
    scores: dict[str, Any]


class Clips:
    """Makes clips, or finds them made.

    Args:
      directory: of the synthesis.
      config: of the synthesis.
      judges: whom the filters ask.

    Raises:
      ValueError: a voice that cannot be opened, or none of whose first clips stays.
    """

    def __init__(self, directory: str, config: SynthesisConfig, judges: Judges):
        self._directory, self._config, self._judges = directory, config, judges
        self._voices = {voice.name: voice for voice in config.voices}
        self._keys = {voice.name: self._key_of(voice) for voice in config.voices}
        self._speakers: dict[str, Speaker] = {}
        self._typical: dict[str, Typical] = {}
        self._prompts: dict[str, list[tuple[str, str]]] = {}

    def say(self, voice: str, text: str, use: str, number: int) -> Clip:
        """A voice says a text.

        Args:
          voice: its name.
          text: what it says.
          use: QUESTION or ANSWER: questions are made to differ from each other.
          number: of the row's draw; it chooses the take.
        """
        take = number % self._config.sound.takes
        typical = self._usual(voice)
        return self._make(voice, text, use, take, typical)

    def prompt(self, voice: str, number: int) -> tuple[str, str]:
        """A clip to be the voice's prompt, and what it says; `number` draws it."""
        self._usual(voice)
        prompts = self._prompts[voice]
        return prompts[number % len(prompts)]

    def _usual(self, name: str) -> Typical:
        if name not in self._typical:
            # The first clips are judged by what can be said of a clip alone.
            use = QUESTION if self._voices[name].says == QUESTION else ANSWER
            made = [self._make(name, text, use, 0, _UNKNOWN) for text in PROMPTS]
            kept = [(c, text) for c, text in zip(made, PROMPTS, strict=True) if c.file]
            if not kept:
                reasons = ", ".join(sorted({str(clip.reason) for clip in made}))
                raise ValueError(f"voice {name}: none of its first {len(made)} clips stays: {reasons}")  # fmt: skip
            self._prompts[name] = [(clip.file, text) for clip, text in kept]
            self._typical[name] = self._summary([clip for clip, _ in kept])
        return self._typical[name]

    def _summary(self, clips: list[Clip]) -> Typical:
        mos = [clip.scores["mos"] for clip in clips if "mos" in clip.scores]
        embedding = None
        if self._judges.speaker and self._config.filters.min_similarity is not None:
            found = []
            for clip in clips:
                wave, rate = soundfile.read(os.path.join(self._directory, clip.file), dtype="float32")  # fmt: skip
                found.append(self._judges.speaker(wave, rate))
            found = [e / np.linalg.norm(e) for e in found if e is not None]
            embedding = np.mean(found, axis=0) if found else None
        return Typical(
            pace=float(np.median([clip.scores["pace"] for clip in clips])),
            mos=float(np.median(mos)) if mos else None,
            embedding=embedding,
        )

    def _key_of(self, voice: VoiceConfig) -> str:
        values = self._config.of_clips()
        mine = next(v for v in values["voices"] if v["name"] == voice.name)
        decides = {key: mine[key] for key in ("name", "speaker", "options")}
        return fingerprint([decides, values["sound"], values["filters"], values["seed"]])

    def _make(self, voice: str, text: str, use: str, take: int, typical: Typical) -> Clip:
        stage = "first" if typical is _UNKNOWN else "later"
        key = fingerprint([self._keys[voice], text, use, take, stage])
        base = os.path.join("clips", key[:2], key)
        note = os.path.join(self._directory, f"{base}.json")
        try:
            with open(note, encoding="utf-8") as f:
                values = json.load(f)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(note), exist_ok=True)
            values = self._speak(voice, text, use, key, typical, base)
            write_atomically(note, json.dumps(values).encode())
        return Clip(f"{base}.flac" if values["reason"] is None else None, values["reason"], values["scores"])  # fmt: skip

    def _speak(
        self, voice: str, text: str, use: str, key: str, typical: Typical, base: str
    ) -> dict[str, Any]:
        """Says the text with new seeds until it stays, and writes the sound. Returns the note."""
        verdict = Verdict("silent", {})
        for attempt in range(self._config.filters.attempts):
            rng = random.Random(f"{key}/{attempt}")
            seed = rng.getrandbits(31)
            verdict, wave = self._attempt(voice, text, use, seed, typical)
            if verdict.reason is None:
                if use == QUESTION:
                    wave = sound.vary(wave, rng, self._config.sound)
                self._write(f"{base}.flac", wave)
                break
        scores = {**verdict.scores, "seed": seed, "attempts": attempt + 1}
        return {"voice": voice, "text": text, "use": use, "reason": verdict.reason, "scores": scores}  # fmt: skip

    def _attempt(
        self, voice: str, text: str, use: str, seed: int, typical: Typical
    ) -> tuple[Verdict, np.ndarray]:
        config = self._config
        wave, rate = self._speaker(voice)(text, seed)
        try:
            wave = sound.tidy(wave, rate, config.sound)
        except sound.SoundlessError:
            return Verdict("silent", {}), np.zeros(0, np.float32)
        verdict = filters.judge(
            text,
            wave,
            config.sound.rate,
            config.filters,
            self._judges,
            typical,
            answer=use == ANSWER,
        )
        return verdict, wave

    def _speaker(self, name: str) -> Speaker:
        if name not in self._speakers:
            voice = self._voices[name]
            try:
                self._speakers[name] = open_speaker(voice.speaker, voice.options)
            except ValueError as e:
                raise ValueError(f"voice {name}: {e}") from e
        return self._speakers[name]

    def _write(self, file: str, wave: np.ndarray) -> None:
        path = os.path.join(self._directory, file)
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
        try:
            soundfile.write(
                temporary, wave, self._config.sound.rate, subtype="PCM_16", format="FLAC"
            )
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
