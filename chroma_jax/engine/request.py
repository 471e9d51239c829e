"""One request, checked and ready for the device, whatever its question and its words are.

A request is a reply to be made: a question that is known whole or that the Reasoner takes in piece by
piece, a voice that the Backbone has taken in, and how the reply is chosen. Everything that can be wrong
with it is found when it is made, so that a running batch is never given one that fails.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from chroma_jax import schedule
from chroma_jax.audio.chat import Conversation, Turn
from chroma_jax.audio.prompt import Processor, Question, VoiceArrays
from chroma_jax.config import ChromaConfig
from chroma_jax.engine import caches, prefill, programs
from chroma_jax.engine.caches import CacheLedger, CacheSizes
from chroma_jax.engine.prefill import Prefill
from chroma_jax.engine.sampling import Sampling, check_sampling, controls
from chroma_jax.engine.script import Script
from chroma_jax.engine.state import BeatState, Prompt
from chroma_jax.engine.voice import VOICE_RATE, Voice
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.flat import FlatModule
from chroma_jax.model.kv_cache import KVCache

# What the Reasoner is asked where it is told what to say and nothing was asked. It has not the words in
# it: they may not be known yet.
SAY = Turn(text="Please say what you have to say.")


class Request(NamedTuple):
    """A reply to be made: a batch of one."""

    question: Prompt | Prefill  # a Prompt on the host, without the voice
    voice: KVCache  # `beat.prefill_voice`
    voice_length: int  # positions
    max_frames: int
    sampling: Sampling
    seed: int
    script: Script | None = None  # the words; None for the Reasoner's own
    asked: Question | None = None  # the question as tokens and sounds; a turn is kept by it
    keep: bool = False  # whether the turn is kept, see `Stream.kept`

    @property
    def question_length(self) -> int:
        """Positions of the question."""
        if isinstance(self.question, Prefill):
            return self.question.length
        return int(self.question.lengths[0])

    @property
    def padded_length(self) -> int:
        """Positions that the question takes while it is taken in."""
        if isinstance(self.question, Prefill):
            return self.question.length
        return self.question.ids.shape[1]

    def ledger(
        self, config: ChromaConfig, *, grow: bool = True, limits: CacheSizes | None = None
    ) -> CacheLedger:
        """Of the caches of this reply alone; `limits` by default as long as it may become."""
        lengths = self.padded_length, self.voice_length
        limits = limits or caches.final_sizes(config, *lengths, self.max_frames)
        ledger = CacheLedger(limits, 1, grow=grow)
        ledger.enter(0, *lengths)
        return ledger

    def begin(
        self,
        model: ChromaModel | FlatModule,
        sizes: CacheSizes,
        always: Collection[str] = (),
        forced_size: int = 0,
    ) -> BeatState:
        """The state before the first beat, with caches of these sizes; `always` as for `sampling.controls`."""
        if isinstance(self.question, Prefill):
            if self.question.error is not None:
                raise self.question.error
            prefill.take_in_all(model, self.question)
            return programs.start(
                model,
                None,
                self.question.given_away(sizes.reasoner),
                self.question.hidden,
                *_chosen([self], always),
                backbone_size=sizes.backbone,
                voice=self.voice,
                forced_size=forced_size,
            )
        return begin_together(model, [self], sizes, always, forced_size)


def begin_together(
    model: ChromaModel | FlatModule,
    requests: list[Request],
    sizes: CacheSizes,
    always: Collection[str] = (),
    forced_size: int = 0,
) -> BeatState:
    """`Request.begin` of several whose questions are prompts of one shape: a batch of as many rows."""
    voice = requests[0].voice
    if len(requests) > 1:
        voice = programs.joined([request.voice for request in requests], sizes.backbone)
    prompts = [request.question[:4] for request in requests]
    return programs.prefill(
        model,
        Prompt(*map(np.concatenate, zip(*prompts, strict=True)), *[None] * 4),
        *_chosen(requests, always),
        reasoner_size=sizes.reasoner,
        backbone_size=sizes.backbone,
        voice=voice,
        forced_size=forced_size,
    )


def _chosen(requests: list[Request], always: Collection[str]) -> tuple:
    return (
        controls([request.sampling for request in requests], always),
        programs.keys([request.seed for request in requests]),
        np.array([request.max_frames for request in requests], np.int32),
    )


def check_request(
    processor: Processor,
    question: Conversation | None,
    voice: Voice,
    max_seconds: float | None = None,
    system_prompt: str | None = None,
    say: str | Script | None = None,
) -> tuple[Question, VoiceArrays, int]:
    """What is asked and said, checked without the model: arrays of question and voice, most frames.

    Arguments and errors as those of `Chroma.reply`; without a question there must be something to say.
    """
    arrays, positions = check_voice(processor, voice)
    if question is None:
        if say is None:
            raise ValueError("there is neither a question nor something to say")
        question = SAY
    if isinstance(say, str):
        say = Script(say)
    asked = processor.question(question, system_prompt=system_prompt)
    max_frames = programs.max_frames_of(processor.config, max_seconds, positions)
    if say is not None:
        check_words(processor, say, positions, len(asked.ids))
    return asked, arrays, max_frames


def check_words(processor: Processor, script: Script, voice: int, question: int) -> None:
    """Raises ValueError where the words that are known do not fit after voice and question (positions), or are none."""
    if not isinstance(script, Script):
        raise ValueError(f"what to say must be text or a Script, got {type(script).__name__}")
    config = processor.config
    count = len(processor.tokenizer.encode(script.text)) + 1
    for limit, used, each in (
        (config.backbone.llama.max_positions, voice + 1, schedule.POSITIONS_PER_BEAT),
        (config.reasoner.text.max_positions, question, 1),
    ):
        most = max(0, (limit - used) // each)
        if count > most:
            raise ValueError(
                f"too much to say: {count} tokens, and after this question and voice at most {most} fit"
            )


def check_voice(processor: Processor, voice: Voice) -> tuple[VoiceArrays, int]:
    """The arrays of a voice, and its positions in the Backbone's sequence. Raises ValueError for what is no voice or too long a one."""
    if not isinstance(voice, Voice):
        raise ValueError(
            f"voice must be a Voice(audio, transcript), got {type(voice).__name__}: "
            "Chroma speaks in the voice of a reference recording"
        )
    arrays = voice_arrays(processor, voice)
    frames = -(-len(arrays.wave) // processor.config.codec.frame_samples)
    return arrays, schedule.voice_length(len(arrays.ids), frames)


def voice_arrays(processor: Processor, voice: Voice) -> VoiceArrays:
    """The arrays of a voice. Raises ValueError as `Processor.voice_arrays`."""
    return processor.voice_arrays((voice.wave, VOICE_RATE), voice.text)


def check_seed(seed: int) -> int:
    """The seed as an int. Raises ValueError for what is no seed."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {seed!r:.60}")
    return int(seed)


def check_choice(sampling: Sampling | None, seed: int) -> tuple[Sampling, int]:
    """How a reply is chosen. Raises ValueError for what is no sampling or no seed."""
    return check_sampling(sampling), check_seed(seed)
