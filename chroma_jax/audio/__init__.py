"""Sound, text and conversations -> the model's arrays, and back to files. Everything here is numpy."""

from chroma_jax.audio.batch import Inputs, PromptBatch, bucket, normalize_inputs, pack
from chroma_jax.audio.chat import Turn
from chroma_jax.audio.mel import MelConfig, MelStream, log_mel, mel_chunks
from chroma_jax.audio.prompt import (
    DEFAULT_SYSTEM_PROMPT,
    OpenQuestion,
    Processor,
    Question,
    VoiceArrays,
)
from chroma_jax.audio.tokenizer import (
    PROCESSOR_FILES,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    tiny_tokenizer,
)
from chroma_jax.audio.wav import (
    AudioError,
    AudioSource,
    AudioStream,
    check_output,
    load_audio,
    save_wav,
)

__all__ = [
    "DEFAULT_SYSTEM_PROMPT",
    "PROCESSOR_FILES",
    "AudioError",
    "AudioSource",
    "AudioStream",
    "Inputs",
    "MelConfig",
    "MelStream",
    "OpenQuestion",
    "Processor",
    "PromptBatch",
    "Question",
    "StreamDecoder",
    "Tokenizer",
    "Turn",
    "VoiceArrays",
    "bucket",
    "check_output",
    "load_audio",
    "load_tokenizer",
    "log_mel",
    "mel_chunks",
    "normalize_inputs",
    "pack",
    "save_wav",
    "tiny_tokenizer",
]
