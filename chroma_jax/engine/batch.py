"""Many live replies in one running batch: rows join and leave without recompiling, and none disturbs another.

    batch = StreamBatch(chroma, slots=16)
    batch.warmup(voice=voice)                    # once, before anybody waits
    stream = batch.admit("question.wav", voice=voice, sampling=Sampling(temperature=0.7), seed=1)
    while batch.busy:
        for stream in batch.step():              # one beat, 160 ms of sound, of every stream in a slot
            for chunk in stream.take(): ...      # what it has made and nobody has taken yet
    batch.cancel(stream)

This is the engine under a server: it owns no thread and no clock. Every stream gives exactly the frames that it gives alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax import schedule
from chroma_jax.audio.batch import bucket
from chroma_jax.audio.chat import Conversation
from chroma_jax.engine import beat as beats
from chroma_jax.engine import caches, programs
from chroma_jax.engine import state as states
from chroma_jax.engine.caches import CacheLedger, CacheSizes
from chroma_jax.engine.request import Request
from chroma_jax.engine.sampling import Sampling, is_plainly_greedy
from chroma_jax.engine.state import Beat, BeatState, Finish
from chroma_jax.generation.session import Chroma, Chunk, Reply, Voice
from chroma_jax.generation.warmup import beginnings

_beat = programs.jitted(beats.beat, donate_argnums=1)
_insert_row = jax.jit(states.insert_row, donate_argnums=0)
_end_rows = jax.jit(states.end_rows, donate_argnums=0)


class BatchFull(RuntimeError):  # noqa: N818
    """No free slot, and no room in the queue: try again later."""


@dataclasses.dataclass(eq=False)
class Stream:
    """One reply of a `StreamBatch`: first in the queue, then in a slot, then done."""

    request: Request
    finish: Finish = Finish.RUNNING
    _batch: StreamBatch | None = None
    _decoder: object = None
    _pending: collections.deque = dataclasses.field(default_factory=collections.deque)
    _taken: list[Chunk] = dataclasses.field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether nothing more will come (what is pending can still be taken)."""
        return self.finish != Finish.RUNNING

    @property
    def finish_reason(self) -> str:
        """ "running", "stop", "length", "context" or "cancelled"."""
        return programs.finish_name(self.finish)

    @property
    def num_pending(self) -> int:
        """Chunks made and not taken."""
        return len(self._pending)

    def take(self) -> list[Chunk]:
        """The chunks made since the last call."""
        chunks = list(self._pending)
        self._pending.clear()
        self._taken += chunks
        return chunks

    def reply(self) -> Reply:
        """All that has been taken, as one reply."""
        return self._batch._chroma.join(self._taken, self.finish_reason)


