"""What comes out: the pieces in which a reply is made, the whole, and a batch of them as arrays.

Axes: B batch, T frames, Q codebooks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from absl import logging

from chroma_jax.audio.tokenizer import Tokenizer
from chroma_jax.audio.wav import save_wav
from chroma_jax.config import ChromaConfig
from chroma_jax.engine.state import Beat, Finish


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
    # "stop": the model ended; "length": max_seconds; "context": the context is full; "cancelled";
    # "running": there will be more
    finish_reason: str

    @property
    def seconds(self) -> float:
        """Length of the sound."""
        return len(self.audio) / self.sample_rate

    def save(self, path: str | os.PathLike) -> None:
        """Writes a 16-bit WAV, atomically. Raises ValueError when the path cannot be written."""
        save_wav(path, self.audio, self.sample_rate)


def join(
    config: ChromaConfig, tokenizer: Tokenizer, chunks: Sequence[Chunk], finish_reason: str
) -> Reply:
    """Chunks of one stream, in order, as one reply."""

    def all_of(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(getattr(chunk, name) for chunk in chunks)])

    rate = config.codec.sampling_rate
    tokens = all_of("tokens", np.zeros(0, np.int32))
    audio = all_of("audio", np.zeros(0, np.float32))
    if finish_reason == "context":
        logging.warning("the reply was cut after %.1f s: the context is full", len(audio) / rate)
    return Reply(
        text=tokenizer.decode(tokens),
        audio=audio,
        sample_rate=rate,
        frames=all_of("frames", np.zeros((0, config.num_codebooks), np.int32)),
        tokens=tokens,
        finish_reason=finish_reason,
    )


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` gives, batch first; entries beyond a row's own count hold the pad id."""

    frames: np.ndarray  # [B, T, Q] int32
    num_frames: np.ndarray  # [B] int32
    text_tokens: np.ndarray  # [B, T'] int32, the final im_end included
    num_text_tokens: np.ndarray  # [B] int32
    audio: list[np.ndarray]  # B arrays float32 [num_frames * frame_samples], empty without audio
    finish_reason: list[str]  # "stop", "length" or "context"


def collect(config: ChromaConfig, outs: Sequence[Beat], audio: bool) -> Generated:
    """What `beat.decode` gave in one or several calls, on the host, as arrays per row."""

    def joined(name: str) -> np.ndarray:  # [beats, B, ...] -> [B, beats, ...]
        return np.concatenate([getattr(out, name) for out in outs], axis=0).swapaxes(0, 1)

    frames, valid = joined("frames"), joined("frame_valid")
    batch, books = frames.shape[0], frames.shape[-1]
    frames, valid = frames.reshape(batch, -1, books), valid.reshape(batch, -1)
    num_frames = valid.sum(axis=1).astype(np.int32)
    tokens, token_valid = joined("token"), joined("token_valid")
    num_tokens = token_valid.sum(axis=1).astype(np.int32)
    sounds: list[np.ndarray] = []
    if audio:
        per_frame = config.codec.frame_samples
        sounds = [
            s.reshape(-1)[: n * per_frame]
            for s, n in zip(joined("samples"), num_frames, strict=True)
        ]
    # Valid frames, and valid tokens, are a prefix of each row.
    frames = np.where(valid[..., None], frames, config.codebook_pad_token_id)
    tokens = np.where(token_valid, tokens, config.reasoner.pad_token_id)
    return Generated(
        frames=frames[:, : num_frames.max(initial=0)].astype(np.int32),
        num_frames=num_frames,
        text_tokens=tokens[:, : num_tokens.max(initial=0)].astype(np.int32),
        num_text_tokens=num_tokens,
        audio=sounds,
        finish_reason=[finish_name(f) for f in outs[-1].finish[-1]],
    )


def finish_name(finish: int) -> str:
    """ "stop", "length", "context", ... of a Finish."""
    return Finish(int(finish)).name.lower()
