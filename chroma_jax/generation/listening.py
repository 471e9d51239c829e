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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from chroma_jax.audio.batch import bucket, bucket_sizes
from chroma_jax.audio.chat import Turn
from chroma_jax.audio.mel import MelStream, mel_chunks
from chroma_jax.audio.prompt import check_question_length
from chroma_jax.audio.wav import AudioError, AudioStream
from chroma_jax.engine import caches, programs
from chroma_jax.engine.request import Prefilled, Request, check_seed, check_voice, resized
from chroma_jax.engine.sampling import Sampling
from chroma_jax.engine.voice import Voice
from chroma_jax.generation.reply import Reply, ReplyStream
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.kv_cache import KVCache

if TYPE_CHECKING:
    from chroma_jax.generation.session import Chroma

_NAME = "spoken question"
CHUNKS_PER_CALL = 8  # of those heard anew
_FIRST_IDS = 16  # smallest padded size of the text around the sound
_FIRST_SIZE = (
    1024  # of the cache while listening, 40 s; a reply begins with a copy of the part that it needs
)
_PATIENCE = 0.5  # seconds of sound between two times of hearing anew


@jax.jit
def listening_cache(model: ChromaModel) -> KVCache:
    """The Reasoner's cache before a question."""
    return model.reasoner.llama.init_state(
        1, min(_FIRST_SIZE, model.cfg.reasoner.text.max_positions)
    )


