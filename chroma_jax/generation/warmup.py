"""Compiling ahead: everything that a live reply runs, and a cache on disk that spares the next process the work."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.audio.batch import question_shape
from chroma_jax.generation import caches, runtime
from chroma_jax.generation.listening import CHUNKS_PER_CALL
from chroma_jax.generation.request import Heard, Request, check_voice
from chroma_jax.generation.sampling import Sampling
from chroma_jax.generation.state import Prompt
from chroma_jax.generation.voice import Voice

if TYPE_CHECKING:
    from chroma_jax.generation.session import Chroma


def compilation_cache(directory: str | os.PathLike | None = None) -> str:
    """Keeps compiled programs on disk, so that the next process with the same sizes and the same JAX does not compile.

    Call it before the first reply. What is in the directory is run: it must be yours alone.

    Args:
      directory: default what JAX_COMPILATION_CACHE_DIR says, or chroma_jax in XDG_CACHE_HOME, or ~/.cache/chroma_jax.

    Returns:
      The directory. Raises ValueError when it cannot be made or written.
    """
    if directory is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        # What the environment or the program has told JAX stays.
        directory = jax.config.jax_compilation_cache_dir or os.path.join(home, "chroma_jax")
    path = os.path.abspath(os.path.expanduser(os.fspath(directory)))
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as e:
        raise ValueError(f"{path}: no directory for compiled programs: {e.strerror}") from e
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: no directory for compiled programs: it cannot be written to")
    jax.config.update("jax_compilation_cache_dir", path)
    # JAX leaves out what takes less than a second to compile, but a reply's small programs together take seconds, too.
    if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return path


def compile_request(chroma: Chroma, request: Request, done: set[tuple] | None = None) -> None:
    """Runs each program of a live reply to the request once: its prefill, and a beat in every size of the caches.

    `done` holds what earlier calls have run, and is added to.
    """
    done = set() if done is None else done
    room = request.room(chroma.config, grow=chroma.grow)
    steps = list(room.path())
    state = request.begin(chroma.held, steps[0])
    pairs = list(zip([None, *steps], steps, strict=False))
    if done.issuperset(pairs):
        return
    for before, sizes in pairs:
        if before:
            state = caches.resize(state, sizes)
        if (before, sizes) not in done:
            done.add((before, sizes))
            state, out = runtime.beat(chroma.held, state)
            jax.block_until_ready(out)


def warm_up(
    chroma: Chroma,
    voice: Voice,
    *,
    question_seconds: float,
    max_seconds: float | None,
    sampling: Sampling | None,
    system_prompt: str | None,
    listening: bool,
) -> float:
    """`Chroma.warmup`."""
    start = time.perf_counter()
    if not question_seconds > 0:
        raise ValueError(f"question_seconds must be positive, got {question_seconds}")
    _, positions = check_voice(chroma.processor, voice)
    max_frames = runtime.max_frames_of(chroma.config, max_seconds, positions)
    voiced = chroma.hear_voice(voice)
    done: set[tuple] = set()
    for length, chunks in _question_shapes(chroma, question_seconds, system_prompt):
        prompt = _blank(chroma, length, chunks)
        request = Request(prompt, *voiced, max_frames, sampling or Sampling(), 0)
        compile_request(chroma, request, done)
    if listening:
        heard = _compile_listening(chroma, voice, question_seconds, system_prompt)
        text, audio = _text(chroma, system_prompt), chroma.config.reasoner.audio
        lengths = [text + audio.num_features(n) for n in _lengths(chroma, question_seconds, text)]
        first = set()
        for length in lengths:
            request = Request(
                Heard(None, None, length), *voiced, max_frames, sampling or Sampling(), 0
            )
            sizes = request.room(chroma.config, grow=chroma.grow).sizes()
            if sizes not in first:
                first.add(sizes)
                # `start` takes the cache away.
                question = heard._replace(cache=jax.tree.map(jnp.copy, heard.cache), length=length)
                request = request._replace(question=question)
                compile_request(chroma, request, done)
    return time.perf_counter() - start


def _question_shapes(
    chroma: Chroma, seconds: float, system_prompt: str | None
) -> list[tuple[int, int]]:
    """Padded tokens and chunks of spoken questions up to this long, in order."""
    text, reasoner = _text(chroma, system_prompt), chroma.config.reasoner
    shapes = []
    for frames in _lengths(chroma, seconds, text):
        tokens, chunks = question_shape(
            chroma.config,
            text + reasoner.audio.num_features(frames),
            -(-frames // reasoner.audio.chunk_frames),
        )
        shapes.append((tokens, chunks))
    return list(dict.fromkeys(shapes))


def _text(chroma: Chroma, system_prompt: str | None) -> int:
    """Tokens around a spoken question."""
    around = chroma.processor.open_question((), None, system_prompt)
    return len(around.before.ids) + len(around.after)


def _lengths(chroma: Chroma, seconds: float, text: int) -> range:
    """Mel frames of questions up to this long: one for each feature more, as long as the context holds them."""
    mel, reasoner = chroma.processor.mel, chroma.config.reasoner
    frames = min(int(seconds * mel.sampling_rate), mel.max_samples) // mel.hop_length
    room = 4 * (reasoner.text.max_positions - 2 * text)
    return range(4, max(5, min(frames, room) + 1), 4)


def _blank(chroma: Chroma, length: int, chunks: int) -> Prompt:
    reasoner = chroma.config.reasoner
    return Prompt(
        np.full((1, length), reasoner.pad_token_id, np.int32),
        np.array([length], np.int32),
        np.zeros((1, chunks, reasoner.audio.chunk_frames, reasoner.audio.num_mel_bins), np.float32),
        np.zeros((1, chunks), np.int32),
        *[None] * 4,
    )


def _compile_listening(
    chroma: Chroma, voice: Voice, seconds: float, system_prompt: str | None
) -> Heard:
    """Listens to silence: one chunk, many at once, the end of a question; longer and longer, for the sizes of the cache."""
    chunk = chroma.config.reasoner.audio.chunk_frames * chroma.processor.mel.hop_length
    many = np.zeros(CHUNKS_PER_CALL * chunk, np.float32)
    rounds, most = 1, max(1, int(seconds * chroma.processor.mel.sampling_rate) // len(many))
    while True:
        with chroma.listen(voice=voice, system_prompt=system_prompt) as listening:
            for _ in range(rounds):
                listening.push(many)
            listening.push(many[: chunk + chunk // 2])
            heard = listening.request().question
        if rounds == most:
            return heard
        rounds = min(2 * rounds, most)
