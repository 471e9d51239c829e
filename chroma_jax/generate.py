r"""Answers a question in a voice, and writes what it says.

    python -m chroma_jax.generate --checkpoint=DIR_OR_HUB_ID --question=question.wav \
        --voice=reference.wav --voice_text="What the reference says." --out=reply.wav

The text appears as it is spoken. The question may also be --text. A checkpoint is a directory of the Hub's layout, one made
by `python -m chroma_jax.convert`, or a Hub id. Exit code 2 and one line on standard error for anything that you can mend.
"""

from __future__ import annotations

import sys
import time

from absl import flags

from chroma_jax import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "directory (Hub layout or converted) or Hub id of the weights"
)
_CONFIG = flags.DEFINE_enum(
    "config",
    None,
    ["tiny"],
    "instead of a checkpoint: random weights of this size, which make noise",
)
_QUESTION = flags.DEFINE_string("question", None, "sound file with the spoken question")
_TEXT = flags.DEFINE_string("text", None, "the question as text; with --question, said after it")
_VOICE = flags.DEFINE_string(
    "voice", None, "sound file with the reference voice, or a voice saved as .npz"
)
_VOICE_TEXT = flags.DEFINE_string("voice_text", None, "exactly what the reference voice says")
_OUT = flags.DEFINE_string("out", None, "WAV file to write")
_SYSTEM = flags.DEFINE_string(
    "system_prompt", None, "replaces the default system prompt; empty for none"
)
_MAX_SECONDS = flags.DEFINE_float(
    "max_seconds", None, "longest answer; default: as long as the context allows"
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "weights and arithmetic; default: as stored"
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "the same seed gives the same reply", lower_bound=0, upper_bound=2**32 - 1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of the speech codes; 0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k likeliest speech codes; 0 keeps all")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "keep the likeliest speech codes of this total probability"
)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "keep speech codes at least this fraction as likely as the likeliest"
)
_REPETITION = flags.DEFINE_float(
    "repetition_penalty", 1.0, "against speech codes already used; 1 is off"
)
_TEXT_TEMPERATURE = flags.DEFINE_float("text_temperature", 0.0, "of the text; 0 is greedy")
_TEXT_TOP_P = flags.DEFINE_float(
    "text_top_p", 1.0, "keep the likeliest text tokens of this total probability"
)

_WHERE = (
    "no --checkpoint: the weights are FlashLabs/Chroma-4B on the Hugging Face Hub (gated: accept its licence there, "
    "then `hf auth login`); pass --checkpoint=FlashLabs/Chroma-4B or a directory, or --config=tiny for random weights"
)


def _sampling():
    from chroma_jax import Sampling, TokenSampling

    return Sampling(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_REPETITION.value,
        text=TokenSampling(temperature=_TEXT_TEMPERATURE.value, top_p=_TEXT_TOP_P.value),
    )


def _voice():
    from chroma_jax import Voice

    if not _VOICE.value:
        raise cli.CommandError(
            "no --voice: Chroma answers in the voice of a reference recording, with --voice_text"
        )
    if _VOICE.value.endswith(".npz"):
        return Voice.load(_VOICE.value)
    if not _VOICE_TEXT.value:
        raise cli.CommandError(
            "no --voice_text: a voice needs its transcript, exactly what the recording says"
        )
    return Voice(_VOICE.value, _VOICE_TEXT.value)


def _chroma():
    from chroma_jax import Chroma
    from chroma_jax.config import tiny

    if _CONFIG.value:
        config = tiny().with_dtype(_DTYPE.value or "float32")
        print("random weights (--config=tiny): what follows is noise, not speech", file=sys.stderr)
        return Chroma.random(config, seed=0)
    return Chroma.from_pretrained(_CHECKPOINT.value, dtype=_DTYPE.value)


def main() -> None:
    """Reads the flags, checks all of the input, answers, writes, reports."""
    from chroma_jax import Turn
    from chroma_jax.audio.wav import check_output, load_audio

    # Everything that can be wrong with the call, before the weights are read.
    if bool(_CHECKPOINT.value) == bool(_CONFIG.value):
        raise cli.CommandError(
            _WHERE if not _CHECKPOINT.value else "--checkpoint and --config exclude each other"
        )
    if not (_QUESTION.value or _TEXT.value):
        raise cli.CommandError("no question: give --question=FILE (sound), --text=TEXT, or both")
    if not _OUT.value:
        raise cli.CommandError("no --out: name the WAV file to write")
    if _MAX_SECONDS.value is not None and not _MAX_SECONDS.value > 0:
        raise cli.CommandError(f"--max_seconds must be positive, got {_MAX_SECONDS.value}")
    check_output(_OUT.value)
    sampling, voice = _sampling(), _voice()
    if _QUESTION.value:
        load_audio(_QUESTION.value, 16000)
    question = Turn(audio=_QUESTION.value, text=_TEXT.value)

    start = time.perf_counter()
    chroma = _chroma()
    request = dict(
        voice=voice,
        max_seconds=_MAX_SECONDS.value,
        sampling=sampling,
        seed=_SEED.value,
        system_prompt=_SYSTEM.value,
    )
    loaded = time.perf_counter()
    with chroma.stream(question, **request) as stream:  # compiles, and encodes the voice
        next(stream)
    ready = time.perf_counter()

    first_sound = None
    with chroma.stream(question, **request) as stream:
        for chunk in stream:
            if first_sound is None and len(chunk.audio):
                first_sound = time.perf_counter() - ready
            print(chunk.text, end="", flush=True)
    total = time.perf_counter() - ready
    print(flush=True)
    reply = stream.reply()
    reply.save(_OUT.value)
    _report(chroma, reply, loaded - start, ready - loaded, first_sound, total)


def _report(
    chroma, reply, loading: float, warming: float, first_sound: float | None, total: float
) -> None:
    from chroma_jax.generation.runtime import time_codec

    report = {"loading": f"{loading:.2f} s", "compilation and warm-up": f"{warming:.2f} s"}
    if reply.seconds:
        codec = time_codec(chroma.model, reply.frames)
        report |= {
            "time to first sound": f"{1000 * first_sound:.1f} ms",
            "real-time factor with codec": f"{total / reply.seconds:.3f}",
            "real-time factor without codec": f"{max(total - codec, 0) / reply.seconds:.3f} (the codec timed by itself: {1000 * codec:.0f} ms)",
        }
    report |= {
        "audio": f"{reply.seconds:.2f} s -> {_OUT.value}",
        "finish reason": reply.finish_reason,
    }
    for name, value in report.items():
        print(f"{name}: {value}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
