"""The Python face: `Chroma`, `Voice`, `Reply` and the stream of `Chunk`s. Files and text in, sound and text out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from chroma_jax.audio.batch import Inputs, normalize_inputs, pack
from chroma_jax.audio.chat import Conversation
from chroma_jax.audio.prompt import Processor, Question, VoiceArrays
from chroma_jax.audio.wav import AudioError, AudioSource, load_audio, save_wav
from chroma_jax.checkpoint import load
from chroma_jax.config import ChromaConfig
from chroma_jax.generation import runtime
from chroma_jax.generation.beat import Beat, Finish, Prompt
from chroma_jax.generation.runtime import Generated
from chroma_jax.generation.sampling import Sampling
from chroma_jax.model.chroma import ChromaModel, random_model
from chroma_jax.schedule import voice_length

_VOICE_RATE = 24000  # what voices are kept at: the rate of every Mimi


class Voice:
    """A reference voice: a few seconds of someone speaking, and exactly what is said. Use voices only with consent.

    The codes that the Codec makes of it are computed by the first reply and kept, also by `save`.

    Args:
      audio: a path, encoded bytes or (samples, rate); any rate, stereo is mixed down.
      text: the transcript.

    Raises:
      ValueError: audio or transcript is missing, unreadable, too short or not finite.
    """

    def __init__(self, audio: AudioSource, text: str):
        if audio is None:
            raise AudioError(
                "a voice needs its sound as well as its transcript, got a transcript without audio"
            )
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"a voice needs its transcript, what the reference recording says, got {text!r}"
            )
        self.wave: np.ndarray = load_audio(audio, _VOICE_RATE)  # [N] float32 at 24 kHz
        self.text = text
        self._codes: dict[str, np.ndarray] = {}  # by codec: [F, Q] int32

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return len(self.wave) / _VOICE_RATE

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz with recording, transcript and codes, atomically."""
        path = os.fspath(path)
        temporary = f"{path}.{os.getpid()}.tmp"
        codes = {f"codes_{codec}": c for codec, c in self._codes.items()}
        try:
            with open(temporary, "wb") as f:
                np.savez(f, format=np.int32(1), wave=self.wave, text=np.array(self.text), **codes)
            os.replace(temporary, path)
        except OSError as e:
            raise AudioError(f"{path}: the voice cannot be saved: {e.strerror or e}") from e
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Voice:
        """Reads what `save` wrote. Raises ValueError naming the file when it is missing or something else."""
        path = os.fspath(path)
        try:
            with np.load(path, allow_pickle=False) as saved:
                voice = cls((saved["wave"], _VOICE_RATE), str(saved["text"]))
                codes = {
                    k.removeprefix("codes_"): saved[k] for k in saved if k.startswith("codes_")
                }
        except AudioError:
            raise
        except Exception as e:  # zipfile, numpy and pickle have many ways to refuse a file
            raise AudioError(f"{path}: not a saved voice: {e}") from e
        for codec, array in codes.items():
            if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
                raise AudioError(
                    f"{path}: not a saved voice: codes_{codec} has shape {array.shape}"
                )
        voice._codes = codes
        return voice


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a reply as it is made."""

    text: str  # what is new, whole characters
    audio: np.ndarray  # [n * frame_samples] float32, n = 0..2
    tokens: np.ndarray  # [0 or 1] int32
    frames: np.ndarray  # [n, Q] int32


@dataclasses.dataclass(frozen=True)
class Reply:
    """A spoken answer."""

    text: str
    audio: np.ndarray  # [N] float32
    sample_rate: int
    frames: np.ndarray  # [T, Q] int32 codes
    tokens: np.ndarray  # [T'] int32 text tokens, im_end included where it was reached
    finish_reason: (
        str  # "stop": the model ended; "length": max_seconds; "context": the context is full
    )

    @property
    def seconds(self) -> float:
        """Length of the sound."""
        return len(self.audio) / self.sample_rate

    def save(self, path: str | os.PathLike) -> None:
        """Writes a 16-bit WAV, atomically. Raises ValueError when the path cannot be written."""
        save_wav(path, self.audio, self.sample_rate)


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
    if not isinstance(voice, Voice):
        raise ValueError(
            f"voice must be a Voice(audio, transcript), got {type(voice).__name__}: "
            "Chroma speaks in the voice of a reference recording"
        )
    asked = processor.question(question, system_prompt=system_prompt)
    arrays = _voice_arrays(processor, voice)
    frames = -(-len(arrays.wave) // processor.config.codec.frame_samples)
    positions = voice_length(len(arrays.ids), frames)
    return asked, arrays, runtime.max_frames_of(processor.config, max_seconds, positions)


def _voice_arrays(processor: Processor, voice: Voice) -> VoiceArrays:
    return processor.voice_arrays((voice.wave, _VOICE_RATE), voice.text)


class Chroma:
    """Chroma with its weights and its tokenizer: a question and a voice in, a spoken answer out.

    Build it with `from_pretrained`; the constructor takes the parts. Instances are immutable and may be shared between threads.
    """

    def __init__(self, model: ChromaModel, processor: Processor):
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | os.PathLike, dtype: str | None = None, *, shardings: Any = None
    ) -> Chroma:
        """Loads a checkpoint.

        Args:
          path_or_hub_id: a directory in the Hub's layout, a directory made by `chroma_jax.convert`, or a Hub id.
          dtype: "bfloat16", "float16" or "float32" for Reasoner, Backbone and Decoder; default as stored. The Codec is float32.
          shardings: a tree of shardings like the model's, to load straight into; default one device.

        Raises:
          ValueError: no checkpoint there, or a damaged or foreign one; the message names the file and the reason.
        """
        loaded = load(path_or_hub_id, dtype=dtype, shardings=shardings)
        return cls(loaded.model, Processor.load(loaded.config, loaded.directory))

    @classmethod
    def random(cls, config: ChromaConfig, seed: int = 0) -> Chroma:
        """Random weights, for trying things: it makes noise, not speech. Wants a config small enough for the built-in byte tokenizer."""
        return cls(random_model(config, seed), Processor.load(config))

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
        prompt, max_frames = self.prepare(question, voice, max_seconds, system_prompt)
        state = runtime.begin(
            self.model, prompt, max_frames, [sampling or Sampling()], [check_seed(seed)]
        )
        out = runtime.run(self.model, state, max_frames)
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
        prompt, max_frames = self.prepare(question, voice, max_seconds, system_prompt)
        return ReplyStream(self, prompt, max_frames, sampling or Sampling(), check_seed(seed))

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
        samplings = runtime.per_row("sampling", sampling or Sampling(), rows, Sampling)
        seeds = [check_seed(s) for s in runtime.per_row("seed", seed, rows, (int, np.integer))]
        prompt = runtime.as_prompt(batch, *runtime.encode_voices(self.model, batch))
        state = runtime.begin(self.model, prompt, int(max_frames), samplings, seeds)
        return runtime.run(self.model, state, int(max_frames), audio=audio)

    def encode_voice(self, voice: Voice) -> np.ndarray:
        """The voice's codes [F, Q], computed once per voice and codec."""
        if self._codec_id not in voice._codes:
            wave = _voice_arrays(self.processor, voice).wave
            voice._codes[self._codec_id] = runtime.encode_voice(self.model, wave)
        return voice._codes[self._codec_id]

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
        return runtime.as_prompt(batch, voice_frames, np.array([len(codes)])), max_frames

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

    @functools.cached_property
    def _codec_id(self) -> str:
        """Voices saved with one codec's codes are encoded anew for another."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.model.codec):
            if leaf.ndim:  # a few values of every parameter tell codecs apart
                digest.update(np.asarray(leaf.reshape(-1)[:64]).tobytes())
        return digest.hexdigest()[:16]


class ReplyStream:
    """An iterator over the chunks of one reply. The next beat is already under way while a chunk is handled."""

    def __init__(self, chroma: Chroma, prompt: Any, max_frames: int, sampling: Sampling, seed: int):
        self._chroma = chroma
        self._text = chroma.processor.tokenizer.stream_decoder()
        self._chunks: list[Chunk] = []
        self._finish = Finish.RUNNING
        self._state = runtime.begin(chroma.model, prompt, max_frames, [sampling], [seed])
        self._next: Beat | None = None
        self._dispatch()

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> Chunk:
        if self._next is None:
            raise StopIteration
        out, self._next = self._next, None
        # JAX runs asynchronously: the device works on the next beat while this one is fetched and played.
        self._dispatch()
        out = jax.device_get(out)
        self._finish = Finish(int(out.finish[0]))
        valid = out.frame_valid[0]
        tokens = out.token[:1] if out.token_valid[0] else out.token[:0]
        text = self._text.push(tokens)
        if self._finish != Finish.RUNNING:
            text += self._text.finish()
            self._next = self._state = None
        samples = self._chroma.config.codec.frame_samples * int(valid.sum())
        chunk = Chunk(text, out.samples[0, :samples], tokens, out.frames[0][valid])
        self._chunks.append(chunk)
        return chunk

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is not yet made. Chunks already given stay given."""
        if self._finish == Finish.RUNNING:
            self._finish = Finish.CANCELLED
        self._next = self._state = None

    @property
    def finish_reason(self) -> str:
        """Why the reply ended; "running" until it has, "cancelled" after `close`."""
        return runtime.finish_name(self._finish)

    def reply(self) -> Reply:
        """What has been given so far, as one reply; after the last chunk, exactly `Chroma.reply`'s."""
        return self._chroma.join(self._chunks, self.finish_reason)

    def _dispatch(self) -> None:
        self._state, self._next = runtime.beat(self._chroma.model, self._state)


def check_seed(seed: int) -> int:
    """The seed as an int. Raises ValueError for what is no seed."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {seed!r}")
    return int(seed)
