"""What the data pipeline hands to the training step.

Axes: B batch, N prompt tokens (answer included), C audio chunks, L answer tokens, T frames, Q codebooks, P transcript
tokens, F voice frames, D Reasoner width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from chroma_jax.schedule import Dialogue

Array = Any  # numpy on the host, jax.Array on the devices


class Batch(NamedTuple):
    """Dialogues, right-padded to static sizes.

    With `hidden`, prompt_ids, prompt_lengths, chunks and chunk_lengths are not read and may be of size 1.
    """

    prompt_ids: Array  # [B, N] int32, the question's prompt up to the assistant header, then the answer's tokens
    prompt_lengths: Array  # [B] int32, tokens before the answer
    chunks: Array  # [B, C, chunk_frames, mel] float32, the question's audio as encoder chunks
    chunk_lengths: Array  # [B, C] int32, mel frames of each, 0 where there is none
    hidden: (
        Array | None
    )  # [B, L, D], the Reasoner's state before each answer token, where precomputed
    text: Array  # [B, L] int32, answer tokens, the final im_end included
    text_lengths: Array  # [B] int32
    frames: Array  # [B, T, Q] int32, answer codes, the all-zero stop frame included
    frame_lengths: Array  # [B] int32
    voice_ids: Array  # [B, P] int32, transcript of the reference voice
    voice_id_lengths: Array  # [B] int32
    voice_frames: Array  # [B, F, Q] int32, its codes
    voice_frame_lengths: Array  # [B] int32
    record_ids: Array | None  # [B] int64, which records these are; stays on the host

    @property
    def rows(self) -> int:
        """B."""
        return self.frames.shape[0]

    def dialogue(self, hidden: Array) -> Dialogue:
        """The same as teacher forcing wants it, with the Reasoner's states [B, L, D]."""
        return Dialogue(
            voice_ids=self.voice_ids,
            voice_id_lengths=self.voice_id_lengths,
            voice_frames=self.voice_frames,
            voice_frame_lengths=self.voice_frame_lengths,
            hidden=hidden,
            text=self.text,
            text_lengths=self.text_lengths,
            frames=self.frames,
            frame_lengths=self.frame_lengths,
        )

    def needed(self) -> Batch:
        """Without what the step does not read: those leaves become None, so that they are not sent to the devices."""
        batch = self._replace(record_ids=None)
        if batch.hidden is None:
            return batch
        return batch._replace(prompt_ids=None, prompt_lengths=None, chunks=None, chunk_lengths=None)


_RANKS = {
    "prompt_ids": 2, "prompt_lengths": 1, "chunks": 4, "chunk_lengths": 2, "hidden": 3, "text": 2, "text_lengths": 1,
    "frames": 3, "frame_lengths": 1, "voice_ids": 2, "voice_id_lengths": 1, "voice_frames": 3,
    "voice_frame_lengths": 1, "record_ids": 1,
}  # fmt: skip


def check(batch: Batch) -> None:
    """Raises ValueError naming the field whose number of axes or rows does not fit the others."""
    for name, array in batch._asdict().items():
        if array is None:
            continue
        shape = np.shape(array)
        if len(shape) != _RANKS[name] or shape[0] != batch.rows:
            raise ValueError(
                f"batch field {name} has shape {shape}; it must have {_RANKS[name]} axes and {batch.rows} rows, as frames"
            )
    if batch.hidden is None and batch.prompt_ids is None:
        raise ValueError("a batch needs hidden (precomputed Reasoner states) or prompt_ids")
