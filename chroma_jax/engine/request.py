"""One request, checked and ready for the device, whether its question is an array or was heard while it was spoken."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np

from chroma_jax.audio.chat import Conversation
from chroma_jax.audio.prompt import Processor, Question, VoiceArrays
from chroma_jax.config import ChromaConfig
from chroma_jax.engine import caches, programs
from chroma_jax.engine.caches import CacheLedger, CacheSizes
from chroma_jax.engine.sampling import Sampling, controls
from chroma_jax.engine.state import BeatState, Prompt
from chroma_jax.engine.voice import VOICE_RATE, Voice
from chroma_jax.model import kv_cache
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.flat import FlatModule
from chroma_jax.model.kv_cache import KVCache
from chroma_jax.schedule import voice_length

resized = jax.jit(kv_cache.resized, static_argnums=1)


class Prefilled(NamedTuple):
    """A question that the Reasoner has heard to its end."""

    hidden: jax.Array  # [1, D], H_0
    cache: KVCache  # the Reasoner's; given away to the reply
    length: int  # positions


class Request(NamedTuple):
    """A reply to be made: a batch of one."""

    question: Prompt | Prefilled  # a Prompt on the host, without the voice
    voice: KVCache  # `beat.prefill_voice`
    voice_length: int  # positions
    max_frames: int
    sampling: Sampling
    seed: int

    @property
    def question_length(self) -> int:
        """Positions of the question, its padding included where it has some."""
        return (
            self.question.length
            if isinstance(self.question, Prefilled)
            else self.question.ids.shape[1]
        )

    def room(self, config: ChromaConfig, *, grow: bool = True) -> CacheLedger:
        """CacheLedger for this reply alone."""
        lengths = self.question_length, self.voice_length
        room = CacheLedger(caches.final_sizes(config, *lengths, self.max_frames), 1, grow=grow)
        room.enter(0, *lengths)
        return room

    def begin(
        self, model: ChromaModel | FlatModule, sizes: CacheSizes, always: Collection[str] = ()
    ) -> BeatState:
        """The state before the first beat, with caches of these sizes; `always` as for `sampling.controls`."""
        chosen = (
            controls([self.sampling], always),
            programs.keys([self.seed]),
            np.array([self.max_frames], np.int32),
        )
        if isinstance(self.question, Prefilled):
            hidden, cache, _ = self.question
            if cache.size != sizes.reasoner:
                cache = resized(cache, sizes.reasoner)
            return programs.start(
                model, None, cache, hidden, *chosen, backbone_size=sizes.backbone, voice=self.voice
            )
        return programs.prefill(
            model,
            self.question,
            *chosen,
            reasoner_size=sizes.reasoner,
            backbone_size=sizes.backbone,
            voice=self.voice,
        )


def check_request(
    processor: Processor,
    question: Conversation,
    voice: Voice,
    max_seconds: float | None = None,
    system_prompt: str | None = None,
) -> tuple[Question, VoiceArrays, int]:
    """Everything about a request that can be wrong, found without the model: arrays of question and voice, most frames.

    Arguments and errors as those of `Chroma.reply`.
    """
    arrays, positions = check_voice(processor, voice)
    asked = processor.question(question, system_prompt=system_prompt)
    return asked, arrays, programs.max_frames_of(processor.config, max_seconds, positions)


def check_voice(processor: Processor, voice: Voice) -> tuple[VoiceArrays, int]:
    """The arrays of a voice, and its positions in the Backbone's sequence. Raises ValueError for what is no voice or too long a one."""
    if not isinstance(voice, Voice):
        raise ValueError(
            f"voice must be a Voice(audio, transcript), got {type(voice).__name__}: "
            "Chroma speaks in the voice of a reference recording"
        )
    arrays = voice_arrays(processor, voice)
    frames = -(-len(arrays.wave) // processor.config.codec.frame_samples)
    return arrays, voice_length(len(arrays.ids), frames)


def voice_arrays(processor: Processor, voice: Voice) -> VoiceArrays:
    """The arrays of a voice. Raises ValueError as `Processor.voice_arrays`."""
    return processor.voice_arrays((voice.wave, VOICE_RATE), voice.text)


def check_seed(seed: int) -> int:
    """The seed as an int. Raises ValueError for what is no seed."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {seed!r}")
    return int(seed)
