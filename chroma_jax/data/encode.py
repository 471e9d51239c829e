"""The models' part of preparing data: waves -> codes, questions and answers -> Reasoner states, in batches of few shapes.

Rows are sorted into static lengths; rows that do not fill a batch of their length join the next longer one, so that only the last
batch is partial. Every row's result is what it would be alone. Batches are spread over the process's devices.

Axes: B rows, N samples or tokens, C chunks, L answer tokens, D width, Q codebooks, F frames.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from chroma_jax.audio.batch import bucket, bucket_sizes
from chroma_jax.audio.mel import mel_chunks
from chroma_jax.audio.prompt import Question
from chroma_jax.config import ChromaConfig
from chroma_jax.model.codec import Codec
from chroma_jax.model.reasoner import Reasoner

_FIRST_FRAMES, _FIRST_TOKENS = 32, 64


class Asked(NamedTuple):
    """A question and the answer that the Reasoner is made to give."""

    question: Question
    text: np.ndarray  # [L] int32, im_end included


class Encoder:
    """Runs Codec and Reasoner over lists of rows.

    Args:
      config: the model's configuration.
      codec: makes the codes.
      reasoner: makes the states; None when they are not wanted.
      batch_seconds: sound that one device encodes at a time (its memory grows with it).
      batch_tokens: positions that one device thinks at a time.
      devices: where to run; default all of this process.
    """

    def __init__(
        self,
        config: ChromaConfig,
        codec: Codec,
        reasoner: Reasoner | None = None,
        *,
        batch_seconds: float = 160.0,
        batch_tokens: int = 8192,
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = list(devices or jax.local_devices())
        mesh = jax.make_mesh(
            (len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,)
        )
        self._config = config
        self._num_devices = len(devices)
        self._batch_frames = int(batch_seconds * config.codec.frame_rate)
        self._batch_tokens = batch_tokens
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._codec = jax.device_put(codec, everywhere)
        self._reasoner = None if reasoner is None else jax.device_put(reasoner, everywhere)

    def codes(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Waves [N_i] float32 at the codec's rate -> codes [F_i, Q] int32, F_i = ceil(N_i / frame_samples)."""
        samples, books = self._config.codec.frame_samples, self._config.num_codebooks
        lengths = [-(-len(wave) // samples) for wave in waves]
        out: list[np.ndarray | None] = [None] * len(waves)
        for size, count, rows in self._batches(lengths, _FIRST_FRAMES, self._batch_frames):
            wave = np.zeros((count, size * samples), np.float32)
            valid = np.ones(count, np.int32)
            for i, row in enumerate(rows):
                wave[i, : len(waves[row])] = waves[row]
                valid[i] = len(waves[row])
            put = jax.device_put((wave, valid), self._rows)
            codes = np.asarray(_encode(self._codec, *put, books))
            for i, row in enumerate(rows):
                out[row] = codes[i, : lengths[row]]
        return out

    def hidden(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """Teacher-forced Reasoner states H_0..H_{L-1} [L, D] of each answer, in the Reasoner's dtype."""
        if self._reasoner is None:
            raise ValueError("this encoder has no Reasoner")
        audio = self._config.reasoner.audio
        cut = [mel_chunks(a.question.mels, audio.chunk_frames) for a in asked]
        lengths = [len(a.question.ids) + len(a.text) for a in asked]
        out: list[np.ndarray | None] = [None] * len(asked)
        for size, count, rows in self._batches(lengths, _FIRST_TOKENS, self._batch_tokens):
            num_chunks = _power_of_two(max(1, *(len(cut[row][1]) for row in rows)))
            answers = _power_of_two(max(len(asked[row].text) for row in rows))
            ids = np.full((count, size), self._config.reasoner.pad_token_id, np.int32)
            prompt = np.ones(count, np.int32)
            chunks = np.zeros(
                (count, num_chunks, audio.chunk_frames, audio.num_mel_bins), np.float32
            )
            chunk_lengths = np.zeros((count, num_chunks), np.int32)
            for i, row in enumerate(rows):
                question, text = asked[row]
                ids[i, : lengths[row]] = np.concatenate([question.ids, text])
                prompt[i] = len(question.ids)
                if len(cut[row][1]):
                    chunks[i, : len(cut[row][0])] = cut[row][0]
                    chunk_lengths[i, : len(cut[row][1])] = cut[row][1]
            put = jax.device_put((ids, prompt, chunks, chunk_lengths), self._rows)
            states = np.asarray(_think(self._reasoner, *put, answers))
            for i, row in enumerate(rows):
                out[row] = states[i, : len(asked[row].text)]
        return out

    def _batches(self, lengths: Sequence[int], first: int, budget: int):
        """(static length, number of rows, indices of rows) of each batch; the longest first, so that memory runs out early or never."""
        if not lengths:
            return
        sizes = bucket_sizes(first, max(first, 1 << (max(lengths) - 1).bit_length()))
        waiting: list[int] = []
        batches = []
        by_size: dict[int, list[int]] = {}
        for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
            by_size.setdefault(bucket(lengths[row], sizes), []).append(row)
        for size in sorted(by_size):
            waiting += by_size[size]
            per_device = max(1, budget // size)
            count = self._num_devices << (per_device.bit_length() - 1)
            while len(waiting) >= count:
                batches.append((size, count, waiting[:count]))
                waiting = waiting[count:]
            if size == max(by_size) and waiting:
                batches.append((size, count, waiting))
        yield from reversed(batches)


@functools.partial(jax.jit, static_argnums=3)
def _encode(codec: Codec, wave: jax.Array, lengths: jax.Array, books: int) -> jax.Array:
    # Codes are decisions between near neighbours: full precision, as for voices at generation.
    with jax.default_matmul_precision("highest"):
        return codec.encode(wave, lengths, books)


@functools.partial(jax.jit, static_argnums=5)
def _think(
    reasoner: Reasoner,
    ids: jax.Array,
    prompt_lengths: jax.Array,
    chunks: jax.Array,
    chunk_lengths: jax.Array,
    answers: int,
) -> jax.Array:
    """States [B, answers, D] from position prompt_lengths - 1 on."""
    hidden = reasoner(ids, reasoner.encode_audio(chunks, chunk_lengths))
    at = prompt_lengths[:, None] - 1 + jnp.arange(answers)
    at = jnp.minimum(at, ids.shape[1] - 1)
    return jnp.take_along_axis(hidden, at[..., None], axis=1)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