class StreamBatch:
    """A fixed number of slots that streams pass through.

    Args:
      chroma: the model and its tokenizer.
      slots: streams that run at the same time: rows of the batch.
      queue: streams that may wait for a slot.
      max_pending: chunks that a stream may be ahead of its listener; then its row rests until some are taken.
      question_positions: longest question and answer text together, in tokens (25 a second of sound).
      positions: of the Backbone's cache: voice and answer; default all that the model has.
      grow: whether the caches start small and grow, up to these two sizes, with the longest stream that is in.
      sample_text: whether streams may sample text. Text is greedy in the reference, and sampling it costs a sort of the
        vocabulary per beat for the whole batch.

    Raises:
      ValueError: a size that is not positive or beyond the model's.
    """

    def __init__(
        self,
        chroma: Chroma,
        slots: int,
        *,
        queue: int = 64,
        max_pending: int = 64,
        question_positions: int = 2048,
        positions: int | None = None,
        grow: bool = True,
        sample_text: bool = False,
    ):
        cfg = chroma.config
        limits = {
            "slots": (slots, None),
            "max_pending": (max_pending, None),
            "question_positions": (question_positions, cfg.reasoner.text.max_positions),
            "positions": (positions or cfg.backbone.llama.max_positions, cfg.backbone.llama.max_positions),
        }  # fmt: skip
        for name, (value, most) in limits.items():
            if value < 1 or (most is not None and value > most):
                raise ValueError(f"{name} must be from 1 to {most or 'any number'}, got {value}")
        if queue < 0:
            raise ValueError(f"queue must be at least 0, got {queue}")
        self._chroma = chroma
        self._max_pending, self._queue_size = max_pending, queue
        limits = CacheSizes(question_positions, positions or cfg.backbone.llama.max_positions)
        self._room, self._grow = CacheLedger(limits, slots, grow=grow), grow
        self._sampled = ("text", "code0", "codes") if sample_text else ("code0", "codes")
        self._slots: list[Stream | None] = [None] * slots
        self._queue: collections.deque[Stream] = collections.deque()
        self._state: BeatState | None = None
        # The beat under way, and whose rows it computes.
        self._flight: tuple[Beat, list[Stream | None]] | None = None

    @property
    def busy(self) -> bool:
        """Whether any stream is in a slot or waits for one."""
        return bool(self._queue) or any(self._slots)

    @property
    def num_free(self) -> int:
        """Free slots, less the streams that wait for one: negative when there is a queue."""
        return self._slots.count(None) - len(self._queue)

    def warmup(
        self,
        *,
        voice: Voice | Sequence[Voice],
        question_seconds: float = 10.0,
        max_seconds: float | None = 20.0,
        system_prompt: str | None = None,
        listening: bool = True,
    ) -> float:
        """Compiles ahead what this batch runs: afterwards no `admit`, `step` or `cancel` waits for the compiler.

        It runs on rows of its own and leaves nothing behind. Replies outside the batch need `Chroma.warmup`.

        Args:
          voice: a voice to answer in, or several; others of about their lengths run the same programs.
          question_seconds: longest spoken question; those beyond this batch's sizes are left out, as `admit` refuses them.
          max_seconds: longest answer; None for as long as the context allows.
          system_prompt: as for `admit`.
          listening: whether questions are also heard by `Chroma.listen`.

        Returns:
          Seconds that it took. With `chroma_jax.compilation_cache` the next process takes fewer.

        Raises:
          ValueError: streams are in (they would wait), no question fits the batch, or as `Chroma.warmup`.
        """
        if self.busy:
            running = len(self._slots) - self._slots.count(None)
            raise ValueError(
                f"a batch is warmed up before its streams: {running} run and {len(self._queue)} wait"
            )
        start = time.perf_counter()
        # Of streams that have ended; there need not be room for two.
        self._state = self._flight = None
        rows: dict[CacheSizes, BeatState] = {}
        prompts: set[tuple[int, int]] = set()
        most = 0

        def program(request: Request) -> CacheSizes | None:
            if self._too_large(request):
                return None
            prompts.add((request.question_length, request.voice_length))
            return self._first_sizes(request)

        for request in beginnings(
            self._chroma,
            voice,
            program,
            question_seconds=question_seconds,
            max_seconds=max_seconds,
            system_prompt=system_prompt,
            listening=listening,
        ):
            sizes = self._first_sizes(request)
            row = request.begin(self._chroma.flat, sizes, self._sampled)
            rows.setdefault(sizes, jax.block_until_ready(row))
            most = max(most, request.max_frames)
        if not rows:
            raise ValueError(
                f"no spoken question fits this batch: it has {self._room.limits.reasoner} positions for questions "
                f"and {self._room.limits.backbone} for voices and answers"
            )
        # The host knows of a row's end when the next beat runs already; a new row makes room for more than that.
        beats = -(-most // schedule.FRAMES_PER_TEXT) + 2 + caches.BEATS_AHEAD
        self._run_sizes(rows, prompts, beats)
        return time.perf_counter() - start

    def _run_sizes(
        self, rows: dict[CacheSizes, BeatState], prompts: set[tuple[int, int]], beats: int
    ) -> None:
        """Runs all that happens to the batch in each size that its caches may have; `rows` are those that may join."""
        slots = np.arange(len(self._slots))
        limits = self._room.limits
        on_the_way = _reachable(limits, prompts, beats) if self._grow else [limits]
        for sizes in dict.fromkeys([*rows, *on_the_way]):
            if sizes in rows:
                state = _empty_like(rows[sizes], len(slots))
            else:  # some row is smaller: the caches began with one
                smaller = next(s for s in rows if _holds(sizes, s))
                state = caches.resize(_empty_like(rows[smaller], len(slots)), sizes)
            if sizes in on_the_way:
                for joining, row in rows.items():
                    if _holds(sizes, joining):
                        state = _insert_row(state, row, 0)
                state, out = _beat(self._chroma.flat, state, slots < 0)
                jax.block_until_ready(out)
                state = _end_rows(state, slots == 0)
            for larger in on_the_way:
                if larger != sizes and _holds(larger, sizes):
                    jax.block_until_ready(caches.resize(state, larger))

    def admit(
        self,
        question: Conversation,
        *,
        voice: Voice,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> Stream:
        """Takes in a request; arguments as for `Chroma.stream`. It joins at the next step at which a slot is free.

        Raises:
          ValueError: as `Chroma.reply`; or a request beyond this batch's sizes.
          BatchFull: neither a slot nor a place in the queue is free.
        """
        self._check_admission(sampling or Sampling())
        request = self._chroma.request(question, voice, max_seconds, sampling, seed, system_prompt)
        return self.admit_request(request)

    def admit_request(self, request: Request) -> Stream:
        """`admit` of what `Chroma.request` or `Listening.request` made."""
        self._check_admission(request.sampling)
        if too_large := self._too_large(request):
            raise ValueError(too_large)
        stream = Stream(request, _batch=self)
        stream._decoder = self._chroma.processor.tokenizer.stream_decoder()
        self._queue.append(stream)
        return stream

    def cancel(self, stream: Stream) -> None:
        """Ends a stream, wherever it is. What it has made can still be taken."""
        if stream._batch is not self:
            raise ValueError("the stream belongs to another batch")
        if stream.done:
            return
        stream.finish = Finish.CANCELLED
        if stream in self._queue:
            self._queue.remove(stream)
        else:
            slot = self._slots.index(stream)
            self._free(slot)
            self._state = _end_rows(self._state, np.arange(len(self._slots)) == slot)

    def step(self) -> list[Stream]:
        """One beat of all running streams. Returns those that made something or ended.

        The next beat is under way on the device when this returns. Waiting streams take free slots first, one prefill per step, so
        that a crowd at the door does not make those inside stutter.
        """
        if self._flight is None:
            self._dispatch()
        flight = self._flight
        if flight is None:
            return []
        self._dispatch()
        out, owners = jax.device_get(flight[0]), flight[1]
        heard = []
        for slot, stream in enumerate(owners):
            if stream is None or stream.done:
                continue
            if self._deliver(stream, slot, out):
                heard.append(stream)
            if stream.done:
                self._free(slot)
        return heard

    def _check_admission(self, sampling: Sampling) -> None:
        if "text" not in self._sampled and not is_plainly_greedy(sampling.text):
            raise ValueError("this batch does not sample text: make it with sample_text=True")
        if -self.num_free >= self._queue_size:
            running = len(self._slots) - self._slots.count(None)
            raise BatchFull(f"{running} streams run and {len(self._queue)} wait")

    def _too_large(self, request: Request) -> str | None:
        """Why the request does not fit the batch."""
        limits = self._room.limits
        for what, needed, size in (
            ("question", request.question_length + 1, limits.reasoner),
            ("voice", request.voice_length + schedule.POSITIONS_PER_BEAT, limits.backbone),
        ):
            if needed > size:
                return f"the {what} takes {needed} positions, this batch has {size}"
        return None

    def _first_sizes(self, request: Request) -> CacheSizes:
        """A row is made as small as for a stream alone, whatever the batch has grown to: one prefill program for both."""
        alone = CacheLedger(self._room.limits, 1)
        alone.enter(0, request.question_length, request.voice_length)
        return alone.sizes()

    def _dispatch(self) -> None:
        self._seat_one()
        if not any(self._slots):
            self._flight = None
            return
        # A beat that is under way may still add a chunk.
        room = self._max_pending - 1
        hold = np.array([s is not None and s.num_pending >= room for s in self._slots])
        self._state, out = _beat(self._chroma.flat, self._room.make(self._state), hold)
        self._flight = out, list(self._slots)

    def _seat_one(self) -> None:
        """Prefills the first stream in the queue into a free slot."""
        if not self._queue or None not in self._slots:
            return
        stream, slot = self._queue.popleft(), self._slots.index(None)
        request = stream.request
        lengths = request.question_length, request.voice_length
        row = request.begin(self._chroma.flat, self._first_sizes(request), self._sampled)
        if self._state is None:
            self._state = _empty_like(row, len(self._slots))
        self._room.enter(slot, *lengths)
        present = CacheSizes(self._state.reasoner.size, self._state.backbone.size)
        sizes = self._room.sizes(present=present)
        if sizes != present:
            self._state = caches.resize(self._state, sizes)
        self._state = _insert_row(self._state, row, slot)
        self._slots[slot] = stream
        stream.request = None  # what it holds on the device is now in the row

    def _free(self, slot: int) -> None:
        self._slots[slot] = None
        self._room.leave(slot)

    def _deliver(self, stream: Stream, slot: int, out: Beat) -> bool:
        valid = out.frame_valid[slot]
        tokens = out.token[slot : slot + 1][: int(out.token_valid[slot])]
        if not (valid.any() or len(tokens) or stream.done):
            self._room.unused(slot)  # it was paused
        elif not len(tokens):
            self._room.without_text(slot)
        stream.finish = Finish(int(out.finish[slot]))
        text = stream._decoder.push(tokens) + (stream._decoder.finish() if stream.done else "")
        samples = out.samples[slot, : self._chroma.config.codec.frame_samples * int(valid.sum())]
        if len(samples) or len(tokens) or text:
            stream._pending.append(Chunk(text, samples, tokens, out.frames[slot][valid]))
        return stream.done or len(samples) > 0 or len(tokens) > 0


def _holds(sizes: CacheSizes, others: CacheSizes) -> bool:
    return sizes.reasoner >= others.reasoner and sizes.backbone >= others.backbone


def _reachable(
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
        room = CacheLedger(limits, 1)
        room.enter(0, *prompt)
        for sizes in room.path():
            if sizes.backbone <= most:
                found.setdefault(sizes.backbone, set()).add(sizes.reasoner)
    # The Backbone's size and the row that wants most decide the Reasoner's, which never shrinks.
    return [
        CacheSizes(reasoner, backbone)
        for backbone, among in sorted(found.items())
        for reasoner in caches.ladder(limits.reasoner)
        if min(among) <= reasoner <= max(among)
    ]


@functools.partial(jax.jit, static_argnums=1)
def _empty_like(row: BeatState, slots: int) -> BeatState:
    """A state of `slots` rows in which nothing runs."""
    wide = jax.tree.map(lambda x: jnp.repeat(x, slots, axis=states.row_axis(x)), row)
    return wide._replace(finish=jnp.full((slots,), Finish.CANCELLED, jnp.int32))
