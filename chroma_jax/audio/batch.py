"""Rows of prompts -> one batch: the arrays of the functional interface, checked, and padded to a few static sizes.

Axes: B rows, L question tokens, A sounds per row, F mel bins, M mel frames, C encoder chunks, P transcript tokens, N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from chroma_jax.audio.mel import mel_chunks
from chroma_jax.audio.prompt import Question, VoiceArrays, check_question_length, check_voice_length
from chroma_jax.config import ChromaConfig

# Smallest padded sizes. A new size means a new compilation, so there are few, and none is very small.
_FIRST_IDS, _FIRST_TRANSCRIPT, _FIRST_VOICE_FRAMES = 64, 32, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A batch in the layout of PyTorch's processor: any padding, told by masks.

    A row of `mel` without valid frames has no sound. Several sounds per row take an axis A; mel [B, A, F, M] and mel_mask [B, A, M].
    A mask that is None counts everything as valid.
    """

    question_ids: np.ndarray  # [B, L] int, one audio placeholder per feature of the row's sounds
    voice_ids: np.ndarray  # [B, P] int, transcript
    voice_wave: np.ndarray  # [B, 1, N] or [B, N] float, at the codec's rate
    question_mask: np.ndarray | None = None  # [B, L] bool or 0/1
    mel: np.ndarray | None = None  # [B, F, M] or [B, A, F, M] float; None: no row has sound
    mel_mask: np.ndarray | None = None  # [B, M] or [B, A, M] bool or 0/1
    voice_mask: np.ndarray | None = None  # [B, P] bool or 0/1
    voice_lengths: np.ndarray | None = None  # [B] int, samples


class PromptBatch(NamedTuple):
    """Right-padded rows of static sizes; beyond each row's lengths stand zeros (pad tokens in the ids)."""

    ids: np.ndarray  # [B, L] int32
    lengths: np.ndarray  # [B] int32
    chunks: np.ndarray  # [B, C, chunk_frames, F] float32, all sounds of a row one after another
    chunk_lengths: np.ndarray  # [B, C] int32 valid mel frames, 0 for unused chunks
    voice_ids: np.ndarray  # [B, P] int32
    voice_id_lengths: np.ndarray  # [B] int32
    voice_wave: np.ndarray  # [B, N] float32, N in whole codec frames
    voice_lengths: np.ndarray  # [B] int32 samples


def pack(rows: Sequence[tuple[Question, VoiceArrays]]) -> Inputs:
    """One batch of several requests. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    questions, voices = [q for q, _ in rows], [v for _, v in rows]
    ids, id_mask = _pad([q.ids for q in questions], np.int32)
    voice_ids, voice_mask = _pad([v.ids for v in voices], np.int32)
    wave, _ = _pad([v.wave for v in voices], np.float32)
    mel = mel_mask = None
    most = max(len(q.mels) for q in questions)
    if most:
        clips = [mel for q in questions for mel in q.mels]
        frames = max(map(len, clips))
        mel = np.zeros((len(rows), most, clips[0].shape[1], frames), np.float32)
        mel_mask = np.zeros((len(rows), most, frames), bool)
        for row, question in enumerate(questions):
            for i, clip in enumerate(question.mels):
                mel[row, i, :, : len(clip)] = clip.T
                mel_mask[row, i, : len(clip)] = True
        if most == 1:
            mel, mel_mask = mel[:, 0], mel_mask[:, 0]
    return Inputs(
        question_ids=ids,
        question_mask=id_mask,
        mel=mel,
        mel_mask=mel_mask,
        voice_ids=voice_ids,
        voice_mask=voice_mask,
        voice_wave=wave[:, None],
        voice_lengths=np.array([len(v.wave) for v in voices], np.int32),
    )


def normalize_inputs(config: ChromaConfig, inputs: Inputs | Mapping[str, Any]) -> PromptBatch:
    """Checks a batch and lays every row out from the left, in static sizes.

    Only what the masks call valid counts, wherever it stands in its row, so a row's arrays (up to their lengths) are the same in any
    batch and under any padding. Raises ValueError naming field and row: unknown or missing fields, shapes that disagree, ids outside
    the vocabulary, values that are not finite, empty rows, a number of audio placeholders other than the number of
    features that the row's sounds give, and prompts longer than the contexts.
    """
    rows = [
        _check_row(config, i, row)
        for i, row in enumerate(_split_rows(_read_fields(inputs), config))
    ]
    limits, frame = config.backbone.llama.max_positions, config.codec.frame_samples
    batch = len(rows)
    size, num_chunks = question_shape(
        config, max(len(r.ids) for r in rows), max(len(r.chunk_lengths) for r in rows)
    )
    transcript = bucket(
        max(len(r.voice_ids) for r in rows), bucket_sizes(_FIRST_TRANSCRIPT, limits)
    )
    voice_frames = max(-(-len(r.wave) // frame) for r in rows)
    samples = frame * bucket(voice_frames, bucket_sizes(_FIRST_VOICE_FRAMES, limits))
    audio = config.reasoner.audio
    out = PromptBatch(
        ids=np.full((batch, size), config.reasoner.pad_token_id, np.int32),
        lengths=np.array([len(r.ids) for r in rows], np.int32),
        chunks=np.zeros((batch, num_chunks, audio.chunk_frames, audio.num_mel_bins), np.float32),
        chunk_lengths=np.zeros((batch, num_chunks), np.int32),
        voice_ids=np.full((batch, transcript), config.reasoner.pad_token_id, np.int32),
        voice_id_lengths=np.array([len(r.voice_ids) for r in rows], np.int32),
        voice_wave=np.zeros((batch, samples), np.float32),
        voice_lengths=np.array([len(r.wave) for r in rows], np.int32),
    )
    for i, row in enumerate(rows):
        out.ids[i, : len(row.ids)] = row.ids
        if len(row.chunk_lengths):
            out.chunks[i, : len(row.chunks)] = row.chunks
            out.chunk_lengths[i, : len(row.chunk_lengths)] = row.chunk_lengths
        out.voice_ids[i, : len(row.voice_ids)] = row.voice_ids
        out.voice_wave[i, : len(row.wave)] = row.wave
    return out


def question_shape(config: ChromaConfig, tokens: int, chunks: int) -> tuple[int, int]:
    """The static size that questions of so many tokens and encoder chunks are padded to."""
    limit = config.reasoner.text.max_positions
    # Never zero chunks: text alone then runs the same program as one short sound.
    return bucket(tokens, bucket_sizes(_FIRST_IDS, limit)), _power_of_two(chunks)


def bucket(n: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `n`. Raises ValueError beyond the last."""
    for size in sizes:
        if n <= size:
            return size
    raise ValueError(f"length {n} is beyond the largest size {sizes[-1]}")


