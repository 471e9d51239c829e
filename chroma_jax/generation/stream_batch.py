"""Many live replies in one running batch: rows join and leave without recompiling, and none disturbs another.

    batch = StreamBatch(chroma, slots=16)
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

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax import schedule
from chroma_jax.audio.chat import Conversation
from chroma_jax.generation import beat as beats
from chroma_jax.generation import runtime
from chroma_jax.generation.beat import Beat, BeatState, Finish, Prompt
from chroma_jax.generation.sampling import Sampling, controls, is_plainly_greedy
from chroma_jax.generation.session import Chroma, Chunk, Reply, Voice, check_seed

_beat = jax.jit(beats.beat, donate_argnums=1)
_insert_row = jax.jit(beats.insert_row, donate_argnums=0)
_end_rows = jax.jit(beats.end_rows, donate_argnums=0)


class BatchFull(RuntimeError):  # noqa: N818
    """No free slot, and no room in the queue: try again later."""


@dataclasses.dataclass(eq=False)
class Stream:
    """One reply of a `StreamBatch`: first in the queue, then in a slot, then done."""

    prompt: Prompt
    max_frames: int
    sampling: Sampling
    seed: int
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
        return runtime.finish_name(self.finish)

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
        self._reasoner_size = question_positions
        self._backbone_size = positions or cfg.backbone.llama.max_positions
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
        sampling = sampling or Sampling()
        if "text" not in self._sampled and not is_plainly_greedy(sampling.text):
            raise ValueError("this batch does not sample text: make it with sample_text=True")
        if -self.num_free >= self._queue_size:
            running = len(self._slots) - self._slots.count(None)
            raise BatchFull(f"{running} streams run and {len(self._queue)} wait")
        prompt, max_frames = self._chroma.prepare(question, voice, max_seconds, system_prompt)
        voice_positions = prompt.voice_ids.shape[1] + prompt.voice_frames.shape[1] + 2
        for what, needed, size in (
            ("question", prompt.ids.shape[1] + 1, self._reasoner_size),
            ("voice", voice_positions + schedule.POSITIONS_PER_BEAT, self._backbone_size),
        ):
            if needed > size:
                raise ValueError(f"the {what} takes {needed} positions, this batch has {size}")
        stream = Stream(prompt, max_frames, sampling, check_seed(seed), _batch=self)
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
            self._slots[slot] = None
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
                self._slots[slot] = None
        return heard

    def _dispatch(self) -> None:
        self._seat_one()
        if not any(self._slots):
            self._flight = None
            return
        # A beat that is under way may still add a chunk.
        room = self._max_pending - 1
        hold = np.array([s is not None and s.num_pending >= room for s in self._slots])
        self._state, out = _beat(self._chroma.model, self._state, hold)
        self._flight = out, list(self._slots)

    def _seat_one(self) -> None:
        """Prefills the first stream in the queue into a free slot."""
        if not self._queue or None not in self._slots:
            return
        stream, slot = self._queue.popleft(), self._slots.index(None)
        row = runtime.prefill(
            self._chroma.model,
            stream.prompt,
            controls([stream.sampling], always=self._sampled),
            runtime.keys([stream.seed]),
            np.array([stream.max_frames], np.int32),
            reasoner_size=self._reasoner_size,
            backbone_size=self._backbone_size,
        )
        if self._state is None:
            self._state = _empty_like(row, len(self._slots))
        self._state = _insert_row(self._state, row, slot)
        self._slots[slot] = stream

    def _deliver(self, stream: Stream, slot: int, out: Beat) -> bool:
        valid = out.frame_valid[slot]
        tokens = out.token[slot : slot + 1][: int(out.token_valid[slot])]
        stream.finish = Finish(int(out.finish[slot]))
        text = stream._decoder.push(tokens) + (stream._decoder.finish() if stream.done else "")
        samples = out.samples[slot, : self._chroma.config.codec.frame_samples * int(valid.sum())]
        if len(samples) or len(tokens) or text:
            stream._pending.append(Chunk(text, samples, tokens, out.frames[slot][valid]))
        return stream.done or len(samples) > 0 or len(tokens) > 0


@functools.partial(jax.jit, static_argnums=1)
def _empty_like(row: BeatState, slots: int) -> BeatState:
    """A state of `slots` rows in which nothing runs."""
    wide = jax.tree.map(lambda x: jnp.repeat(x, slots, axis=beats.row_axis(x)), row)
    return wide._replace(finish=jnp.full((slots,), Finish.CANCELLED, jnp.int32))
