"""The Python face: `Chroma`. Files and text in, sound and text out."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from chroma_jax.audio.batch import Inputs, normalize_inputs, pack
from chroma_jax.audio.chat import Conversation, Turn
from chroma_jax.audio.prompt import Processor, VoiceArrays
from chroma_jax.checkpoint import load
from chroma_jax.config import ChromaConfig
from chroma_jax.engine import caches, programs
from chroma_jax.engine.programs import Generated
from chroma_jax.engine.request import Request, check_request, check_seed, voice_arrays
from chroma_jax.engine.sampling import Sampling
from chroma_jax.engine.state import Prompt
from chroma_jax.engine.voice import EncodedVoice, KeptVoices, Voice, codec_name
from chroma_jax.generation.listening import Listening
from chroma_jax.generation.reply import Chunk, Reply, ReplyStream
from chroma_jax.generation.warmup import warm_up
from chroma_jax.model.chroma import ChromaModel, random_model
from chroma_jax.model.flat import FlatModule
from chroma_jax.model.kv_cache import KVCache
from chroma_jax.model.unstacked import arranged
from chroma_jax.schedule import voice_length

__all__ = [
    "Chroma",
    "Chunk",
    "Listening",
    "Reply",
    "ReplyStream",
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
        self.model = model
        self.flat = FlatModule.of(model)  # the same, as the programs of every beat are given it
        self.processor = processor
        self.grow = grow
        self._voices = KeptVoices()

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
        room = request.room(self.config, grow=self.grow)
        state = request.begin(self.flat, room.sizes())
        out = programs.run(self.flat, state, request.max_frames, room=room)
        tokens = out.text_tokens[0, : out.num_text_tokens[0]]
        return self._reply(
            tokens, out.frames[0, : out.num_frames[0]], out.audio[0], out.finish_reason[0]
        )

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
        return ReplyStream(self, request)

    def listen(
        self,
        *,
        voice: Voice,
        history: Sequence[Turn | Mapping[str, Any]] = (),
        text: str | None = None,
        system_prompt: str | None = None,
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

        Raises:
          ValueError: as `reply`.
        """
        return Listening(self, voice, history, text, system_prompt)

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
            self,
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
        if not isinstance(max_frames, int | np.integer) or max_frames < 0:
            raise ValueError(f"max_frames must be a whole number, at least 0, got {max_frames!r}")
        batch = normalize_inputs(self.config, inputs)
        rows = len(batch.lengths)
        samplings = programs.per_row("sampling", sampling or Sampling(), rows, Sampling)
        seeds = [check_seed(s) for s in programs.per_row("seed", seed, rows, (int, np.integer))]
        prompt = programs.as_prompt(batch, *programs.encode_voices(self.model, batch))
        room = caches.room_of(self.config, prompt, int(max_frames), grow=self.grow)
        state = programs.begin(
            self.flat, prompt, int(max_frames), samplings, seeds, sizes=room.sizes()
        )
        return programs.run(self.flat, state, int(max_frames), audio=audio, room=room)

    def encode_voice(self, voice: Voice) -> np.ndarray:
        """The voice's codes [F, Q], computed once per voice and codec."""
        self._encoded(voice)
        return voice.codes(self._codec_id)

    def prefill_voice(self, voice: Voice, arrays: VoiceArrays | None = None) -> tuple[KVCache, int]:
        """What the Backbone makes of the voice, and its positions; kept on the device for the voices used last.

        Args:
          voice: the voice.
          arrays: its arrays, where they are known.
        """

        def hear() -> tuple[KVCache, int]:
            given = arrays or voice_arrays(self.processor, voice)
            encoded = self._encoded(voice, given)
            cache = programs.prefill_voice(self.flat, given.ids, encoded)
            frames = -(-len(given.wave) // self.config.codec.frame_samples)
            return cache, voice_length(len(given.ids), frames)

        return self._voices.get(voice, hear)

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
        seed = check_seed(seed)
        asked, arrays, max_frames = check_request(
            self.processor, question, voice, max_seconds, system_prompt
        )
        batch = normalize_inputs(self.config, pack([(asked, arrays)]))
        prompt = Prompt(batch.ids, batch.lengths, batch.chunks, batch.chunk_lengths, *[None] * 4)
        heard = self.prefill_voice(voice, arrays)
        return Request(prompt, *heard, max_frames, sampling or Sampling(), seed)

    def prepare(
        self,
        question: Conversation,
        voice: Voice,
        max_seconds: float | None = None,
        system_prompt: str | None = None,
    ) -> tuple[Prompt, int]:
        """The device-side prompt (a batch of one) and the most frames of a request; arguments and errors as for `reply`."""
        asked, arrays, max_frames = check_request(
            self.processor, question, voice, max_seconds, system_prompt
        )
        codes = self.encode_voice(voice)
        batch = normalize_inputs(self.config, pack([(asked, arrays)]))
        padded = batch.voice_wave.shape[1] // self.config.codec.frame_samples
        voice_frames = np.zeros((1, padded, codes.shape[1]), np.int32)
        voice_frames[0, : len(codes)] = codes
        return programs.as_prompt(batch, voice_frames, np.array([len(codes)])), max_frames

    def join(self, chunks: Sequence[Chunk], finish_reason: str) -> Reply:
        """Chunks of one stream, in order, as one reply."""

        def all_of(name: str, empty: np.ndarray) -> np.ndarray:
            return np.concatenate([empty, *(getattr(chunk, name) for chunk in chunks)])

        return self._reply(
            all_of("tokens", np.zeros(0, np.int32)),
            all_of("frames", np.zeros((0, self.config.num_codebooks), np.int32)),
            all_of("audio", np.zeros(0, np.float32)),
            finish_reason,
        )

    def _reply(self, tokens, frames, audio, finish_reason) -> Reply:
        if finish_reason == "context":
            logging.warning(
                "the reply was cut after %.1f s: the context is full", len(audio) / self.sample_rate
            )
        return Reply(
            text=self.processor.tokenizer.decode(tokens),
            audio=audio,
            sample_rate=self.sample_rate,
            frames=frames,
            tokens=tokens,
            finish_reason=finish_reason,
        )

    def _encoded(
        self, voice: Voice, arrays: VoiceArrays | None = None
    ) -> np.ndarray | EncodedVoice:
        """The voice's codes, which the device may still be computing."""
        if self._codec_id not in voice._codes:
            wave = (arrays or voice_arrays(self.processor, voice)).wave
            voice._codes[self._codec_id] = programs.encoding_voice(self.model, wave)
        return voice._codes[self._codec_id]

    @functools.cached_property
    def _codec_id(self) -> str:
        """Voices saved with one codec's codes are encoded anew for another."""
        digest = hashlib.sha256()
        # A few values of every parameter tell codecs apart.
        for few in jax.device_get(
            _first_values([x for x in jax.tree.leaves(self.model.codec) if x.ndim])
        ):
            digest.update(few.tobytes())
        return codec_name(digest.hexdigest()[:16], self.config)


@jax.jit
def _first_values(arrays: list[jax.Array]) -> list[jax.Array]:
    return [x.reshape(-1)[:64] for x in arrays]
