"""The Python face: `Chroma`. Files and text in, sound and text out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from chroma_jax.audio.batch import Inputs
from chroma_jax.audio.chat import Conversation, Turn
from chroma_jax.audio.prompt import Processor, VoiceArrays
from chroma_jax.checkpoint import load
from chroma_jax.config import ChromaConfig
from chroma_jax.engine.batch import RunningBatch
from chroma_jax.engine.engine import Engine
from chroma_jax.engine.prefill import Kept
from chroma_jax.engine.reply import Chunk, Generated, Reply
from chroma_jax.engine.request import Request, check_request, check_seed
from chroma_jax.engine.sampling import Sampling
from chroma_jax.engine.script import Script
from chroma_jax.engine.voice import Voice
from chroma_jax.engine.warmup import warm_up
from chroma_jax.generation import arrays
from chroma_jax.generation.listening import Listening
from chroma_jax.generation.reply import ReplyStream, answer
from chroma_jax.model.chroma import ChromaModel, random_model
from chroma_jax.model.kv_cache import KVCache
from chroma_jax.model.unstacked import arranged

__all__ = [
    "Chroma",
    "Chunk",
    "Generated",
    "Kept",
    "Listening",
    "Reply",
    "ReplyStream",
    "Script",
    "Voice",
    "check_request",
    "check_seed",
]


class Chroma:
    """Chroma with its weights and its tokenizer: a question and a voice in, a spoken answer out.

    Build it with `from_pretrained`; the constructor takes the parts. Instances are immutable and may be shared between threads.

    Args:
      model: the four stages.
      processor: tokenizer, chat format and sound settings.
      grow: whether the caches of a reply start small and grow with it, or have their final size from the start.
    """

    def __init__(self, model: ChromaModel, processor: Processor, *, grow: bool = True):
        self.engine = Engine(model, processor, grow=grow)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike,
        dtype: str | None = None,
        *,
        shardings: Any = None,
        quantize: str | None = None,
        layers: str | None = None,
    ) -> Chroma:
        """Loads a checkpoint.

        Args:
          path_or_hub_id: a directory in the Hub's layout, a directory made by `chroma_jax.convert`, or a Hub id.
          dtype: "bfloat16", "float16" or "float32" for Reasoner, Backbone and Decoder; default as stored. The Codec is float32.
          shardings: a tree of shardings like the model's, to load straight into; default one device.
          quantize: "int8" or "fp8" to hold kernels and tables of Reasoner, Backbone and Decoder in eight bits; default as stored.
          layers: "apart" or "stacked", how the LLaMAs' layers are held, see `chroma_jax.model.unstacked`; default what is faster.

        Raises:
          ValueError: no checkpoint there, or a damaged or foreign one; the message names the file and the reason.
        """
        loaded = load(path_or_hub_id, dtype=dtype, shardings=shardings, quantize=quantize)
        processor = Processor.load(loaded.config, loaded.directory)
        return cls(arranged(loaded.model, layers), processor)

    @classmethod
    def random(cls, config: ChromaConfig, seed: int = 0) -> Chroma:
        """Random weights, for trying things: it makes noise, not speech. Wants a config small enough for the built-in byte tokenizer."""
        return cls(arranged(random_model(config, seed)), Processor.load(config))

    @property
    def model(self) -> ChromaModel:
        """The four stages."""
        return self.engine.model

    @property
    def processor(self) -> Processor:
        """Tokenizer, chat format and sound settings."""
        return self.engine.processor

    @property
    def config(self) -> ChromaConfig:
        """Sizes and ids of the model."""
        return self.model.cfg

    @property
    def sample_rate(self) -> int:
        """Samples per second of replies (24000)."""
        return self.config.codec.sampling_rate

    def reply(
        self,
        question: Conversation,
        *,
        voice: Voice,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> Reply:
        """The whole spoken answer.

        Args:
          question: a spoken question (path, bytes or (samples, rate)), a `Turn`, or a conversation: a list of `Turn`s or of
            {"role": ..., "content": ...} messages whose user turns hold audio, text or both.
          voice: the voice to answer in.
          max_seconds: longest answer; default as long as the context allows.
          sampling: how text and codes are chosen; default `Sampling.greedy()`.
          seed: the same seed gives the same reply, alone or in a batch.
          system_prompt: replaces the default one; "" for none.

        Raises:
          ValueError: bad audio, an empty or too long question, a voice or max_seconds beyond the context.
        """
        request = self.request(question, voice, max_seconds, sampling, seed, system_prompt)
        return self.answer(request)

    def answer(self, request: Request) -> Reply:
        """The whole reply to a request."""
        return answer(self.engine, request)

    def stream(
        self,
        question: Conversation,
        *,
        voice: Voice,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> ReplyStream:
        """The answer as it is made, in chunks of at most 160 ms; arguments and errors as for `reply`.

        The chunks put together are exactly `reply`'s text, frames and samples. `close()`, or leaving the `with` block, cancels.
        """
        request = self.request(question, voice, max_seconds, sampling, seed, system_prompt)
        return ReplyStream(self.engine, request)

    @overload
    def say(self, text: str, *, voice: Voice, **request: Any) -> Reply: ...

    @overload
    def say(self, text: Iterable[str], *, voice: Voice, **request: Any) -> ReplyStream: ...

    def say(
        self,
        text: str | Iterable[str],
        *,
        voice: Voice,
        question: Conversation | None = None,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> Reply | ReplyStream:
        """Speaks these words, and not the Reasoner's own.

        The Reasoner thinks on each word as if it had chosen it, so that Backbone and Decoder get what they get in an answer.

        Args:
          text: the words, for a whole reply; or pieces of them, as another language model writes them, for a stream that speaks
            while they come: a piece is asked for when the speech has come so far. However they are cut, the sound is the same.
          voice: as for `reply`, as are the arguments that are not told here.
          question: what the words answer; default a request to speak.
          max_seconds: longest sound.
          sampling: how the codes are chosen.
          seed: of the codes.
          system_prompt: replaces the default one.

        Raises:
          ValueError: nothing to say, or more than the context holds; or as `reply`.
        """
        script = Script(text) if isinstance(text, str) else Script()
        if not isinstance(text, str) and not isinstance(text, Iterable):
            raise ValueError(f"what to say must be text or pieces of it, got {text!r:.60}")
        request = self.engine.request(
            question, voice, max_seconds, sampling, seed, system_prompt, say=script
        )
        return self.answer(request) if script.closed else ReplyStream(self.engine, request, text)

    def batch(self, slots: int, **sizes: Any) -> RunningBatch:
        """Many live streams in one running batch; arguments and errors as for `engine.batch.RunningBatch`."""
        return RunningBatch(self.engine, slots, **sizes)

    def listen(
        self,
        *,
        voice: Voice,
        history: Sequence[Turn | Mapping[str, Any]] = (),
        text: str | None = None,
        system_prompt: str | None = None,
        batch: RunningBatch | None = None,
        after: Kept | None = None,
    ) -> Listening:
        """Hears a question while it is being spoken, so that the wait after its end does not grow with its length.

            with chroma.listen(voice=voice) as listening:
                for samples in microphone:
                    listening.push(samples, 48000)
                reply = listening.reply(max_seconds=20)        # or stream(...), with the arguments of `reply` and `stream`

        The reply is that of `reply([*history, Turn(audio=(all samples, rate), text=text)], ...)`.

        Args:
          voice: the voice to answer in.
          history: the turns before.
          text: what follows the sound in the same turn.
          system_prompt: replaces the default one; "" for none.
          batch: a running batch that takes the question in between its beats, and answers it
            (`batch.admit_request(listening.request())`); default at every push.
          after: a kept turn (`Stream.kept`): what the history has in common with it is not taken in again.

        Raises:
          ValueError: as `reply`.
        """
        return Listening(self.engine, voice, history, text, system_prompt, batch=batch, after=after)

    def warmup(
        self,
        *,
        voice: Voice | Sequence[Voice],
        question_seconds: float = 10.0,
        max_seconds: float | None = 20.0,
        sampling: Sampling | None = None,
        system_prompt: str | None = None,
        listening: bool = True,
    ) -> float:
        """Compiles ahead what live replies run, so that none of them waits for the compiler, not even when its caches grow.

        Args:
          voice: a voice to answer in, or several; others of about their lengths run the same programs.
          question_seconds: longest spoken question.
          max_seconds: longest answer; None for as long as the context allows.
          sampling: as for the replies: what matters is which stages are not plainly greedy.
          system_prompt: as for the replies.
          listening: whether questions are also heard by `listen`.

        Returns:
          Seconds that it took. With `chroma_jax.compilation_cache` the next process takes fewer.
        """
        return warm_up(
            self.engine,
            voice,
            question_seconds=question_seconds,
            max_seconds=max_seconds,
            sampling=sampling,
            system_prompt=system_prompt,
            listening=listening,
        )

    def generate(
        self,
        inputs: Inputs | Mapping[str, np.ndarray],
        *,
        max_frames: int,
        sampling: Sampling | Sequence[Sampling] | None = None,
        seed: int | Sequence[int] = 0,
        audio: bool = True,
    ) -> Generated:
        """Arrays in, arrays out, for a batch; each row is exactly what it would be alone.

        Args:
          inputs: `Inputs`, or a mapping with its fields: question_ids and question_mask [B, L]; mel [B, F, M] and mel_mask [B, M],
            or None without audio; voice_ids and voice_mask [B, P]; voice_wave [B, N] or [B, 1, N] at 24 kHz; voice_lengths [B].
          max_frames: frames (80 ms) after which a row ends.
          sampling: for all rows, or one each; default greedy.
          seed: for all rows, or one each.
          audio: whether to make sound.

        Raises:
          ValueError: arrays that do not fit together or the model, naming the array and the row.
        """
        return arrays.generate(
            self.engine,
            inputs,
            max_frames=max_frames,
            sampling=sampling,
            seed=seed,
            audio=audio,
        )

    def encode_voice(self, voice: Voice) -> np.ndarray:
        """The voice's codes [F, Q], computed once per voice and codec."""
        return self.engine.encode_voice(voice)

    def prefill_voice(self, voice: Voice, arrays: VoiceArrays | None = None) -> tuple[KVCache, int]:
        """What the Backbone makes of the voice, and its positions; see `Engine.prefill_voice`."""
        return self.engine.prefill_voice(voice, arrays)

    def request(
        self,
        question: Conversation,
        voice: Voice,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> Request:
        """A request, checked and ready for the device; arguments and errors as for `reply`."""
        return self.engine.request(question, voice, max_seconds, sampling, seed, system_prompt)
