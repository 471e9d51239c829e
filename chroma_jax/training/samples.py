"""Sample replies: what the model that is being trained answers to a few records, greedily, as sound and text.

A sample is made by the code that users run (`engine.beat`), on the record's question and in the voice that the record speaks in.
The Reasoner says its own words, as it would to a user, so a reply resembles the record's answer only where the words do. Records
with precomputed Reasoner states do not have the question's sound: there the record's text and states are given to
Backbone and Decoder beat by beat, instead of the Reasoner's own. Where text is what trains, a reply is the Reasoner's text alone.

    <workdir>/samples/step_000100/0.wav, 1.wav, ...    the replies; replies.txt: a line about each
    <workdir>/samples/record/0.wav, 1.wav, ...         the answers of the same records, from their codes

Sampling reads the parameters where they are, on any mesh, and changes nothing. It holds no copy of them but, with LoRA, the merged kernels
while it lasts. Everything is one program, compiled the first time.

Axes: B rows, N question tokens, C chunks, L answer tokens, T frames, P transcript tokens, F voice frames, Q codebooks, D width.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax import schedule
from chroma_jax.audio.tokenizer import Tokenizer
from chroma_jax.audio.wav import save_wav
from chroma_jax.data.mixture import Mixture
from chroma_jax.data.pipeline import read_rows
from chroma_jax.data.plan import Planned
from chroma_jax.engine import beat as beats
from chroma_jax.engine import programs
from chroma_jax.engine.beat import Beat, Prompt
from chroma_jax.engine.reply import Generated, collect
from chroma_jax.engine.sampling import Sampling, controls
from chroma_jax.engine.state import Forced
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.kv_cache import init_cache
from chroma_jax.training.config import SPEECH
from chroma_jax.training.step import Trainer, TrainState

REPLIES, ANSWERS = "replies.txt", "answers.txt"


class Sample(NamedTuple):
    """What was answered to one record."""

    record: str  # its id
    text: str
    finish: str  # "stop", "length" or "context", as `session.Reply.finish_reason`
    same_text: bool  # whether the text is the record's, as far as it got
    frames: np.ndarray | None = None  # [T, Q] int32; None where it is text alone
    audio: np.ndarray | None = None  # [N] float32
    same_frames: float | None = (
        None  # the share of the record's frames, as many as a reply may have, that stand in their places
    )

    def describe(self, rate: int) -> str:
        """One line; `rate` in samples per second."""
        said = json.dumps(self.text, ensure_ascii=False)
        words = "the record's words" if self.same_text else "other words"
        line = f"{self.record}: {said} ({words})  {self.finish}"
        if self.audio is None:
            return line
        return (
            f"{line}  {len(self.audio) / rate:.2f} s  {self.same_frames:.1%} of the record's frames"
        )


class Samples:
    """Answers to the first records of a mixture, as often as asked.

    All processes of a run make it and call it together.

    Args:
      trainer: whose model answers.
      mixture: whose records.
      tokenizer: for the replies' text.
      count: of records, the first within the mixture's limits.
      max_seconds: longest spoken reply; one that is text alone may be as long as the records' shape.
      seed: of the voices' draw; epoch 0, as in evaluation.
    """

    def __init__(
        self,
        trainer: Trainer,
        mixture: Mixture,
        tokenizer: Tokenizer,
        *,
        count: int,
        max_seconds: float,
        seed: int,
    ):
        self._trainer, self._tokenizer = trainer, tokenizer
        cfg = trainer.cfg
        numbers = mixture.records[:count]
        # The largest shape that one of them needs holds all.
        planned = Planned(epoch=0, shape=int(mixture.level[numbers].max()), records=numbers)
        self._batch = read_rows(mixture, planned, seed)
        found = [mixture.find(int(number)) for number in numbers]
        self._names = [dataset[local].id for dataset, local in found]
        b = self._batch
        self._prompt = Prompt(
            ids=b.prompt_ids,
            lengths=b.prompt_lengths,
            chunks=b.chunks,
            chunk_lengths=b.chunk_lengths,
            voice_ids=b.voice_ids,
            voice_id_lengths=b.voice_id_lengths,
            voice_frames=b.voice_frames,
            voice_frame_lengths=b.voice_frame_lengths,
        )
        voice = int(schedule.voice_length(b.voice_id_lengths, b.voice_frame_lengths).max())
        room = programs.max_frames_of(cfg, None, voice)
        self._max_frames = min(math.ceil(max_seconds * cfg.codec.frame_rate), room)
        num_beats = -(-self._max_frames // schedule.FRAMES_PER_TEXT)
        sizes = programs.cache_sizes(cfg, self._prompt, self._max_frames)
        self._given = None
        if b.hidden is not None:
            fit = [(0, 0), (0, max(0, num_beats - b.text.shape[1]))]
            self._given = (
                np.pad(b.hidden, [*fit, (0, 0)])[:, :num_beats],
                np.pad(b.text, fit)[:, :num_beats],
            )
        everywhere = None if trainer.mesh is None else NamedSharding(trainer.mesh, P())
        self._speaks = trainer.train_cfg.objective == SPEECH
        if self._speaks:
            answer = functools.partial(
                _speak,
                max_frames=self._max_frames,
                num_beats=num_beats,
                reasoner_size=sizes[0],
                backbone_size=sizes[1],
            )
        else:
            answer = functools.partial(_write_text, num_tokens=b.text.shape[1])
        self._answer = jax.jit(answer, out_shardings=everywhere)
        self._hear = jax.jit(lambda codec, codes: codec.decode(codes), out_shardings=everywhere)

    @property
    def rate(self) -> int:
        """Samples per second of all sound."""
        return self._trainer.cfg.codec.sampling_rate

    @property
    def compilations(self) -> int:
        """How often the program of a reply was compiled: once."""
        return self._answer._cache_size()

    def __call__(self, state: TrainState, frozen: dict[str, Any]) -> list[Sample]:
        """The replies of the model as it is now."""
        model = self._trainer.model_of(state, frozen)
        with self._on_mesh():
            out = jax.device_get(self._answer(model, self._prompt, self._given))
        rows = range(len(self._names))
        if not self._speaks:
            return [self._reply(row, tokens) for row, tokens in zip(rows, out, strict=True)]
        made = collect(self._trainer.cfg, [out], True)
        return [self._spoken_reply(row, made) for row in rows]

    def recorded(self, state: TrainState, frozen: dict[str, Any]) -> list[Sample]:
        """The records' own answers."""
        b = self._batch
        replies = [self._reply(row, b.text[row]) for row in range(len(self._names))]
        if not self._speaks:
            return replies
        spoken = b.frame_lengths - 1  # the stop frame is not heard
        heard = np.arange(b.frames.shape[1]) < spoken[:, None]
        codec = self._trainer.model_of(state, frozen).codec
        with self._on_mesh():
            waves = jax.device_get(self._hear(codec, np.where(heard[..., None], b.frames, 0)))
        per_frame = self._trainer.cfg.codec.frame_samples
        return [
            reply._replace(frames=frames[:count], audio=wave[: count * per_frame], same_frames=1.0)
            for reply, frames, wave, count in zip(replies, b.frames, waves, spoken, strict=True)
        ]

    def _reply(self, row: int, tokens: np.ndarray) -> Sample:
        """Of text: the tokens up to the first im_end."""
        ends = np.flatnonzero(tokens == self._trainer.cfg.im_end_token_id)
        tokens = tokens[: ends[0] + 1] if len(ends) else tokens
        wanted = self._batch.text[row, : self._batch.text_lengths[row]]
        return Sample(
            record=self._names[row],
            text=self._tokenizer.decode(tokens),
            finish="stop" if len(ends) else "length",
            same_text=len(tokens) > 0 and np.array_equal(tokens, wanted[: len(tokens)]),
        )

    def _spoken_reply(self, row: int, made: Generated) -> Sample:
        b, frames = self._batch, made.frames[row, : made.num_frames[row]]
        recorded = b.frames[row, : b.frame_lengths[row] - 1][: self._max_frames]
        reply = self._reply(row, made.text_tokens[row, : made.num_text_tokens[row]])
        return reply._replace(
            finish=made.finish_reason[row],
            frames=frames,
            audio=made.audio[row],
            same_frames=same_frames(frames, recorded),
        )

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        mesh = self._trainer.mesh
        return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def same_frames(frames: np.ndarray, wanted: np.ndarray) -> float:
    """The share of the wanted frames [T, Q] that `frames` [T', Q] has in their places."""
    if not len(wanted):
        return float(not len(frames))
    both = min(len(frames), len(wanted))
    return float((frames[:both] == wanted[:both]).all(axis=1).sum() / len(wanted))


