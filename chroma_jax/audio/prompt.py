"""Conversations and voices of the outside world -> the arrays that the model takes.

Axes: L question tokens, P transcript tokens, N samples, M mel frames, F mel bins.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from chroma_jax.audio.chat import Audio, Conversation, Turn, chat_segments, read_conversation
from chroma_jax.audio.mel import MelConfig, log_mel
from chroma_jax.audio.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, tiny_tokenizer
from chroma_jax.audio.wav import AudioError, AudioSource, load_audio
from chroma_jax.config import ChromaConfig
from chroma_jax.messages import shown

DEFAULT_SYSTEM_PROMPT = (
    "You are Chroma, an advanced virtual human created by the FlashLabs. You possess the ability to understand "
    "auditory inputs and generate both text and speech."
)
_SPOKEN = (np.zeros(1, np.float32), 16000)  # stands for the sound of an open question; never read
_SILENCE = 1e-4  # peak below which a voice is taken to be silent
# A vocabulary this small belongs to a model for tests, which comes without a tokenizer.
_TEST_VOCABULARY = 8192
# Text and audio of the first beat: without room for them a voice leaves nothing to say.
_FIRST_BEAT = 4


class Question(NamedTuple):
    """A conversation up to the point where the assistant speaks."""

    ids: np.ndarray  # [L] int32, with one audio placeholder per feature
    mels: list[np.ndarray]  # one [M, F] float32 per sound, in order


class OpenQuestion(NamedTuple):
    """A conversation around a sound that is still being spoken."""

    before: Question
    after: np.ndarray  # [L'] int32, what follows the sound


class VoiceArrays(NamedTuple):
    """A reference voice."""

    ids: np.ndarray  # [P] int32, the transcript
    wave: np.ndarray  # [N] float32 at the codec's rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Makes the arrays of one request; `load` reads a checkpoint's own settings.

    Raises ValueError when tokenizer or mel settings do not belong to `config`.
    """

    config: ChromaConfig
    tokenizer: Tokenizer
    mel: MelConfig = dataclasses.field(default_factory=MelConfig)
    system_prompt: str = DEFAULT_SYSTEM_PROMPT

    def __post_init__(self):
        bins = self.config.reasoner.audio.num_mel_bins
        if self.mel.num_mel_bins != bins:
            raise ValueError(
                f"the preprocessor makes {self.mel.num_mel_bins} mel bins, the model's num_mel_bins is {bins}"
            )
        reasoner = self.config.reasoner
        for token, key, want in (
            ("<|im_end|>", "im_end_token_id", self.config.im_end_token_id),
            ("<|AUDIO|>", "audio_token_index", reasoner.audio_token_id),
            ("<|audio_bos|>", "audio_start_token_id", reasoner.audio_start_token_id),
            ("<|audio_eos|>", "audio_end_token_id", reasoner.audio_end_token_id),
        ):
            got = self.tokenizer.token_id(token)
            if got not in (None, want):
                raise ValueError(
                    f"{self.tokenizer.name}: {token} is token {got}, but {key} of the model is {want}"
                )

    @classmethod
    def load(
        cls,
        config: ChromaConfig,
        directory: str | os.PathLike | None = None,
        *,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
    ) -> Processor:
        """Reads tokenizer, chat template and preprocessor settings of a checkpoint directory.

        A model with a vocabulary of test size gets `tiny_tokenizer` where there is none. Raises ValueError naming the
        directory when a real one lacks its tokenizer.
        """
        tiny = config.reasoner.vocab_size <= _TEST_VOCABULARY
        if tiny and (directory is None or not has_tokenizer(directory)):
            tokenizer = tiny_tokenizer(config)
        elif directory is None:
            raise ValueError(
                "a tokenizer is needed: give the directory of a checkpoint that has one"
            )
        else:
            tokenizer = load_tokenizer(directory)
        mel = MelConfig(num_mel_bins=config.reasoner.audio.num_mel_bins)
        if directory is not None:
            mel = MelConfig.load(directory, default=mel)
        return cls(config=config, tokenizer=tokenizer, mel=mel, system_prompt=system_prompt)

    def question(self, turns: Conversation, system_prompt: str | None = None) -> Question:
        """Arrays of a conversation, ending with the assistant's header.

        `turns` is one spoken question (a path, bytes, or (samples, rate)) or a list of `Turn`s or of message dictionaries
        (see `chat`). `system_prompt` replaces the processor's own; "" leaves it out; a system turn wins over both.
        Raises ValueError (AudioError for sound) naming what is wrong with which turn, and for a question beyond the context.
        """
        messages = read_conversation(turns, self._system_prompt(system_prompt))
        mels = [self._mel(audio) for message in messages for audio in message.audios]
        ids = self._question_ids(chat_segments(messages, self.tokenizer, self.config), mels)
        check_question_length(self.config, len(ids))
        return Question(ids, mels)

    def open_question(
        self, history: Sequence[Turn | Mapping], text: str | None, system_prompt: str | None = None
    ) -> OpenQuestion:
        """What stands around a sound that is still being spoken: `question([*history, Turn(audio=sound, text=text)])` without it.

        Raises ValueError as `question`, and for a history that is no list of turns.
        """
        if not isinstance(history, list | tuple):
            raise ValueError(
                f"history must be a list of turns, got {type(history).__name__}: what is being spoken is pushed"
            )
        turns = [*history, Turn(audio=_SPOKEN, text=text)]
        messages = read_conversation(turns, self._system_prompt(system_prompt))
        heard = [audio for message in messages for audio in message.audios][:-1]
        mels = [self._mel(audio) for audio in heard]
        segments = chat_segments(messages, self.tokenizer, self.config)
        audio_id = self.config.reasoner.audio_token_id
        spoken = max(i for i, segment in enumerate(segments) if segment == audio_id)
        before = self._question_ids(segments[:spoken], mels)
        after = self._question_ids(segments[spoken + 1 :], [])
        check_question_length(self.config, len(before) + 1 + len(after))
        return OpenQuestion(Question(before, mels), after)

    def _system_prompt(self, given: str | None) -> str:
        if given is not None and not isinstance(given, str):
            raise ValueError(f"system_prompt must be text, got {shown(given)}")
        return self.system_prompt if given is None else given

    def _mel(self, audio: Audio) -> np.ndarray:
        wave = load_audio(audio.source, self.mel.sampling_rate, name=audio.name)
        mel = log_mel(wave, self.mel, name=audio.name)
        self.check_heard(len(mel), len(wave), audio.name)
        return mel

    def check_heard(self, num_frames: int, num_samples: int, name: str) -> None:
        """Raises AudioError when a sound of so many mel frames gives no feature."""
        if self.config.reasoner.audio.num_features(num_frames) < 1:
            seconds = num_samples / self.mel.sampling_rate
            raise AudioError(f"{name}: {seconds:.3f} s is too short to be heard")

    def _question_ids(self, segments: list[int | str], mels: list[np.ndarray]) -> np.ndarray:
        """Tokens of chat segments, one placeholder for each feature of the sounds."""
        counts = iter([self.config.reasoner.audio.num_features(len(mel)) for mel in mels])
        repeated: list[int | str] = []
        for segment in segments:
            is_audio = segment == self.config.reasoner.audio_token_id
            repeated += [segment] * (next(counts) if is_audio else 1)
        return self._ids(self.tokenizer.encode_segments(repeated), "question")

    def voice_arrays(self, audio: AudioSource, transcript: str) -> VoiceArrays:
        """Arrays of a reference voice: sound, and exactly what it says (encoded verbatim, with any white space).

        Raises ValueError (AudioError for sound) for a missing transcript or sound, a clip shorter than one frame, and
        a voice that leaves no room for a reply.
        """
        if audio is None:
            raise ValueError(
                "a voice needs its sound as well as its transcript, got a transcript without audio"
            )
        rate, frame = self.config.codec.sampling_rate, self.config.codec.frame_samples
        if not isinstance(transcript, str) or not transcript.strip():
            raise ValueError(
                f"a voice needs its transcript, what the reference recording says, got {shown(transcript)}"
            )
        name = os.fspath(audio) if isinstance(audio, str | os.PathLike) and audio else "voice"
        wave = load_audio(audio, rate, name=name)
        if len(wave) < frame:
            raise AudioError(
                f"{name}: {len(wave) / rate:.3f} s is too short for a voice, one frame is {frame / rate:g} s"
            )
        if np.abs(wave).max() < _SILENCE:
            logging.warning("%s: the voice is silent", name)
        ids = self._ids(self.tokenizer.encode(transcript), "transcript")
        check_voice_length(self.config, len(ids), len(wave), name=name)
        return VoiceArrays(ids, wave)

    def _ids(self, ids: list[int], what: str) -> np.ndarray:
        vocab_size = self.config.reasoner.vocab_size
        if ids and max(ids) >= vocab_size:
            raise ValueError(
                f"{self.tokenizer.name}: the {what} has token {max(ids)}, but the model's vocab_size is {vocab_size}"
            )
        return np.array(ids, np.int32)


def check_question_length(config: ChromaConfig, num_ids: int, *, name: str = "question") -> None:
    """Raises ValueError when a question of `num_ids` tokens leaves the Reasoner no position to answer in."""
    limit = config.reasoner.text.max_positions - 1
    if num_ids > limit:
        raise ValueError(
            f"{name} too long: {num_ids} tokens (text, and 25 a second of sound), at most {limit} fit"
        )


def check_voice_length(
    config: ChromaConfig, num_ids: int, num_samples: int, *, name: str = "voice"
) -> None:
    """Raises ValueError when the Backbone's prompt of a voice (markers, transcript, frames) leaves no room for a reply."""
    codec, limit = config.codec, config.backbone.llama.max_positions
    # text_start, text_end and the zero vector beside transcript and frames.
    others = num_ids + 3 + _FIRST_BEAT
    frames = -(-num_samples // codec.frame_samples)
    if others + frames > limit:
        fit = max(0, limit - others) * codec.frame_samples / codec.sampling_rate
        raise AudioError(
            f"{name}: voice longer than the context allows: {num_samples / codec.sampling_rate:.1f} s of sound and "
            f"{num_ids} transcript tokens, {fit:.1f} s would fit"
        )
