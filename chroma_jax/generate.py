r"""Answers a question in a voice, and writes what it says.

    python -m chroma_jax.generate --checkpoint=DIR_OR_HUB_ID --question=question.wav \
        --voice=reference.wav --voice_text="What the reference says." --out=reply.wav

    python -m chroma_jax.generate --config=tiny     needs nothing: random weights make noise of a made-up question

The text appears on standard output as it is spoken; the reply is written also when nobody reads it (`| head`). The question may also
be --text. With --say="WORDS" these words are spoken, whatever the question is, and there need not be one. A checkpoint is a directory of the Hub's layout, one made
by `python -m chroma_jax.convert`, or a Hub id. Exit code 2 and one line on standard error for anything that you can mend.
"""

from __future__ import annotations

import functools
import sys
import time

from absl import flags

from chroma_jax import cli

_WHERE = (
    "no --checkpoint: pass a directory, or --checkpoint=FlashLabs/Chroma-4B (gated on the Hub: accept its licence, then "
    "`hf auth login`), or --config=tiny for random weights"
)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the command only: other commands have flags of the same names."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    path = functools.partial(cli.path_flag, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    choice = functools.partial(flags.DEFINE_enum, flag_values=values)
    path(
        "checkpoint",
        None,
        "directory (Hub layout or converted) or Hub id of the weights",
        remote=True,
    )
    choice(
        "config",
        None,
        ["tiny"],
        "instead of a checkpoint: random weights of this size, which make noise; all other flags may then be left out",
    )
    path("question", None, "sound file with the spoken question")
    string(
        "text",
        None,
        "the question as text; with --question, what follows the sound in the same turn",
    )
    string("say", None, "words to speak instead of an answer of the model's own")
    path("voice", None, "sound file with the reference voice, or a voice saved as .npz")
    string("voice_text", None, "exactly what the reference voice says")
    path("out", None, "WAV file to write")
    path(
        "compilation_cache",
        None,
        "directory in which compiled programs are kept for the next call; empty for none; default: "
        "$JAX_COMPILATION_CACHE_DIR, or chroma_jax in $XDG_CACHE_HOME or ~/.cache",
    )
    string("system_prompt", None, "replaces the default system prompt; empty for none")
    number("max_seconds", None, "longest answer; default: as long as the context allows")
    choice(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "weights and arithmetic; default: as stored",
    )
    choice(
        "quantize",
        None,
        ["int8", "fp8"],
        "hold kernels and tables in eight bits; default: as stored",
    )
    integer("seed", 0, "the same seed gives the same reply", lower_bound=0, upper_bound=2**32 - 1)
    number("temperature", 0.0, "of the speech codes; 0 is greedy")
    integer("top_k", 0, "keep the k likeliest speech codes; 0 keeps all")
    number("top_p", 1.0, "keep the likeliest speech codes of this total probability")
    number("min_p", 0.0, "keep speech codes at least this fraction as likely as the likeliest")
    number("repetition_penalty", 1.0, "against speech codes already used; 1 is off")
    number("text_temperature", 0.0, "of the text; 0 is greedy")
    number("text_top_p", 1.0, "keep the likeliest text tokens of this total probability")


def _sampling(given):
    from chroma_jax import Sampling, TokenSampling

    return Sampling(
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
        text=TokenSampling(temperature=given.text_temperature, top_p=given.text_top_p),
    )


def _voice(given):
    from chroma_jax import Voice

    if given.config and not given.voice:
        import numpy as np

        noise = np.random.default_rng(0).standard_normal(24000).astype(np.float32)
        return Voice((0.1 * noise, 24000), given.voice_text)
    if not given.voice:
        raise cli.CommandError(
            "no --voice: Chroma answers in the voice of a reference recording, with --voice_text"
        )
    if Voice.is_saved(given.voice):
        return Voice.load(given.voice)
    if not given.voice_text:
        raise cli.CommandError(
            "no --voice_text: a voice needs its transcript, exactly what the recording says"
        )
    return Voice(given.voice, given.voice_text)


def _processor(given):
    """The part of the model that costs nothing: configuration and tokenizer."""
    from chroma_jax.audio.prompt import Processor
    from chroma_jax.checkpoint import read_config, resolve_source
    from chroma_jax.config import tiny

    if given.config:
        config = tiny().with_dtype(given.dtype or "float32").with_quantized(given.quantize)
        return Processor.load(config)
    directory = resolve_source(given.checkpoint)
    return Processor.load(read_config(directory), directory)