def bucket_sizes(first: int, limit: int) -> tuple[int, ...]:
    """`first` times 1, 2, 3, 4, 6, 8, 12, 16, ... up to `limit`, which is the last."""
    sizes, power = [], first
    while power < limit:
        sizes += [power] if power == first else [power, power + power // 2]
        power *= 2
    return (*(s for s in sizes if s < limit), limit)


class _Row(NamedTuple):
    """What is valid in one row."""

    ids: np.ndarray  # [L]
    mels: list[np.ndarray]  # [M, F] each
    voice_ids: np.ndarray  # [P]
    wave: np.ndarray  # [N]
    chunks: np.ndarray | None = None  # [C, chunk_frames, F]
    chunk_lengths: np.ndarray | None = None  # [C]


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _pad(rows: Sequence[np.ndarray], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded [B, longest] and its mask."""
    longest = max(map(len, rows))
    out = np.zeros((len(rows), longest), dtype)
    mask = np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
        mask[i, : len(row)] = True
    return out, mask


def _read_fields(inputs: Inputs | Mapping[str, Any]) -> dict[str, np.ndarray | None]:
    """The fields as arrays, each of its kind (integers, floats, masks) and rank."""
    names = [field.name for field in dataclasses.fields(Inputs)]
    if isinstance(inputs, Inputs):
        values = {name: getattr(inputs, name) for name in names}
    elif isinstance(inputs, Mapping):
        unknown = sorted(set(map(str, inputs)) - set(names))
        if unknown:
            raise ValueError(f"unknown inputs {', '.join(unknown)}; wanted {', '.join(names)}")
        values = {name: inputs.get(name) for name in names}
    else:
        raise ValueError(
            f"inputs must be an Inputs or a mapping with its fields, got {type(inputs).__name__}"
        )
    ranks = {
        "question_ids": (2,),
        "question_mask": (2,),
        "mel": (3, 4),
        "mel_mask": (2, 3),
        "voice_ids": (2,),
        "voice_mask": (2,),
        "voice_wave": (2, 3),
        "voice_lengths": (1,),
    }
    fields = {}
    for name, value in values.items():
        if value is None:
            if name in ("question_ids", "voice_ids", "voice_wave"):
                raise ValueError(f"missing input {name}")
            fields[name] = None
            continue
        array = np.asarray(value)
        if array.ndim not in ranks[name]:
            wanted = " or ".join(map(str, ranks[name]))
            raise ValueError(f"{name} must have {wanted} axes, got shape {list(array.shape)}")
        if name.endswith("_mask"):
            if (
                not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool)
                or not np.isin(array, (0, 1)).all()
            ):
                raise ValueError(f"{name} must be bool or hold 0 and 1, got {array.dtype}")
            array = array.astype(bool)
        elif name in ("mel", "voice_wave"):
            # bfloat16 arrays are no numpy floats, but cast all the same.
            if array.dtype.kind in "biuUSOMmc":
                raise ValueError(f"{name} must be floats, got {array.dtype}")
            array = array.astype(np.float32)
        elif not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} must be integers, got {array.dtype}")
        fields[name] = array
    return fields


def _split_rows(fields: dict[str, np.ndarray | None], config: ChromaConfig) -> list[_Row]:
    """Checks that the shapes agree, and takes from each row what its masks call valid."""
    ids, voice_ids, wave = fields["question_ids"], fields["voice_ids"], fields["voice_wave"]
    if wave.ndim == 3:
        if wave.shape[1] != 1:
            raise ValueError(
                f"voice_wave must be [B, 1, N] or [B, N], got shape {list(wave.shape)}"
            )
        wave = wave[:, 0]
    batch = len(ids)
    if not batch:
        raise ValueError("question_ids has no rows")

    def mask(name: str, shape: tuple[int, ...]) -> np.ndarray:
        found = fields[name]
        if found is None:
            return np.ones(shape, bool)
        if found.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(found.shape)}")
        return found

    for name in ("voice_ids", "voice_wave", "mel", "voice_lengths"):
        if fields[name] is not None and len(fields[name]) != batch:
            raise ValueError(f"{name} has {len(fields[name])} rows, question_ids has {batch}")
    question_mask, voice_mask = (
        mask("question_mask", ids.shape),
        mask("voice_mask", voice_ids.shape),
    )
    mel, bins = fields["mel"], config.reasoner.audio.num_mel_bins
    if mel is None:
        if fields["mel_mask"] is not None:
            raise ValueError("mel_mask is given without mel")
        mel, mel_mask = np.zeros((batch, 0, bins, 0), np.float32), np.zeros((batch, 0, 0), bool)
    else:
        mel_mask = mask("mel_mask", (*mel.shape[:-2], mel.shape[-1]))
        if mel.ndim == 3:
            mel, mel_mask = mel[:, None], mel_mask[:, None]
    if mel.shape[2] != bins:
        raise ValueError(
            f"mel must have {bins} bins on its last axis but one, got shape {list(mel.shape)}"
        )
    lengths = fields["voice_lengths"]
    if lengths is None:
        lengths = np.full(batch, wave.shape[1])
    for i, length in enumerate(lengths):
        if not 1 <= length <= wave.shape[1]:
            raise ValueError(
                f"voice_lengths of row {i} must lie from 1 to {wave.shape[1]}, got {length}"
            )
    return [
        _Row(
            ids=ids[i][question_mask[i]],
            # A sound without valid frames is padding of the A axis.
            mels=[
                clip.T[valid]
                for clip, valid in zip(mel[i], mel_mask[i], strict=True)
                if valid.any()
            ],
            voice_ids=voice_ids[i][voice_mask[i]],
            wave=wave[i, : lengths[i]],
        )
        for i in range(batch)
    ]


def _check_row(config: ChromaConfig, i: int, row: _Row) -> _Row:
    """Checks the values of row `i` and cuts its sounds into chunks."""
    for name, ids in (("question_ids", row.ids), ("voice_ids", row.voice_ids)):
        if not len(ids):
            raise ValueError(f"{name} of row {i} has no valid tokens")
        outside = ids[(ids < 0) | (ids >= config.reasoner.vocab_size)]
        if len(outside):
            raise ValueError(
                f"{name} of row {i} has id {outside[0]} outside the vocabulary of {config.reasoner.vocab_size}"
            )
    for name, values in (("voice_wave", [row.wave]), ("mel", row.mels)):
        if not all(np.isfinite(v).all() for v in values):
            raise ValueError(f"{name} of row {i} has NaN or infinite values")
    audio = config.reasoner.audio
    placeholders = int((row.ids == config.reasoner.audio_token_id).sum())
    features = sum(audio.num_features(len(mel)) for mel in row.mels)
    if placeholders != features:
        raise ValueError(
            f"question_ids of row {i} has {placeholders} audio placeholders (token {config.reasoner.audio_token_id}), "
            f"but its mel gives {features} features"
        )
    check_question_length(config, len(row.ids), name=f"question_ids of row {i}")
    check_voice_length(config, len(row.voice_ids), len(row.wave), name=f"voice_wave of row {i}")
    chunks, chunk_lengths = mel_chunks(row.mels, audio.chunk_frames)
    return row._replace(chunks=chunks, chunk_lengths=chunk_lengths)