def write(folder: str, name: str, samples: Sequence[Sample], rate: int) -> None:
    """Sound and lines of samples, under `folder`. Raises OSError or AudioError (a ValueError) where that cannot be."""
    os.makedirs(folder, exist_ok=True)
    for number, sample in enumerate(samples):
        if sample.audio is not None:
            save_wav(os.path.join(folder, f"{number}.wav"), sample.audio, rate)
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        f.writelines(
            f"{number}  {sample.describe(rate)}\n" for number, sample in enumerate(samples)
        )


def _speak(
    model: ChromaModel,
    prompt: Prompt,
    given: tuple[jax.Array, jax.Array] | None,
    *,
    max_frames: int,
    num_beats: int,
    reasoner_size: int,
    backbone_size: int,
) -> Beat:
    """Greedy replies: the beats, each field with a leading axis of `num_beats`.

    given: Reasoner states [B, num_beats, D] and text tokens [B, num_beats] to speak; None for the Reasoner's own.
    """
    rows = prompt.voice_ids.shape[0]
    greedy = controls([Sampling.greedy()] * rows)
    keys = jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32))
    limit = jnp.full(rows, max_frames, jnp.int32)
    if given is None:
        sizes = dict(reasoner_size=reasoner_size, backbone_size=backbone_size)
        state = beats.prefill(model, prompt, greedy, keys, limit, **sizes)
        return beats.decode(model, state, num_beats)[1]
    hidden, text = given
    llama = model.cfg.reasoner.text
    hidden = hidden.astype(llama.dtype)
    # The Reasoner is not asked: what it would have thought is given, too.
    cache = init_cache(llama, rows, 1)
    sizes = dict(backbone_size=backbone_size)
    state = beats.start(model, prompt, cache, hidden[:, 0], greedy, keys, limit, **sizes)
    forced = Forced(text, jnp.full(rows, num_beats), hidden)
    return beats.decode(model, state._replace(forced=forced), num_beats)[1]


def _write_text(model: ChromaModel, prompt: Prompt, given: None, *, num_tokens: int) -> jax.Array:
    """The Reasoner's likeliest tokens [B, num_tokens] after the questions; those after an im_end mean nothing."""
    reasoner, rows = model.reasoner, prompt.ids.shape[0]
    features = reasoner.encode_audio(prompt.chunks, prompt.chunk_lengths)
    size = prompt.ids.shape[1] + num_tokens
    hidden, cache = reasoner.prefill(prompt.ids, prompt.lengths, features, size)
    last = jnp.take_along_axis(hidden, (prompt.lengths - 1)[:, None, None], axis=1)[:, 0]

    def choose(hidden):
        return jnp.argmax(reasoner.logits(hidden), axis=-1).astype(jnp.int32)

    def step(carry, _):
        token, cache = carry
        hidden, cache = reasoner.step(token, cache, jnp.ones(rows, bool))
        return (choose(hidden), cache), token

    return jax.lax.scan(step, (choose(last), cache), length=num_tokens)[1].swapaxes(0, 1)