def _chroma(given, processor):
    from chroma_jax import Chroma

    if given.config:
        return Chroma.random(processor.config, seed=0)
    return Chroma.from_pretrained(given.checkpoint, dtype=given.dtype, quantize=given.quantize)


def _make_up(given) -> None:
    """With random weights any input will do: what is not given is made up, and said."""
    made = {}
    if not (given.question or given.text or given.say is not None):
        made["text"] = "Can you hear me?"
    if not given.out:
        made["out"] = "reply.wav"
    if given.max_seconds is None:  # untrained, it would go on until its context is full
        made["max_seconds"] = 2.0
    if not given.voice:
        made["voice_text"] = given.voice_text or "a second of noise"
    for name, value in made.items():
        given[name].value = value
    print(
        "random weights (--config=tiny): what follows is noise, not speech"
        + "".join(f"; --{name}={value!r}" for name, value in made.items()),
        file=sys.stderr,
    )


def main(given: flags.FlagValues = flags.FLAGS) -> None:
    """Reads the flags, checks all of the input, answers, writes, reports."""
    from chroma_jax import Turn
    from chroma_jax.audio.wav import check_output
    from chroma_jax.engine.request import check_request
    from chroma_jax.engine.warmup import compilation_cache, compile_request
    from chroma_jax.generation.reply import ReplyStream

    # Everything that can be wrong with the call, before the weights are read.
    if bool(given.checkpoint) == bool(given.config):
        raise cli.CommandError(
            _WHERE if not given.checkpoint else "--checkpoint and --config exclude each other"
        )
    if given.config:
        _make_up(given)
    if not (given.question or given.text or given.say is not None):
        raise cli.CommandError(
            "no question: give --question=FILE (sound), --text=TEXT, or both; or --say=TEXT"
        )
    if not given.out:
        raise cli.CommandError("no --out: name the WAV file to write")
    check_output(given.out, inputs=[given.question, given.voice])
    sampling, voice = _sampling(given), _voice(given)
    question = None
    if given.question or given.text:
        question = Turn(audio=given.question, text=given.text)
    processor = _processor(given)
    check_request(processor, question, voice, given.max_seconds, given.system_prompt, given.say)

    if given.compilation_cache != "":
        try:
            compilation_cache(given.compilation_cache)
        except ValueError:
            if given.compilation_cache:
                raise  # by default there is one where there can be one
    start = time.perf_counter()
    chroma = _chroma(given, processor)

    def request():
        return chroma.engine.request(
            question,
            voice,
            given.max_seconds,
            sampling,
            given.seed,
            given.system_prompt,
            say=given.say,
        )

    loaded = time.perf_counter()
    # Encodes the voice, and compiles all that the reply will run.
    compile_request(chroma.engine, request())
    ready = time.perf_counter()

    first_sound = None
    with ReplyStream(chroma.engine, request()) as stream:
        for chunk in stream:
            if first_sound is None and len(chunk.audio):
                first_sound = time.perf_counter() - ready
            print(chunk.text, end="", flush=True)
    total = time.perf_counter() - ready
    print(flush=True)
    reply = stream.reply()
    reply.save(given.out)
    _report(chroma, reply, given.out, loaded - start, ready - loaded, first_sound, total)


def _report(
    chroma, reply, out: str, loading: float, warming: float, first_sound: float | None, total: float
) -> None:
    from chroma_jax.engine.programs import time_codec

    report = {"loading": f"{loading:.2f} s", "compilation and warm-up": f"{warming:.2f} s"}
    if reply.seconds:
        codec = time_codec(chroma.model, reply.frames)
        report |= {
            "time to first sound": f"{1000 * first_sound:.1f} ms",
            "real-time factor with codec": f"{total / reply.seconds:.3f}",
            "real-time factor without codec": f"{max(total - codec, 0) / reply.seconds:.3f} (the codec timed by itself: {1000 * codec:.0f} ms)",
        }
    report |= {
        "audio": f"{reply.seconds:.2f} s -> {out}",
        "finish reason": reply.finish_reason,
    }
    for name, value in report.items():
        print(f"{name}: {value}", file=sys.stderr)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