class Listening:
    """A question that is being spoken; see `Chroma.listen`. It is answered once. For one thread at a time."""

    def __init__(
        self,
        chroma: Chroma,
        voice: Voice,
        history: Sequence[Turn | Mapping] = (),
        text: str | None = None,
        system_prompt: str | None = None,
    ):
        self._chroma = chroma
        processor, config = chroma.processor, chroma.config
        arrays, _ = check_voice(processor, voice)
        before, self._after = processor.open_question(history, text, system_prompt)
        self._sound = AudioStream(processor.mel.sampling_rate, name=_NAME)
        self._mel = MelStream(processor.mel, name=_NAME)
        self._voice, self._voice_state = voice, chroma.prefill_voice(voice, arrays)
        self._floors: list[float] = []  # with which each chunk was heard
        self._heard_anew_at = 0  # mel frames
        self._open = True
        self._length = 0  # positions that count in the cache
        self._cache = listening_cache(chroma.model)
        chunks = (
            mel_chunks(before.mels, config.reasoner.audio.chunk_frames) if before.mels else None
        )
        self._hear(before.ids, chunks)
        self._begins = self._length

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening; what has been heard is forgotten. A reply that has begun goes on."""
        self._open, self._cache = False, None

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
        self._take_in(self._sound.push(samples, rate))
        self._listen()

    def request(
        self,
        *,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Request:
        """Ends the question. What it gives can be answered once, by `Chroma.answer` or `StreamBatch.admit_request`.

        Arguments and errors as for `Chroma.reply`; ValueError, too, when nothing was pushed, or too little to be heard.
        """
        self._check_open()
        seed = check_seed(seed)
        config, processor = self._chroma.config, self._chroma.processor
        max_frames = programs.max_frames_of(config, max_seconds, self._voice_state[1])
        self._open = False
        self._take_in(self._sound.finish())
        mel, audio = self._mel, config.reasoner.audio
        if not mel.num_samples:
            raise AudioError(f"{_NAME}: has no samples")
        num_frames = -(-mel.num_samples // mel.config.hop_length)
        processor.check_heard(num_frames, mel.num_samples, _NAME)
        mel.finish()
        self._listen(last=True)
        heard = len(self._floors) * audio.chunk_frames
        rest = mel_chunks([mel.features(heard, num_frames)], audio.chunk_frames)
        count = audio.num_features(num_frames) - len(self._floors) * audio.chunk_features
        placeholders = np.full(count, config.reasoner.audio_token_id, np.int32)
        hidden = self._hear(np.concatenate([placeholders, self._after]), rest)
        cache, self._cache = self._cache, None
        question = Prefilled(hidden, cache, self._length)
        return Request(question, *self._voice_state, max_frames, sampling or Sampling(), seed)

    def reply(self, **request) -> Reply:
        """Ends the question and gives the whole answer; arguments and errors as for `request`."""
        return self._chroma.answer(self.request(**request))

    def stream(self, **request) -> ReplyStream:
        """Ends the question and gives the answer as it is made; arguments and errors as for `request`."""
        return ReplyStream(self._chroma, self.request(**request))

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError(f"the {_NAME} has been answered or closed: listen anew")

    def _take_in(self, samples: np.ndarray) -> None:
        config, mel = self._chroma.config, self._mel
        frames = -(-(mel.num_samples + len(samples)) // mel.config.hop_length)
        sound = max(0, config.reasoner.audio.num_features(frames))
        check_question_length(config, self._begins + sound + len(self._after), name=_NAME)
        mel.push(samples)

    def _listen(self, last: bool = False) -> None:
        """Hears all chunks that are complete, and before them those that a louder moment has changed."""
        mel, audio = self._mel, self._chroma.config.reasoner.audio
        size = audio.chunk_frames
        # At the end a whole chunk may be the last part: one call with what follows it.
        complete = (mel.num_frames - last) // size
        patience = _PATIENCE * mel.config.sampling_rate / mel.config.hop_length
        if last or complete > len(self._floors) or mel.num_frames >= self._heard_anew_at + patience:
            changed = (
                i
                for i, floor in enumerate(self._floors)
                if floor < mel.floor and mel.lowest(i * size, (i + 1) * size) < mel.floor
            )
            first = next(changed, None)
            if first is not None:
                self._heard_anew_at = mel.num_frames
                del self._floors[first:]
                self._length = self._begins + first * audio.chunk_features
        while len(self._floors) < complete:
            first = len(self._floors)
            # Eight at a time or one: two compilations.
            count = min(complete - first, CHUNKS_PER_CALL)
            count = 1 if count < CHUNKS_PER_CALL // 2 else count
            sound = mel.features(first * size, (first + count) * size)
            ids = np.full(
                count * audio.chunk_features, self._chroma.config.reasoner.audio_token_id, np.int32
            )
            self._hear(ids, mel_chunks([sound], size), whole=True)
            self._floors += [mel.floor] * count

    def _hear(
        self, ids: np.ndarray, sound: tuple[np.ndarray, np.ndarray] | None, whole: bool = False
    ) -> jax.Array:
        """The next tokens [T] of the prompt and their chunks; `whole` where they are chunks alone. The Reasoner's state [1, D]."""
        reasoner = self._chroma.config.reasoner
        audio, limit = reasoner.audio, reasoner.text.max_positions
        chunks = lengths = None
        padded = 0
        if sound is not None:
            found, counts = sound
            size = 1
            if len(counts) > 1:
                size = bucket(len(counts), bucket_sizes(CHUNKS_PER_CALL, limit))
            chunks = np.zeros((1, size, audio.chunk_frames, audio.num_mel_bins), np.float32)
            lengths = np.zeros((1, size), np.int32)
            chunks[0, : len(counts)], lengths[0, : len(counts)] = found, counts
            padded = size * audio.chunk_features
        if not whole:
            text = len(ids) - int((ids == reasoner.audio_token_id).sum())
            padded += bucket(text, bucket_sizes(_FIRST_IDS, limit))
        row = np.full((1, padded), reasoner.pad_token_id, np.int32)
        row[0, : len(ids)] = ids
        self._make_room(len(ids))
        cache = self._cache._replace(length=jnp.full((1,), self._length, jnp.int32))
        hidden, self._cache = programs.extend(
            self._chroma.flat, cache, row, np.array([len(ids)], np.int32), chunks, lengths
        )
        self._length += len(ids)
        return hidden

    def _make_room(self, count: int) -> None:
        limit = self._chroma.config.reasoner.text.max_positions
        size = bucket(min(self._length + count, limit), caches.ladder(limit, _FIRST_SIZE))
        if size > self._cache.size:
            self._cache = resized(self._cache, size)
