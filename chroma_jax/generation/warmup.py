"""Compiling ahead: everything that a live reply runs, and a cache on disk that spares the next process the work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.audio.batch import question_shape
from chroma_jax.engine import caches, programs
from chroma_jax.engine.request import Prefilled, Request, check_voice
from chroma_jax.engine.sampling import Sampling
from chroma_jax.engine.state import Prompt
from chroma_jax.engine.voice import Voice
from chroma_jax.generation.listening import CHUNKS_PER_CALL

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
    state = request.begin(chroma.flat, steps[0])
    pairs = list(zip([None, *steps], steps, strict=False))
    if done.issuperset(pairs):
        return
    for before, sizes in pairs:
        if before:
            state = caches.resize(state, sizes)
        if (before, sizes) not in done:
            done.add((before, sizes))
            state, out = programs.beat(chroma.flat, state)
            jax.block_until_ready(out)


def warm_up(
    chroma: Chroma,
    voice: Voice | Sequence[Voice],
    *,
    question_seconds: float,
    max_seconds: float | None,
    sampling: Sampling | None,
    system_prompt: str | None,
    listening: bool,
) -> float:
    """`Chroma.warmup`."""
    start = time.perf_counter()
    done: set[tuple] = set()
    for request in beginnings(
        chroma,
        voice,
        lambda request: tuple(request.room(chroma.config, grow=chroma.grow).path()),
        question_seconds=question_seconds,
        max_seconds=max_seconds,
        sampling=sampling,
        system_prompt=system_prompt,
        listening=listening,
    ):
        compile_request(chroma, request, done)
    return time.perf_counter() - start


def beginnings(
    chroma: Chroma,
    voice: Voice | Sequence[Voice],
    sizes: Callable[[Request], Hashable | None],
    *,
    question_seconds: float,
    max_seconds: float | None,
    sampling: Sampling | None = None,
    system_prompt: str | None = None,
    listening: bool = True,
) -> Iterator[Request]:
    """One request for each program that begins a reply to a spoken question; what hears voices and questions is run on the way.

    Args:
      chroma: the model and its tokenizer.
      voice: one voice, or several.
      sizes: of the caches of the reply to a request; None leaves the request out. It is asked about questions of all lengths.
      question_seconds: longest question.
      max_seconds: as for `Chroma.reply`, as are sampling and system_prompt.
      sampling: of the replies.
      system_prompt: of the questions.
      listening: whether questions are also heard while they are spoken.

    Raises:
      ValueError: question_seconds is not positive, or as `Chroma.reply` for voice and max_seconds.
    """
    if not question_seconds > 0:
        raise ValueError(f"question_seconds must be positive, got {question_seconds}")
    voices = list(voice) if isinstance(voice, list | tuple) else [voice]
    if not voices:
        raise ValueError("voice must be a Voice or several, got none")
    # What can be wrong is found before anything is compiled.
    positions = [check_voice(chroma.processor, v)[1] for v in voices]
    most = [programs.max_frames_of(chroma.config, max_seconds, p) for p in positions]
    heard: dict[int, Prefilled] = {}
    for v, max_frames in zip(voices, most, strict=True):
        if v._codes:  # those are kept; another voice may come without its own
            programs.encode_voice(chroma.model, v.wave)
        rest = *chroma.prefill_voice(v), max_frames, sampling or Sampling(), 0
        for length, chunks in _question_shapes(chroma, question_seconds, system_prompt):
            request = Request(_blank(chroma, length, chunks), *rest)
            if sizes(request):
                yield request
        if listening:
            heard = heard or _compile_listening(chroma, v, question_seconds, system_prompt)
            questions = _heard_lengths(chroma, heard, question_seconds, system_prompt)
            yield from _differing((Request(question, *rest) for question in questions), sizes)


def _differing(
    requests: Iterable[Request], sizes: Callable[[Request], Hashable | None]
) -> Iterator[Request]:
    """Of requests with heard questions those that run different programs, with caches that they may give away."""
    seen = set()
    for request in requests:
        question, wanted = request.question, sizes(request)
        if wanted and (question.cache.size, wanted) not in seen:
            seen.add((question.cache.size, wanted))
            cache = jax.tree.map(jnp.copy, question.cache)
            yield request._replace(question=question._replace(cache=cache))


def _heard_lengths(
    chroma: Chroma, heard: Mapping[int, Prefilled], seconds: float, system_prompt: str | None
) -> Iterator[Prefilled]:
    """Prefilled questions of all lengths up to this one; `heard` has one for each size of the cache."""
    text, audio = _text(chroma, system_prompt), chroma.config.reasoner.audio
    for frames in _lengths(chroma, seconds, text):
        length = text + audio.num_features(frames)
        size = min((size for size in heard if size >= length), default=max(heard))
        yield heard[size]._replace(length=length)


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
) -> dict[int, Prefilled]:
    """Listens to silence: one chunk, many at once, the end of a question; longer and longer. One question for each size of the cache."""
    mel, audio = chroma.processor.mel, chroma.config.reasoner.audio
    chunk = audio.chunk_frames * mel.hop_length
    many = np.zeros(CHUNKS_PER_CALL * chunk, np.float32)
    longest = _lengths(chroma, seconds, _text(chroma, system_prompt))[-1] * mel.hop_length
    rounds, most = 1, max(1, longest // len(many))
    heard: dict[int, Prefilled] = {}
    while True:
        with chroma.listen(voice=voice, system_prompt=system_prompt) as listening:
            for _ in range(rounds):
                listening.push(many)
            listening.push(many[: chunk + chunk // 2])
            question = listening.request().question
        heard[question.cache.size] = question
        if rounds == most:
            return heard
        rounds = min(2 * rounds, most)
