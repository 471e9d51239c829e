"""A question that the Reasoner takes in piece by piece: while it is spoken, between the beats of others, after a kept turn.

Pieces end where an encoder chunk ends, so that the Reasoner's state after the last one is that of the
whole question at once. Several questions that have reached pieces of one shape take them together.

Axes: B batch (one a question), T tokens, C chunks, M mel frames, L layers, S cache length.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from chroma_jax.audio.batch import bucket, bucket_sizes
from chroma_jax.audio.mel import mel_chunks
from chroma_jax.audio.prompt import Question
from chroma_jax.config import ChromaConfig
from chroma_jax.engine import caches, programs
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.flat import FlatModule
from chroma_jax.model.kv_cache import KVCache

CHUNKS_PER_PIECE = 8  # 16 seconds of sound
_TEXT_PER_PIECE = 256  # tokens
_FIRST_IDS = 16  # smallest padded size of the text around a sound
# Smallest cache, 40 s of sound; a reply begins with a copy of the part that it needs.
_FIRST_SIZE = 1024
_SAME_SOUND = 1e-4  # of two log-mel features; rounding, where one was computed as a stream


class Kept(NamedTuple):
    """What the Reasoner has of a turn: its question and what it said. The next turn need not take that in again."""

    cache: KVCache  # [L, 1, S, C]; may hold more than counts
    ids: np.ndarray  # [N] int32, the tokens that count
    mels: Sequence[np.ndarray]  # [M, F] each, the sounds behind the placeholders among them
    spoken: int  # of those tokens, how many the model said

    def truncated(self, beats: int) -> Kept:
        """The turn as if the model had been stopped after so many beats with text."""
        count = len(self.ids) - max(0, self.spoken - max(0, beats))
        return self._replace(ids=self.ids[:count], spoken=count - (len(self.ids) - self.spoken))

    def reusable(self, config: ChromaConfig, question: Question) -> int:
        """Positions from the start that are those of `question`, too; at least one of it remains."""
        most = min(len(self.ids), len(question.ids) - 1)
        differ = np.flatnonzero(self.ids[:most] != question.ids[:most])
        count = int(differ[0]) if len(differ) else most
        # Equal placeholders may stand for other sounds.
        audio = config.reasoner
        places = np.flatnonzero(question.ids == audio.audio_token_id)
        before = 0
        for i, mel in enumerate(question.mels):
            first, before = before, before + audio.audio.num_features(len(mel))
            mine = self.mels[i] if i < len(self.mels) else None
            same = mine is not None and mine.shape == mel.shape
            if not same or not np.allclose(mine, mel, rtol=0, atol=_SAME_SOUND):
                return min(count, int(places[first]))
            if places[first] < count <= places[before - 1]:
                return int(places[first])
        return count


class Piece(NamedTuple):
    """Tokens of a question and the chunks that their placeholders stand for, padded."""

    at: int  # positions before it
    count: int  # tokens
    ids: np.ndarray  # [1, T]
    chunks: np.ndarray | None  # [1, C, chunk_frames, F]
    chunk_lengths: np.ndarray | None  # [1, C]


class Prefill:
    """A question on its way into the Reasoner.

    Args:
      config: of the model.
      kept: a turn that the question begins with, of which the first `length` positions are used.
      length: see there.
    """

    def __init__(self, config: ChromaConfig, kept: Kept | None = None, length: int = 0):
        self._config = config
        self._pieces: collections.deque[Piece] = collections.deque()
        self._cache = kept.cache if length else None
        self._shared = self._cache is not None  # the cache is somebody else's, too
        self.length = length  # positions, those of waiting pieces included
        self.hidden: jax.Array | None = None  # [1, D] after the last piece that was taken in
        self.error: Exception | None = None  # why it cannot go on

    @property
    def waits(self) -> bool:
        """Whether pieces wait to be taken in."""
        return bool(self._pieces)

    def add(
        self,
        ids: np.ndarray,
        sound: tuple[np.ndarray, np.ndarray] | None = None,
        *,
        whole: bool = False,
    ) -> None:
        """The next tokens [T] and their chunks (`mel_chunks`); `whole` where they are chunks alone."""
        reasoner = self._config.reasoner
        audio, limit = reasoner.audio, reasoner.text.max_positions
        chunks = lengths = None
        padded = 0
        if sound is not None:
            found, counts = sound
            size = 1
            if len(counts) > 1:
                size = bucket(len(counts), bucket_sizes(CHUNKS_PER_PIECE, limit))
            chunks = np.zeros((1, size, audio.chunk_frames, audio.num_mel_bins), np.float32)
            lengths = np.zeros((1, size), np.int32)
            chunks[0, : len(counts)], lengths[0, : len(counts)] = found, counts
            padded = size * audio.chunk_features
        if not whole:
            text = len(ids) - int((ids == reasoner.audio_token_id).sum())
            padded += bucket(text, bucket_sizes(_FIRST_IDS, limit))
        row = np.full((1, padded), reasoner.pad_token_id, np.int32)
        row[0, : len(ids)] = ids
        self._pieces.append(Piece(self.length, len(ids), row, chunks, lengths))
        self.length += len(ids)

    def add_question(self, question: Question, start: int = 0) -> None:
        """A whole question, or what is left of it from position `start` on, in pieces."""
        for ids, sound in _cut(self._config, question, start):
            self.add(ids, sound)

    def rewind(self, length: int) -> None:
        """Forgets what was added beyond so many positions: the end of a piece."""
        while self._pieces and self._pieces[-1].at >= length:
            self._pieces.pop()
        self.length = length

    def shape(self) -> tuple:
        """Of the program that takes in the next piece: questions of one shape may be taken in together."""
        piece = self._pieces[0]
        chunks = None if piece.chunks is None else piece.chunks.shape
        return piece.ids.shape, chunks, self._size(piece)

    def next(self) -> Piece:
        """Takes out the piece that comes next: it must go to `take_in`."""
        return self._pieces.popleft()

    def given_away(self, size: int) -> KVCache:
        """The cache, with room for `size` positions, once all is taken in; this object has none from then on."""
        cache, self._cache = self._cache, None
        # What is given away will be donated: what is shared must not be.
        return programs.resized(cache, size) if self._shared or cache.size != size else cache

    @property
    def cache_size(self) -> int:
        """Positions of the cache; 0 before the first piece."""
        return 0 if self._cache is None else self._cache.size

    def _size(self, piece: Piece) -> int:
        limit = self._config.reasoner.text.max_positions
        wanted = bucket(min(piece.at + piece.count, limit), caches.ladder(limit, _FIRST_SIZE))
        return max(wanted, self.cache_size)

    def _room(self, model: ChromaModel | FlatModule, piece: Piece) -> KVCache:
        """The cache with room for the piece, to be given away."""
        size, cache = self._size(piece), self._cache
        if cache is None:
            return programs.empty_reasoner_cache(model, size)
        if self._shared or cache.size != size:
            cache = programs.resized(cache, size)
        return cache

    def __copy__(self) -> Prefill:
        """Another question that goes on from here; neither disturbs the other."""
        copy = Prefill(self._config)
        copy.__dict__.update(self.__dict__, _pieces=self._pieces.copy(), _shared=True)
        self._shared = True
        return copy


def take_in(
    model: ChromaModel | FlatModule, prefills: Sequence[Prefill], pieces: Sequence[Piece]
) -> None:
    """The next piece of each question (`Prefill.next`), which had one `shape`, in one program."""
    rooms = tuple(prefill._room(model, piece) for prefill, piece in zip(prefills, pieces, strict=True))  # fmt: skip

    def stacked(name: str) -> np.ndarray | None:
        parts = [getattr(piece, name) for piece in pieces]
        return None if parts[0] is None else np.concatenate(parts)

    for prefill in prefills:  # the caches are on their way: whatever happens now, they are gone
        prefill._cache, prefill._shared = None, False
    hidden, kept = programs.extend(
        model,
        rooms,
        np.array([piece.at for piece in pieces], np.int32),
        stacked("ids"),
        np.array([piece.count for piece in pieces], np.int32),
        stacked("chunks"),
        stacked("chunk_lengths"),
    )
    for prefill, cache, state in zip(prefills, kept, hidden, strict=True):
        prefill._cache, prefill.hidden = cache, state


def take_in_all(model: ChromaModel | FlatModule, prefill: Prefill) -> None:
    """Everything that waits of one question."""
    while prefill.waits:
        take_in(model, [prefill], [prefill.next()])


def _cut(
    config: ChromaConfig, question: Question, start: int
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]]:
    """The tokens from `start` on, the begin of a sound or between sounds, in pieces with their chunks."""
    audio, ids = config.reasoner.audio, question.ids
    is_sound = ids == config.reasoner.audio_token_id
    passed = int(is_sound[:start].sum())
    sounds = []
    for mel in question.mels:
        passed -= audio.num_features(len(mel))
        if passed < 0:
            sounds.append(mel)
    sounds = iter(sounds)
    first = at = start
    text = 0
    chunks: list[np.ndarray] = []
    lengths: list[int] = []

    def piece():
        sound = (np.stack(chunks), np.array(lengths, np.int32)) if chunks else None
        return ids[first:at], sound

    while at < len(ids):
        if not is_sound[at]:
            if text == _TEXT_PER_PIECE:
                yield piece()
                first, text, chunks, lengths = at, 0, [], []
            at, text = at + 1, text + 1
            continue
        mel = next(sounds)
        left = audio.num_features(len(mel))
        for chunk, length in zip(*mel_chunks([mel], audio.chunk_frames), strict=True):
            if len(chunks) == CHUNKS_PER_PIECE:
                yield piece()
                first, text, chunks, lengths = at, 0, [], []
            count = min(left, audio.chunk_features)
            chunks.append(chunk)
            lengths.append(int(length))
            at, left = at + count, left - count
    yield piece()
