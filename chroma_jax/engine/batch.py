"""The running batch: every reply is a row of one. Rows join, rest, fail and leave, and none disturbs another.

    batch = RunningBatch(engine, slots=16)
    stream = batch.admit("question.wav", voice=voice, sampling=Sampling(temperature=0.7), seed=1)
    while batch.busy:
        for stream in batch.step():              # one beat, 160 ms of sound, of every stream in a slot
            for chunk in stream.take(): ...      # what it has made and nobody has taken yet
    batch.cancel(stream)

It owns no thread and no clock; `worker.Worker` gives it a thread. Its methods may be called from any
thread: one steps, the others admit, take, write and cancel without waiting for the device.
Every stream gives what it gives alone: exactly its frames in float32 on one kind of device. In bfloat16
batches of different sizes round differently, and replies may part after a while; but a row never depends
on who else is in the batch.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from chroma_jax import schedule
from chroma_jax.audio.chat import Conversation
from chroma_jax.engine import caches, prefill, programs, warmup
from chroma_jax.engine.caches import CacheLedger, CacheSizes
from chroma_jax.engine.engine import Engine
from chroma_jax.engine.prefill import Kept, Prefill
from chroma_jax.engine.request import Request, begin_together
from chroma_jax.engine.sampling import Sampling, is_plainly_greedy
from chroma_jax.engine.script import PLACES, Prompter, Script
from chroma_jax.engine.state import Beat, BeatState, Finish
from chroma_jax.engine.stream import Stream
from chroma_jax.engine.voice import Voice

BEATS_PER_CALL = 16  # of a reply that nobody waits for


class BatchFull(RuntimeError):  # noqa: N818
    """No free slot, and no room in the queue: try again later."""


class _Flight(NamedTuple):
    """Beats that are under way."""

    out: Beat
    single: bool  # one beat, whose fields have no leading axis
    streams: list[Stream | None]  # whose rows they compute; None also for those that rest


class RunningBatch:
    """A fixed number of slots that streams pass through.

    Args:
      engine: the model and its processor.
      slots: streams that run at the same time: rows of the batch.
      queue: streams that may wait for a slot.
      max_pending: chunks that a stream may be ahead of its listener; then its row rests until some are taken. None: any number.
      question_positions: longest question and answer text together, in tokens (25 a second of sound).
      positions: of the Backbone's cache: voice and answer; default all that the model has.
      grow: whether the caches start small and grow, up to these two sizes, with the longest stream that is in, and shrink again.
      sample_text: whether streams may sample text. Text is greedy in the reference, and sampling it costs a sort of the
        vocabulary per beat for the whole batch.
      together: questions that are taken in by one program, where as many of one shape wait.

    Raises:
      ValueError: a size that is not positive or beyond the model's.
    """

    def __init__(
        self,
        engine: Engine,
        slots: int,
        *,
        queue: int = 64,
        max_pending: int | None = 64,
        question_positions: int = 2048,
        positions: int | None = None,
        grow: bool = True,
        sample_text: bool = False,
        together: int = 4,
    ):
        most = caches.most(engine.config)
        sizes = {
            "slots": (slots, None),
            "max_pending": (1 if max_pending is None else max_pending, None),
            "question_positions": (question_positions, most.reasoner),
            "positions": (most.backbone if positions is None else positions, most.backbone),
            "together": (together, None),
        }
        for name, (value, limit) in sizes.items():
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole or value < 1 or (limit is not None and value > limit):
                raise ValueError(f"{name} must be from 1 to {limit or 'any number'}, got {value!r}")
        if not isinstance(queue, int | np.integer) or queue < 0:
            raise ValueError(f"queue must be at least 0, got {queue!r}")
        limits = CacheSizes(question_positions, positions or most.backbone)
        self._set_up(engine, slots, CacheLedger(limits, slots, grow=grow))
        self._max_pending, self._queue_size = max_pending, queue
        self._always = ("text", "code0", "codes") if sample_text else ("code0", "codes")
        self._forced, self._together = PLACES, together
        self.pausing = True

    @classmethod
    def begun(
        cls,
        engine: Engine,
        state: BeatState,
        ledger: CacheLedger,
        streams: Sequence[Stream],
        *,
        audio: bool = True,
        sink: Callable[[Beat], None] | None = None,
    ) -> RunningBatch:
        """A batch of rows that have begun already, and that nobody joins: a reply alone, or arrays.

        Args:
          engine: the model and its processor.
          state: of the rows, before their first beat.
          ledger: of its caches.
          streams: one for each row.
          audio: whether sound is made.
          sink: is given what every call of the device gave.
        """
        batch = cls.__new__(cls)
        batch._set_up(engine, len(streams), ledger)
        batch._state, batch._audio, batch._sink = state, audio, sink
        batch._forced = 0 if state.forced is None else PLACES
        for slot, stream in enumerate(streams):
            stream.batch, request = batch, stream.request
            script = request and request.script
            if script is not None:
                script.watch(batch.touch)
            batch._sit(stream, slot, script)
            stream.request = None
        return batch

    def _set_up(self, engine: Engine, slots: int, ledger: CacheLedger) -> None:
        self._engine, self._ledger = engine, ledger
        self._max_pending, self._queue_size, self._together = None, 0, 1
        self._always: tuple[str, ...] = ()
        self._forced = 0  # places for forced tokens in the state
        self.pausing = False  # whether rows may rest
        self._audio, self._sink = True, None
        # `_stepping` is held by whoever works with the device, `changed` for a moment by everybody.
        self._stepping = threading.RLock()
        self.changed = threading.Condition(threading.RLock())
        self.version = 0  # counts what may give the batch something to do
        self._slots: list[Stream | None] = [None] * slots
        self._leaving: list[tuple[int, Stream]] = []  # their turns are still to be kept
        self._to_end: set[int] = set()  # slots whose rows run without a stream
        self._queue: collections.deque[Stream] = collections.deque()
        self._hearing: collections.deque[Prefill] = collections.deque()
        self._prompter = Prompter(slots, engine.processor.tokenizer, engine.config.im_end_token_id)
        self._state: BeatState | None = None
        self._flight: _Flight | None = None
        self._news: list[Stream] = []  # ended outside of a beat

    @property
    def busy(self) -> bool:
        """Whether any stream is in a slot or waits for one, or a question is being taken in."""
        return bool(self._queue) or any(self._slots) or bool(self._hearing)

    @property
    def num_free(self) -> int:
        """Free slots, less the streams that wait for one: negative when there is a queue."""
        with self.changed:
            return self._slots.count(None) - len(self._leaving) - len(self._queue)

    @property
    def limits(self) -> CacheSizes:
        """The sizes beyond which the caches do not grow."""
        return self._ledger.limits

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
          listening: whether questions are also heard while they are spoken.

        Returns:
          Seconds that it took. With `chroma_jax.compilation_cache` the next process takes fewer.

        Raises:
          ValueError: streams are in (they would wait), no question fits the batch, or as `Chroma.warmup`.
        """
        if self.busy:
            running = sum(stream is not None for stream in self._slots)
            raise ValueError(
                f"a batch is warmed up before its streams: {running} run and {len(self._queue)} wait"
            )
        start = time.perf_counter()
        with self._stepping:
            # Of streams that have ended; there need not be room for two.
            self._state = self._flight = None
            beginnings = warmup.beginnings(
                self._engine,
                voice,
                lambda request: None if self._too_large(request) else self._first_sizes(request),
                question_seconds=question_seconds,
                max_seconds=max_seconds,
                system_prompt=system_prompt,
                listening=listening,
                together=self._together,
            )
            requests = list(beginnings)
            if not requests:
                raise ValueError(
                    f"no spoken question fits this batch: it has {self.limits.reasoner} positions for questions "
                    f"and {self.limits.backbone} for voices and answers"
                )
            warmup.run_batch(
                self._engine,
                requests,
                slots=len(self._slots),
                limits=self.limits,
                grow=self._ledger.grow,
                always=self._always,
                forced_size=self._forced,
                together=self._together,
            )
        return time.perf_counter() - start

    # Callable from any thread, without waiting for the device.

    def admit(
        self,
        question: Conversation | None = None,
        *,
        voice: Voice,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        system_prompt: str | None = None,
        say: str | Script | None = None,
        after: Kept | None = None,
        keep: bool = False,
        on_news: Callable[[Stream], None] | None = None,
    ) -> Stream:
        """Takes in a request; arguments as for `Engine.request`. It joins at the next step at which a slot is free.

        `on_news` is called, by the thread that steps, whenever the stream has made something or ended.

        Raises:
          ValueError: as `Chroma.reply`; or a request beyond this batch's sizes.
          BatchFull: neither a slot nor a place in the queue is free.
        """
        self._check_free()
        made = self._engine.request(
            question, voice, max_seconds, sampling, seed, system_prompt,
            say=say, after=after, keep=keep,
        )  # fmt: skip
        try:
            return self.admit_request(made, on_news=on_news)
        except BatchFull:
            if made.script is not None:
                made.script.release()  # the same words may be tried again
            raise

    def admit_request(
        self, request: Request, *, on_news: Callable[[Stream], None] | None = None
    ) -> Stream:
        """`admit` of what `Engine.request` or `Listening.request` made."""
        if "text" not in self._always and not is_plainly_greedy(request.sampling.text):
            raise ValueError("this batch does not sample text: make it with sample_text=True")
        if too_large := self._too_large(request):
            raise ValueError(too_large)
        question = request.question
        if not isinstance(question, Prefill) and len(question.chunk_lengths[0]) > prefill.CHUNKS_PER_PIECE:  # fmt: skip
            # A long one goes in piece by piece, so that the others do not wait for it.
            question = Prefill(self._engine.config)
            question.add_question(request.asked)
            request = request._replace(question=question)
        stream = Stream(self._engine, request, batch=self, on_news=on_news)
        stream.shape = self._shape(request)
        if request.script is not None:
            request.script.watch(self.touch)
        with self.changed:
            self._check_free()
            self._queue.append(stream)
            self.touch()
        if isinstance(question, Prefill):
            self.hear(question)
        return stream

    def hear(self, question: Prefill) -> None:
        """Takes in what waits of a question, a piece per step, beside the beats of the streams."""
        with self.changed:
            if _is_waiting(question) and question not in self._hearing:
                self._hearing.append(question)
                self.touch()

    def cancel(self, stream: Stream) -> None:
        """Ends a stream, wherever it is. What it has made can still be taken."""
        if stream.batch is not self:
            raise ValueError("the stream belongs to another batch")
        with self.changed:
            if not stream.done:
                self._end(stream, Finish.CANCELLED)
                self.touch()

    def cancel_all(self) -> None:
        """Ends every stream."""
        with self.changed:
            for stream in [*self._queue, *self._slots]:
                if stream is not None:
                    self.cancel(stream)

    def touch(self) -> None:
        """Says that something has changed from outside: a sleeping `Worker` looks again."""
        with self.changed:
            self.version += 1
            self.changed.notify_all()

    def rests(self, stream: Stream) -> bool:
        """Whether a stream in a slot takes no part in the next beat: its listener lags, or words are missing."""
        with self.changed:
            return stream in self._slots and self._rests(stream, self._slots.index(stream))

    def starved(self, stream: Stream) -> bool:
        """Whether a stream in a slot waits for words of its script."""
        with self.changed:
            return stream in self._slots and self._prompter.starved(self._slots.index(stream))

    # For one thread at a time.

    def step(self, beats: int | None = None) -> list[Stream]:
        """One beat of all running streams. Returns those that made something or ended.

        The next beat is under way on the device when this returns. Waiting streams take free slots first, and questions are taken
        in, one program of each per step, so that a crowd at the door does not make those inside stutter.

        Whatever fails ends only the streams whose rows it was about (`Stream.error`); the others, and the batch, go on.

        Args:
          beats: as many in one call of the device, as far as they are needed, and none ahead of it; for a batch that does not
            pause. None: one.
        """
        with self._stepping:
            if self._flight is None:
                self._dispatch(beats)
            flight, self._flight = self._flight, None
            if flight is not None:
                if beats is None:
                    self._dispatch(None)
                self._land(flight)
            with self.changed:
                news, self._news = self._news, []
        for stream in news:
            stream.tell()
        return news

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing until something changes from outside."""
        with self.changed:
            ready = any(not _is_waiting(stream.request.question) for stream in self._queue)
            seatable = ready and None in self._slots
            return not (self._flight or self._leaving or self._hearing or seatable)

    def prepare(self) -> None:
        """Puts the next beat under way, so that `step` need not wait as long."""
        with self._stepping:
            if self._flight is None:
                self._dispatch(None)

    def settle(self) -> None:
        """Sees to it that the turns of streams that have ended are kept, where they are to be."""
        with self._stepping:
            self._keep_turns()

    def fail(self, error: Exception) -> None:
        """Ends every stream with this error: for whoever steps and cannot go on."""
        with self._stepping, self.changed:
            for stream in list(self._queue):
                self._end(stream, Finish.FAILED, error)
            for question in self._hearing:
                question.error = error
            self._hearing.clear()
            self._fail_slots(error)

    # Between two beats, for whoever steps.

    def _dispatch(self, beats: int | None) -> None:
        """Seats who waits, and puts the next beat of those inside under way."""
        if self._leaving:
            self._keep_turns()
        if self._hearing:
            self._hear_some()
        if self._queue:
            self._seat_some()
        with self.changed:
            moving = self._moving(beats)
            resting = [s for s, m in enumerate(moving) if not m and self._slots[s] is not None]
            streams = [s if m else None for s, m in zip(self._slots, moving, strict=True)]
            to_end, self._to_end = self._to_end, set()
            if not any(self._slots) and not self._leaving:
                # Nobody is in: the next one begins with caches as small as it needs.
                self._state = None
                return
            count = beats or 1
            if count > 1:
                left = max((s.beats_left for s in streams if s), default=0)
                # Powers of two: few compilations, and the last call is not much longer than it must be.
                count = min(count, 1 << max(0, left - 1).bit_length())
            forced = None
            if self._forced:
                forced = self._prompter.forced()
                self._prompter.speak(moving, count)
            for stream in streams:
                if stream is not None:
                    stream.beats_left -= count
                    stream.in_flight += 1
        try:
            if to_end:
                self._state = programs.end_rows(self._state, self._mask(to_end))
            if forced is not None:
                self._state = programs.force(self._state, forced)
            if not any(moving):
                return
            state = self._ledger.make(self._state, count)
            for slot in resting:
                self._ledger.unused(slot, count)
            model = self._engine.flat
            if self.pausing:
                self._state, out = programs.pausing_beat(model, state, self._mask(resting))
            elif beats is None:
                self._state, out = programs.beat(model, state, audio=self._audio)
            else:
                self._state, out = programs.decode(model, state, count, audio=self._audio)
            self._flight = _Flight(out, beats is None, streams)
        except Exception as error:
            self._fail_slots(error)

    def _land(self, flight: _Flight) -> None:
        """Gives the streams what their rows made."""
        try:
            out = jax.device_get(flight.out)
        except Exception as error:  # an error of the device shows where its result is read
            self._fail_slots(error)
            return
        if self._sink:
            self._sink(out)
        with self.changed:
            for slot, stream in enumerate(flight.streams):
                if stream is None or stream.done:
                    continue
                stream.in_flight -= 1
                try:
                    self._deliver(stream, slot, out, flight.single)
                except Exception as error:
                    self._end(stream, Finish.FAILED, error)
            self.changed.notify_all()
        if self._leaving:
            self._keep_turns()

    def _deliver(self, stream: Stream, slot: int, out: Beat, single: bool) -> None:
        at = slot if single else (slice(None), slot)
        valid, frames = out.frame_valid[at], out.frames[at]
        tokens = out.token[at][out.token_valid[at]].reshape(-1)
        beats = 1 if single else len(valid)
        if len(tokens) < beats:
            self._ledger.without_text(slot, beats - len(tokens))
        count = int(valid.sum())
        frames = frames.reshape(-1, frames.shape[-1])[:count]  # valid ones are the first
        audio = np.zeros(0, np.float32)
        if out.samples is not None:
            samples = self._engine.config.codec.frame_samples * count
            audio = out.samples[at].reshape(-1)[:samples]
        finish = Finish(int(out.finish[at] if single else out.finish[-1, slot]))
        if stream.deliver(tokens, frames, audio, finish):
            self._news.append(stream)
        if finish != Finish.RUNNING:
            self._end(stream, finish)

    def _hear_some(self) -> None:
        """Takes in a piece of one question, or of several in pieces of one shape."""
        with self.changed:
            while self._hearing and not self._hearing[0].waits:  # forgotten by its listener
                self._hearing.popleft()
                self.changed.notify_all()
            waiting = [question for question in self._hearing if question.waits]
            if not waiting:
                return
            shape = waiting[0].shape()
            group = [question for question in waiting if question.shape() == shape]
            group = self._as_many_as_go_together(group)
            pieces = [question.next() for question in group]
        error = None
        try:
            prefill.take_in(self._engine.flat, group, pieces)
        except Exception as e:
            error = e
        with self.changed:
            for question in group:
                question.error = error
                if question in self._hearing:  # else it was cancelled meanwhile
                    self._hearing.remove(question)
                    if _is_waiting(question):  # the next piece after those of the others
                        self._hearing.append(question)
            for stream in list(self._queue):
                if error is not None and any(stream.request.question is q for q in group):
                    self._end(stream, Finish.FAILED, error)
            self.changed.notify_all()

    def _seat_some(self) -> None:
        """Prefills the first stream in the queue that is ready, or several whose questions have one shape, into free slots."""
        with self.changed:
            leaving = {slot for slot, _ in self._leaving}
            free = [i for i, s in enumerate(self._slots) if s is None and i not in leaving]
            ready = [s for s in self._queue if not _is_waiting(s.request.question)]
            if not free or not ready:
                return
            group = [ready[0]]
            if not isinstance(ready[0].request.question, Prefill):
                same = [s for s in ready if s.shape == ready[0].shape]
                group = self._as_many_as_go_together(same[: len(free)])
            for stream in group:
                self._queue.remove(stream)
            requests = [stream.request for stream in group]
            for stream in group:
                stream.request = None  # what it holds on the device goes into the row
            slots = free[: len(group)]
        model, sizes = self._engine.flat, self._first_sizes(requests[0])
        try:
            if len(group) == 1:
                rows = requests[0].begin(model, sizes, self._always, self._forced)
            else:
                rows = begin_together(model, requests, sizes, self._always, self._forced)
        except Exception as error:
            with self.changed:
                for stream in group:
                    self._end(stream, Finish.FAILED, error)
            return
        try:
            for slot, request in zip(slots, requests, strict=True):
                self._ledger.enter(slot, request.padded_length, request.voice_length)
            self._insert(rows, np.array(slots))
        except Exception as error:
            with self.changed:
                for stream in group:
                    self._end(stream, Finish.FAILED, error)
            for slot in slots:
                self._ledger.leave(slot)
            # Those inside go on, unless what failed had already been given their state.
            if any(x.is_deleted() for x in jax.tree.leaves(self._state)):
                self._fail_slots(error)
            return
        with self.changed:
            for slot, stream, request in zip(slots, group, requests, strict=True):
                if stream.done:  # cancelled meanwhile
                    self._ledger.leave(slot)
                    self._to_end.add(slot)
                else:
                    self._sit(stream, slot, request.script)

    def _insert(self, rows: BeatState, slots: np.ndarray) -> None:
        if self._state is None:
            one = rows if len(slots) == 1 else programs.extract_rows(rows, np.zeros(1, int))
            self._state = programs.empty_like(one, len(self._slots))
        present = caches.sizes_of(self._state)
        sizes = self._ledger.sizes(present=present)
        if sizes != present:
            self._state = caches.resize(self._state, sizes)
        self._state = programs.insert_rows(self._state, rows, slots)

    def _sit(self, stream: Stream, slot: int, script: Script | None) -> None:
        self._slots[slot], stream.seated = stream, True
        self._to_end.discard(slot)
        self._prompter.enter(slot, script)

    def _end(self, stream: Stream, finish: Finish, error: Exception | None = None) -> None:
        """Ends a stream wherever it is."""
        if stream.done:
            return
        stream.finish, stream.error = finish, error
        question = stream.request.question if stream.request else None
        stream.request = None
        if finish == Finish.FAILED:
            logging.warning("a reply failed: %s: %s", type(error).__name__, error)
            self._news.append(stream)
        if stream in self._queue:
            self._queue.remove(stream)
            if question in self._hearing:  # nobody will answer it
                self._hearing.remove(question)
        elif stream in self._slots:
            slot = self._slots.index(stream)
            self._slots[slot] = None
            self._ledger.leave(slot)
            self._prompter.enter(slot, None)
            if finish in (Finish.CANCELLED, Finish.FAILED):
                self._to_end.add(slot)
            if stream.keeps and finish != Finish.FAILED:
                self._leaving.append((slot, stream))

    def _fail_slots(self, error: Exception) -> None:
        """The state is lost: ends everybody inside. The next one begins with a new one."""
        with self.changed:
            for stream in list(self._slots):
                if stream is not None:
                    self._end(stream, Finish.FAILED, error)
            self._leaving.clear()
            self._to_end.clear()
            self._state = self._flight = None
            self.changed.notify_all()

    def _keep_turns(self) -> None:
        with self.changed:
            leaving, self._leaving = self._leaving, []
        for slot, stream in leaving:
            try:
                cache = programs.extract_reasoner(self._state, np.array([slot]))
                stream.keep(cache, int(cache.length[0]))
            except Exception:  # whoever goes on has it taken in again
                logging.exception("a turn could not be kept")

    def _moving(self, beats: int | None) -> list[bool]:
        """Which slots take part in the next beats [B]."""
        moving = []
        for slot, stream in enumerate(self._slots):
            moves = False
            if stream is not None:
                try:
                    moves = not self._rests(stream, slot, beats)
                except Exception as error:  # words that are no text for the tokenizer
                    self._end(stream, Finish.FAILED, error)
            moving.append(moves)
        return moving

    def _mask(self, slots: Iterable[int]) -> np.ndarray:
        mask = np.zeros(len(self._slots), bool)
        mask[list(slots)] = True
        return mask

    def _rests(self, stream: Stream, slot: int, beats: int | None = None) -> bool:
        if stream.beats_left <= 0:
            return True
        ahead = stream.num_pending + stream.in_flight
        if self._max_pending is not None and ahead >= self._max_pending:
            return True
        return self._prompter.starved(slot, beats or 1)

    def _as_many_as_go_together(self, group: list) -> list:
        """All sizes of groups are programs of their own: there are two."""
        return group[: self._together] if len(group) >= self._together else group[:1]

    def _check_free(self) -> None:
        if -self.num_free >= self._queue_size:
            running = sum(stream is not None for stream in self._slots)
            raise BatchFull(f"{running} streams run and {len(self._queue)} wait")

    def _too_large(self, request: Request) -> str | None:
        """Why the request does not fit the batch."""
        for what, needed, size in (
            ("question", request.question_length + 1, self.limits.reasoner),
            ("voice", request.voice_length + schedule.POSITIONS_PER_BEAT, self.limits.backbone),
        ):
            if needed > size:
                return f"the {what} takes {needed} positions, this batch has {size}"
        return None

    def _shape(self, request: Request) -> tuple | None:
        """Of the program that begins it: requests with one may begin together."""
        question = request.question
        if isinstance(question, Prefill):
            return None
        return question.ids.shape, question.chunks.shape, self._first_sizes(request)

    def _first_sizes(self, request: Request) -> CacheSizes:
        """A row is made as small as for a stream alone, whatever the batch has grown to: one prefill program for both."""
        return request.ledger(self._engine.config, limits=self.limits).sizes()


def _is_waiting(question: object) -> bool:
    return isinstance(question, Prefill) and question.waits and question.error is None
