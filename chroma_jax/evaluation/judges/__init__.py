"""Judges of speech behind one small interface: (samples, rate) -> a text, a voice or a value.

    words = recognizer("whisper-base")
    words(samples, 24000)                        "the sun rises in the east"
    voices = speaker("resemblyzer")
    similarity(voices(a, 24000), voices(b, 16000))
    mos("distillmos")(samples, 24000)            4.5, or None where there is no speech

A judge is named by what it is, and where its weights are files, by `name:path`. It loads when it is opened; one that is missing
says what to install, and no other takes its place. All of them may be called from several threads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np

from chroma_jax import paths


class MissingJudge(ValueError):  # noqa: N818 (it names what is missing)
    """A judge whose package or weights are not here; the message says how to get them."""


@runtime_checkable
class Judge(Protocol):
    """What every judge says of itself, and prints beside its figures."""

    name: str
    digest: str  # the first 12 digits of the SHA-256 of its weights
    scale: str  # what its values mean, and where they lie


class Recognizer(Judge, Protocol):
    """Hears words."""

    def __call__(self, samples: np.ndarray, rate: int) -> str:
        """Mono samples [N] -> the words heard, "" where there is no speech."""


class Speaker(Judge, Protocol):
    """Hears who speaks."""

    def __call__(self, samples: np.ndarray, rate: int) -> np.ndarray | None:
        """Mono samples [N] -> the voice [D], None where there is no speech or too little of it."""


class Quality(Judge, Protocol):
    """Hears how good it sounds."""

    def __call__(self, samples: np.ndarray, rate: int) -> float | None:
        """Mono samples [N] -> an opinion score, None where there is no speech."""


RECOGNIZERS = {
    "whisper-base": "OpenAI's Whisper base in int8, from two wheels, through faster-whisper",
    "faster-whisper:DIR": "any Whisper in CTranslate2's format, as Systran/faster-whisper-large-v3",
}
SPEAKERS = {
    "resemblyzer": "Resemblyzer's GE2E, 256 values; the same speaker from about 0.79",
    "wavlm-large:FILE": "Seed-TTS-eval's WavLM-large (wavlm_large_finetune.pth), 256 values",
    "wavlm-base-plus-sv:DIR": "microsoft/wavlm-base-plus-sv, 512 values; the same speaker from about 0.86",
}
QUALITIES = {
    "distillmos": "DistillMOS, 1 to 5",
    "dnsmos": "DNSMOS P.835, overall, 1 to 5",
    "utmos:FILE": "UTMOS22 strong learner (utmos22_strong_step7459_v1.pt), 1 to 5",
}


def recognizer(name: str = "whisper-base", language: str = "en") -> Recognizer:
    """Opens one of RECOGNIZERS. Raises ValueError for an unknown name, MissingJudge for one that is not here."""
    _, path = _named(name, RECOGNIZERS)
    from chroma_jax.evaluation.judges import whisper

    return whisper.Whisper(path, language)


def speaker(name: str = "resemblyzer") -> Speaker:
    """Opens one of SPEAKERS; errors as `recognizer`."""
    kind, path = _named(name, SPEAKERS)
    if kind == "resemblyzer":
        from chroma_jax.evaluation.judges import resemblyzer

        return resemblyzer.Resemblyzer()
    from chroma_jax.evaluation.judges import wavlm_speaker

    return wavlm_speaker.open_speaker(kind, path)


def mos(name: str = "distillmos") -> Quality:
    """Opens one of QUALITIES; errors as `recognizer`."""
    kind, path = _named(name, QUALITIES)
    if kind == "utmos":
        from chroma_jax.evaluation.judges import utmos

        return utmos.Utmos(path)
    from chroma_jax.evaluation.judges import opinion

    return opinion.Dnsmos() if kind == "dnsmos" else opinion.DistillMos()


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """The cosine of two voices: 1 for the same sound."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def describe(judge: Judge) -> dict[str, str]:
    """What is printed beside its figures."""
    return {"judge": judge.name, "weights": judge.digest, "scale": judge.scale}


def _named(name: str, known: dict[str, str]) -> tuple[str, str | None]:
    kind, _, path = name.partition(":")
    for form in known:
        if form.partition(":")[0] == kind and bool(path) == (":" in form):
            return kind, paths.expand(path) or None
    raise ValueError(f"no judge {name!r}: there are {', '.join(known)}")


def weights_digest(parts: Iterable[str | os.PathLike | bytes]) -> str:
    """Of files, or of bytes."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            sha.update(part)
            continue
        with open(part, "rb") as f:
            while block := f.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()[:12]
