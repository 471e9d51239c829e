"""A question heard while it is being spoken, so that the wait after its end does not grow with its length.

    with chroma.listen(voice=voice) as listening:
        for samples in microphone:                    # of any length, at any rate
            listening.push(samples, 48000)
        for chunk in listening.stream(): play(chunk.audio)

Every two seconds are one chunk of the Reasoner's audio encoder, which sees nothing outside it: as soon as it is complete, its features
enter the Reasoner's cache. When the question ends, a part of a chunk, the end of the chat format and the voice's first
beat remain. The reply is that of `Chroma.reply` to the whole recording.

The features of a chunk depend on the rest of the recording in one way: the loudest bin of all sets the floor (see `audio.mel`). A
chunk with bins below the floor (pauses, digital silence, nothing above 4 kHz in telephone sound: most have some) is therefore heard
anew when something louder follows, and all after it, too. That is done while the speaker goes on, at most twice a second; only
when the loudest moment lies in the last part of the question, the work falls at its end.

Axes: B batch (one), T positions, C chunks, M mel frames.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from chroma_jax.audio.chat import Turn
from chroma_jax.audio.mel import MelStream, mel_chunks
from chroma_jax.audio.prompt import Question, check_question_length
from chroma_jax.audio.wav import AudioError, AudioStream
from chroma_jax.engine import prefill, programs
from chroma_jax.engine.batch import RunningBatch
from chroma_jax.engine.engine import Engine
from chroma_jax.engine.prefill import CHUNKS_PER_PIECE, Kept, Prefill
from chroma_jax.engine.reply import Reply
from chroma_jax.engine.request import Request, check_choice, check_voice
from chroma_jax.engine.sampling import Sampling
from chroma_jax.engine.voice import Voice
from chroma_jax.generation.reply import ReplyStream, answer

_NAME = "spoken question"
_PATIENCE = 0.5  # seconds of sound between two times of hearing anew


class Listening:
    """A question that is being spoken; see `Chroma.listen`. It is answered once. For one thread at a time.

    Args:
      engine: the model and its processor.
      voice: as the next three, see `Chroma.listen`.
      history: the turns before.
      text: what follows the sound.
      system_prompt: replaces the default one.
      batch: that takes the question in, between its beats, whenever it steps, and that answers it; None: every push does, at once.
      after: a kept turn (`Stream.kept`); what the history has in common with it is not taken in again.
    """

    def __init__(
        self,
        engine: Engine,
        voice: Voice,
        history: Sequence[Turn | Mapping] = (),
        text: str | None = None,
        system_prompt: str | None = None,
        *,
        batch: RunningBatch | None = None,
        after: Kept | None = None,
    ):
        self._engine, self._batch = engine, batch
        processor, config = engine.processor, engine.config
        arrays, _ = check_voice(processor, voice)
        self._before, self._after = processor.open_question(history, text, system_prompt)
        self._sound = AudioStream(processor.mel.sampling_rate, name=_NAME)
        self._mel = MelStream(processor.mel, name=_NAME)
        self._pushed = 0  # samples, at the rate at which they came
        self._voice = engine.prefill_voice(voice, arrays)
        self._floors: list[float] = []  # with which each chunk was heard
        self._heard_anew_at = 0  # mel frames
        self._open = True
        start = after.reusable(config, self._before) if after is not None else 0
        self._prefill = Prefill(config, after, start)
        self._begins = len(self._before.ids)
        with self._taking_in():
            self._prefill.add_question(self._before, start)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening; what has been heard is forgotten. A reply that has begun goes on."""
        if self._open:
            self._open = False
            with self._batch.changed if self._batch else contextlib.nullcontext():
                self._prefill.rewind(0)

    @property
    def seconds(self) -> float:
        """Length of what has been pushed, as far as it has been taken in."""
        return self._mel.num_samples / self._mel.config.sampling_rate

    def push(self, samples: ArrayLike, rate: int | None = None) -> None:
        """The next samples of the question.

        Args:
          samples: [n], [n, C] or [C, n] floats or integers as for a question's (samples, rate); n may be 0.
          rate: Hz; default the rate that the model hears, 16000. It stays the same.

        Raises:
          ValueError: samples or rate are no sound, the question is longer than the context, or it has been answered or
            closed. Then the question is what was pushed before.
        """
        self._check_open()
        rate = self._mel.config.sampling_rate if rate is None else rate
        count, rate = self._sound.check(samples, rate)
        self._check_length(self._pushed + count, rate)
        self._pushed += count
        self._mel.push(self._sound.push(samples, rate))
        self._listen()

    def request(
        self,
        *,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        keep: bool = False,
    ) -> Request:
        """Ends the question. What it gives can be answered once, by `Chroma.answer` or `RunningBatch.admit_request`.

        Arguments and errors as for `Chroma.reply`; ValueError, too, when nothing was pushed, or too little to be heard.
        """
        self._check_open()
        sampling, seed = check_choice(sampling, seed)
        config, processor = self._engine.config, self._engine.processor
        max_frames = programs.max_frames_of(config, max_seconds, self._voice[1])
        self._open = False
        mel, audio = self._mel, config.reasoner.audio
        mel.push(self._sound.finish())
        if not mel.num_samples:
            raise AudioError(f"{_NAME}: has no samples")
        num_frames = -(-mel.num_samples // mel.config.hop_length)
        processor.check_heard(num_frames, mel.num_samples, _NAME)
        mel.finish()
        self._listen(last=True)
        heard = len(self._floors) * audio.chunk_frames
        rest = mel_chunks([mel.features(heard, num_frames)], audio.chunk_frames)
        count = audio.num_features(num_frames) - len(self._floors) * audio.chunk_features
        with self._taking_in():
            self._prefill.add(np.concatenate([self._placeholders(count), self._after]), rest)
        asked = None
        if keep:
            placeholders = self._placeholders(audio.num_features(num_frames))
            ids = np.concatenate([self._before.ids, placeholders, self._after])
            asked = Question(ids, [*self._before.mels, mel.features(0, num_frames)])
        return Request(
            self._prefill, *self._voice, max_frames, sampling, seed, asked=asked, keep=keep
        )

    def reply(self, **request) -> Reply:
        """Ends the question and gives the whole answer; arguments and errors as for `request`."""
        return answer(self._engine, self.request(**request))

    def stream(self, **request) -> ReplyStream:
        """Ends the question and gives the answer as it is made; arguments and errors as for `request`."""
        return ReplyStream(self._engine, self.request(**request))

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError(f"the {_NAME} has been answered or closed: listen anew")
        if self._prefill.error is not None:
            raise self._prefill.error

    def _check_length(self, pushed: int, rate: int) -> None:
        """Of all that has been pushed, whether the resampler still holds a part of it back or not."""
        config, mel = self._engine.config, self._mel.config
        num_samples = -(-pushed * mel.sampling_rate // rate)
        frames = -(-num_samples // mel.hop_length)
        sound = max(0, config.reasoner.audio.num_features(frames))
        check_question_length(config, self._begins + sound + len(self._after), name=_NAME)
        self._mel.check_length(num_samples)

    def _listen(self, last: bool = False) -> None:
        """Hears all chunks that are complete, and before them those that a louder moment has changed."""
        mel, audio = self._mel, self._engine.config.reasoner.audio
        size = audio.chunk_frames
        # At the end a whole chunk may be the last part: one call with what follows it.
        complete = (mel.num_frames - last) // size
        patience = _PATIENCE * mel.config.sampling_rate / mel.config.hop_length
        with self._taking_in():
            if last or complete > len(self._floors) or mel.num_frames >= self._heard_anew_at + patience:  # fmt: skip
                changed = (
                    i
                    for i, floor in enumerate(self._floors)
                    if floor < mel.floor and mel.lowest(i * size, (i + 1) * size) < mel.floor
                )
                first = next(changed, None)
                if first is not None:
                    self._heard_anew_at = mel.num_frames
                    del self._floors[first:]
                    self._prefill.rewind(self._begins + first * audio.chunk_features)
            while len(self._floors) < complete:
                first = len(self._floors)
                # Eight at a time or one: two compilations.
                count = min(complete - first, CHUNKS_PER_PIECE)
                count = 1 if count < CHUNKS_PER_PIECE // 2 else count
                sound = mel.features(first * size, (first + count) * size)
                ids = self._placeholders(count * audio.chunk_features)
                self._prefill.add(ids, mel_chunks([sound], size), whole=True)
                self._floors += [mel.floor] * count

    def _placeholders(self, count: int) -> np.ndarray:
        return np.full(count, self._engine.config.reasoner.audio_token_id, np.int32)

    @contextlib.contextmanager
    def _taking_in(self):
        """Around what adds to the question: then that goes to the device, at once or by the batch."""
        if self._batch is None:
            yield
            prefill.take_in_all(self._engine.flat, self._prefill)
        else:
            with self._batch.changed:
                yield
                self._batch.hear(self._prefill)
