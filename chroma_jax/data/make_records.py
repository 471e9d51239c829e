"""Rows with their sounds -> dialogue records: codes, and Reasoner states where they are wanted, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from chroma_jax.audio.prompt import Processor
from chroma_jax.data.encode import Asked, Encoder
from chroma_jax.data.manifest import Row, Sounds
from chroma_jax.data.records import Record


def make_records(
    processor: Processor,
    encoder: Encoder,
    rows: Sequence[tuple[Row, Sounds]],
    hidden_dtype: str | None,
) -> list[Record]:
    """One record per row, in order.

    Args:
      processor: what the rows went through.
      encoder: runs the models.
      rows: of a manifest, with their sounds.
      hidden_dtype: of the Reasoner's states; None: the records hold the question's sound instead.
    """
    voiced = [i for i, (_, sounds) in enumerate(rows) if len(sounds.voice)]
    codes = encoder.codes(
        [sounds.answer for _, sounds in rows] + [rows[i][1].voice for i in voiced]
    )
    voices = dict(zip(voiced, codes[len(rows) :], strict=True))
    hidden: list[np.ndarray | None] = [None] * len(rows)
    if hidden_dtype is not None:
        states = encoder.hidden([Asked(s.question, s.text) for _, s in rows])
        kind = np.dtype(getattr(ml_dtypes, hidden_dtype, None) or hidden_dtype)
        hidden = [h.astype(kind) for h in states]
    return [
        _record(processor, row, sounds, codes[i], voices.get(i), hidden[i])
        for i, (row, sounds) in enumerate(rows)
    ]


def _record(
    processor: Processor,
    row: Row,
    sounds: Sounds,
    codes: np.ndarray,
    voice: np.ndarray | None,
    hidden: np.ndarray | None,
) -> Record:
    config, mel = processor.config, processor.mel
    books = config.num_codebooks
    kind = np.int16 if config.backbone.vocab_size <= 2**15 else np.int32
    stop = np.full((1, books), config.codebook_eos_token_id, kind)
    mels = sounds.question.mels if hidden is None else []
    heard = sum(len(clip) for clip in sounds.question.mels) * mel.hop_length / mel.sampling_rate
    bins = config.reasoner.audio.num_mel_bins
    rate = config.codec.sampling_rate
    return Record(
        id=row.id,
        line=row.line,
        speaker=row.speaker,
        language=row.language,
        question_seconds=float(heard),
        answer_seconds=len(sounds.answer) / rate,
        question_ids=sounds.question.ids,
        mel=np.concatenate([np.zeros((0, bins), np.float32), *mels]),
        mel_lengths=np.array([len(clip) for clip in mels], np.int32),
        text=sounds.text,
        codes=np.concatenate([codes.astype(kind), stop]),
        reference_ids=sounds.reference_ids,
        reference_frames=sounds.reference_frames,
        voice_ids=sounds.voice_ids,
        voice_codes=np.zeros((0, books), kind) if voice is None else voice.astype(kind),
        hidden=hidden,
    )
