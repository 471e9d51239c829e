"""Compiling ahead: everything that a live reply runs, and a cache on disk that spares the next process the work."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from chroma_jax import schedule
from chroma_jax.audio.batch import bucket, question_shape
from chroma_jax.audio.mel import mel_chunks
from chroma_jax.audio.prompt import Question
from chroma_jax.engine import caches, prefill, programs
from chroma_jax.engine.caches import CacheLedger, CacheSizes
from chroma_jax.engine.engine import Engine
from chroma_jax.engine.prefill import CHUNKS_PER_PIECE, Prefill
from chroma_jax.engine.request import Request, begin_together, check_voice
from chroma_jax.engine.sampling import Sampling
from chroma_jax.engine.script import PLACES
from chroma_jax.engine.state import BeatState, Prompt
from chroma_jax.engine.voice import Voice


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


def compile_request(engine: Engine, request: Request, done: set[tuple] | None = None) -> None:
    """Runs each program of a live reply to the request once: its prefill, and a beat in every size of the caches.

    `done` holds what earlier calls have run, and is added to.
    """
    done = set() if done is None else done
    ledger = request.ledger(engine.config, grow=engine.grow)
    steps = list(ledger.path())
    forced = PLACES if request.script is not None else 0
    state = request.begin(engine.flat, steps[0], forced_size=forced)
    if forced:
        state = programs.force(state, jax.device_get(state.forced))
    pairs = list(zip([None, *steps], steps, strict=False))
    if done.issuperset(pairs):
        return
    for before, sizes in pairs:
        if before:
            state = caches.resize(state, sizes)
        if (before, sizes) not in done:
            done.add((before, sizes))
            state, out = programs.beat(engine.flat, state, audio=True)  # as a batch asks for it
            jax.block_until_ready(out)


def warm_up(
    engine: Engine,
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
        engine,
        voice,
        lambda request: tuple(request.ledger(engine.config, grow=engine.grow).path()),
        question_seconds=question_seconds,
        max_seconds=max_seconds,
        sampling=sampling,
        system_prompt=system_prompt,
        listening=listening,
    ):
        compile_request(engine, request, done)
    return time.perf_counter() - start


def beginnings(
    engine: Engine,
    voice: Voice | Sequence[Voice],
    sizes: Callable[[Request], Hashable | None],
    *,
    question_seconds: float,
    max_seconds: float | None,
    sampling: Sampling | None = None,
    system_prompt: str | None = None,
    listening: bool = True,
    together: int = 0,
) -> Iterator[Request]:
    """One request for each program that begins a reply to a spoken question; what hears voices and questions is run on the way.

    Args:
      engine: the model and its processor.
      voice: one voice, or several.
      sizes: of the caches of the reply to a request; None leaves the request out. It is asked about questions of all lengths.
      question_seconds: longest question.
      max_seconds: as for `Chroma.reply`, as are sampling and system_prompt.
      sampling: of the replies.
      system_prompt: of the questions.
      listening: whether questions are also heard while they are spoken.
      together: for a batch: questions that it takes in together; then long ones go in by pieces, too.

    Raises:
      ValueError: question_seconds is not positive, or as `Chroma.reply` for voice and max_seconds.
    """
    if not question_seconds > 0:
        raise ValueError(f"question_seconds must be positive, got {question_seconds}")
    voices = list(voice) if isinstance(voice, list | tuple) else [voice]
    if not voices:
        raise ValueError("voice must be a Voice or several, got none")
    # What can be wrong is found before anything is compiled.
    positions = [check_voice(engine.processor, v)[1] for v in voices]
    most = [programs.max_frames_of(engine.config, max_seconds, p) for p in positions]
    heard: dict[int, Prefill] = {}
    for v, max_frames in zip(voices, most, strict=True):
        if v._codes:  # those are kept; another voice may come without its own
            programs.encode_voice(engine.model, v.wave)
        rest = *engine.prefill_voice(v), max_frames, sampling or Sampling(), 0
        for length, chunks in _question_shapes(engine, question_seconds, system_prompt):
            request = Request(_blank(engine, length, chunks), *rest)
            if sizes(request):
                yield request
        if listening:
            heard = heard or _compile_listening(engine, question_seconds, system_prompt, together)
            questions = _heard_lengths(engine, heard, question_seconds, system_prompt)
            yield from _differing((Request(question, *rest) for question in questions), sizes)


def _differing(
    requests: Iterable[Request], sizes: Callable[[Request], Hashable | None]
) -> Iterator[Request]:
    """Of requests with questions that were taken in those that run different programs."""
    seen = set()
    for request in requests:
        question, wanted = request.question, sizes(request)
        if wanted and (question.cache_size, wanted) not in seen:
            seen.add((question.cache_size, wanted))
            yield request._replace(question=copy.copy(question))


def _heard_lengths(
    engine: Engine, heard: Mapping[int, Prefill], seconds: float, system_prompt: str | None
) -> Iterator[Prefill]:
    """Questions of all lengths up to this one; `heard` has one for each size of the cache."""
    text, audio = _text(engine, system_prompt), engine.config.reasoner.audio
    for frames in _lengths(engine, seconds, text):
        length = text + audio.num_features(frames)
        size = min((size for size in heard if size >= length), default=max(heard))
        question = copy.copy(heard[size])
        question.length = length
        yield question


def _question_shapes(
    engine: Engine, seconds: float, system_prompt: str | None
) -> list[tuple[int, int]]:
    """Padded tokens and chunks of spoken questions up to this long, in order."""
    text, reasoner = _text(engine, system_prompt), engine.config.reasoner
    shapes = []
    for frames in _lengths(engine, seconds, text):
        tokens, chunks = question_shape(
            engine.config,
            text + reasoner.audio.num_features(frames),
            -(-frames // reasoner.audio.chunk_frames),
        )
        shapes.append((tokens, chunks))
    return list(dict.fromkeys(shapes))


def _text(engine: Engine, system_prompt: str | None) -> int:
    """Tokens around a spoken question."""
    around = engine.processor.open_question((), None, system_prompt)
    return len(around.before.ids) + len(around.after)


def _lengths(engine: Engine, seconds: float, text: int) -> range:
    """Mel frames of questions up to this long: one for each feature more, as long as the context holds them."""
    mel, reasoner = engine.processor.mel, engine.config.reasoner
    frames = min(int(seconds * mel.sampling_rate), mel.max_samples) // mel.hop_length
    room = 4 * (reasoner.text.max_positions - 2 * text)
    return range(4, max(5, min(frames, room) + 1), 4)


def _blank(engine: Engine, length: int, chunks: int) -> Prompt:
    reasoner = engine.config.reasoner
    return Prompt(
        np.full((1, length), reasoner.pad_token_id, np.int32),
        np.array([length], np.int32),
        np.zeros((1, chunks, reasoner.audio.chunk_frames, reasoner.audio.num_mel_bins), np.float32),
        np.zeros((1, chunks), np.int32),
        *[None] * 4,
    )


def _compile_listening(
    engine: Engine, seconds: float, system_prompt: str | None, together: int
) -> dict[int, Prefill]:
    """Takes in silence as `Listening` does: one chunk, many at once, the end of a question; longer and longer.

    Returns one question for each size of the cache. `together` as for `beginnings`.
    """
    config = engine.config
    audio = config.reasoner.audio
    around = engine.processor.open_question((), None, system_prompt)
    longest = _lengths(engine, seconds, _text(engine, system_prompt))[-1]
    many = CHUNKS_PER_PIECE * audio.chunk_frames

    def sound(frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Silence, and its placeholders."""
        ids = np.full(audio.num_features(frames), config.reasoner.audio_token_id, np.int32)
        return np.zeros((frames, audio.num_mel_bins), np.float32), ids

    def spoken(rounds: int) -> Prefill:
        question = Prefill(config)
        question.add_question(around.before)
        for frames in [many] * rounds + [audio.chunk_frames]:
            mel, ids = sound(frames)
            question.add(ids, mel_chunks([mel], audio.chunk_frames), whole=True)
        mel, ids = sound(audio.chunk_frames // 2)
        question.add(np.concatenate([ids, around.after]), mel_chunks([mel], audio.chunk_frames))
        return question

    def recorded(rounds: int, chunks: int) -> Prefill:
        mel, ids = sound(rounds * many + chunks * audio.chunk_frames)
        ids = np.concatenate([around.before.ids, ids, around.after])
        question = Prefill(config)
        question.add_question(Question(ids, [mel]))
        return question

    rounds, most = 1, max(1, longest // many)
    heard: dict[int, Prefill] = {}
    while True:
        questions = [spoken(rounds)]
        if together and longest > many:
            whole = [recorded(rounds, 1), recorded(rounds, 2)]
            questions += [q for q in whole if q.length < caches.most(config).reasoner]
        for question in questions:
            _take_in(engine, question, together)
            heard[question.cache_size] = question
        if rounds == most:
            return heard
        rounds = min(2 * rounds, most)


def _take_in(engine: Engine, question: Prefill, together: int) -> None:
    while question.waits:
        if together > 1:
            twins = [copy.copy(question) for _ in range(together)]
            prefill.take_in(engine.flat, twins, [twin.next() for twin in twins])
        prefill.take_in(engine.flat, [question], [question.next()])


def run_batch(
    engine: Engine,
    requests: Sequence[Request],
    *,
    slots: int,
    limits: CacheSizes,
    grow: bool,
    always: Collection[str],
    forced_size: int,
    together: int,
) -> None:
    """Runs once all that happens to a batch, in each size that its caches may have, while such requests come and go."""
    rows: dict[tuple[CacheSizes, int], BeatState] = {}
    prompts, most = set(), 0
    for request in requests:
        sizes = request.ledger(engine.config, limits=limits).sizes()
        prompts.add((request.padded_length, request.voice_length))
        most = max(most, request.max_frames)
        groups = {1} if isinstance(request.question, Prefill) else {1, min(together, slots)}
        for count in sorted(groups - set(range(2, together))):
            if count == 1:
                row = request.begin(engine.flat, sizes, always, forced_size)
            else:
                given = [request] * count
                row = begin_together(engine.flat, given, sizes, always, forced_size)
            rows.setdefault((sizes, count), jax.block_until_ready(row))
    # The host knows of a row's end when the next beat runs already; a new row makes room for more than that.
    beats = -(-most // schedule.FRAMES_PER_TEXT) + 2 + caches.BEATS_AHEAD
    on_the_way = reachable(limits, prompts, beats) if grow else [limits]
    alone = {sizes: row for (sizes, count), row in rows.items() if count == 1}
    nobody = np.zeros(slots, bool)
    for sizes in dict.fromkeys([*alone, *on_the_way]):
        smaller = sizes if sizes in alone else next(s for s in alone if _holds(sizes, s))
        state = programs.empty_like(alone[smaller], slots)
        if sizes != smaller:  # the caches began with one that is
            state = caches.resize(state, sizes)
        if sizes in on_the_way:
            for (joining, count), row in rows.items():
                if _holds(sizes, joining):
                    state = programs.insert_rows(state, row, np.arange(count))
                    if count > 1:
                        programs.extract_rows(row, np.zeros(1, int))
            state, out = programs.pausing_beat(engine.flat, state, nobody)
            jax.block_until_ready(out)
            state = programs.end_rows(state, nobody)
            if state.forced is not None:
                state = programs.force(state, jax.device_get(state.forced))
        for other in on_the_way:
            if other != sizes:
                jax.block_until_ready(caches.resize(state, other))


def _holds(sizes: CacheSizes, others: CacheSizes) -> bool:
    return sizes.reasoner >= others.reasoner and sizes.backbone >= others.backbone


def reachable(
    limits: CacheSizes, prompts: Collection[tuple[int, int]], beats: int
) -> list[CacheSizes]:
    """All sizes that a batch's caches can have while rows come and go.

    Args:
      limits: of the batch.
      prompts: positions of question and voice of each row that may join.
      beats: most of a row.
    """
    longest = max(voice for _, voice in prompts) + schedule.POSITIONS_PER_BEAT * beats
    most = bucket(min(longest, limits.backbone), caches.ladder(limits.backbone))
    found: dict[int, set[int]] = {}
    for prompt in prompts:
        ledger = CacheLedger(limits, 1)
        ledger.enter(0, *prompt)
        for sizes in ledger.path():
            if sizes.backbone <= most:
                found.setdefault(sizes.backbone, set()).add(sizes.reasoner)
    # The Backbone's size and the row that wants most decide the Reasoner's.
    return [
        CacheSizes(reasoner, backbone)
        for backbone, among in sorted(found.items())
        for reasoner in caches.ladder(limits.reasoner)
        if min(among) <= reasoner <= max(among)
    ]
