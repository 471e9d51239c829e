"""One dialogue as a record, and its bytes.

    magic  version  header length | header: JSON | arrays, one after another | CRC-32 of all before
    4 B    uint32   uint32                                                     uint32          (little-endian)

The header holds the scalars and name, dtype and shape of every array. Bytes round-trip exactly, and bytes that were damaged,
cut or written by another version are refused.

Axes: N question tokens, A sounds, M mel frames of all sounds, F mel bins, L answer tokens, T answer frames, R and P
transcript tokens, V voice frames, Q codebooks, D width.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib

import ml_dtypes
import numpy as np

from chroma_jax.audio.mel import mel_chunks
from chroma_jax.messages import shown

MAGIC, VERSION = b"CJXR", 1
_PREFIX, _CRC = struct.Struct("<4sII"), struct.Struct("<I")
_DTYPES = {
    name: np.dtype(getattr(np, name, None) or getattr(ml_dtypes, name))
    for name in ("int16", "int32", "float16", "bfloat16", "float32")
}
HIDDEN_DTYPES = ("bfloat16", "float16", "float32")
_SCALARS = {
    "id": str,
    "speaker": (str, type(None)),
    "language": (str, type(None)),
    "line": int,
    "question_seconds": float,
    "answer_seconds": float,
    "reference_frames": int,
}
_RANKS = {
    "question_ids": 1,
    "mel": 2,
    "mel_lengths": 1,
    "text": 1,
    "codes": 2,
    "reference_ids": 1,
    "voice_ids": 1,
    "voice_codes": 2,
    "hidden": 2,
}


class RecordError(ValueError):
    """Bytes that are no record, or fields that make none."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """A question, its spoken answer, and voices to speak it in.

    The first `reference_frames` frames of `codes`, which say `reference_ids`, serve other records of the same speaker as
    voice prompt. `voice_ids` and `voice_codes` are a reference recording of the row's own; both are empty where it has none.
    `mel` is empty where `hidden` stands in for hearing the question.
    """

    id: str
    line: int  # of the manifest, from 1
    speaker: str | None = None
    language: str | None = None
    question_seconds: float = 0.0  # of sound; 0 for a written question
    answer_seconds: float = 0.0
    question_ids: np.ndarray  # [N] int32, chat template up to and with the assistant's header
    mel: np.ndarray  # [M, F] float32, the sounds of the question one after another
    mel_lengths: np.ndarray  # [A] int32, mel frames of each
    text: np.ndarray  # [L] int32, answer tokens, im_end included
    codes: np.ndarray  # [T, Q] int16 or int32, answer frames, the all-zero stop frame included
    reference_ids: np.ndarray  # [R] int32
    reference_frames: int
    voice_ids: np.ndarray  # [P] int32
    voice_codes: np.ndarray  # [V, Q], dtype of codes
    hidden: np.ndarray | None = None  # [L, D], Reasoner state H_i before each answer token

    def __post_init__(self):
        for name, kind in _SCALARS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise RecordError(f"record {shown(self.id)}: {name} cannot be {shown(value)}")
        for name, rank in _RANKS.items():
            array = getattr(self, name)
            if array is None and name == "hidden":
                continue
            if not isinstance(array, np.ndarray) or array.ndim != rank:
                got = getattr(array, "shape", type(array).__name__)
                raise RecordError(
                    f"record {shown(self.id)}: {name} must have {rank} axes, got {got}"
                )
            if array.dtype not in _DTYPES.values():
                raise RecordError(f"record {shown(self.id)}: {name} cannot be {array.dtype}")
        for what, got, want in (
            ("the sum of mel_lengths", int(self.mel_lengths.sum()), len(self.mel)),
            ("the width of voice_codes", self.voice_codes.shape[1], self.codes.shape[1]),
            ("the length of hidden", len(self.text if self.hidden is None else self.hidden), len(self.text)),
        ):  # fmt: skip
            if got != want:
                raise RecordError(f"record {shown(self.id)}: {what} is {got}, it must be {want}")
        if not 0 <= self.reference_frames <= len(self.codes):
            raise RecordError(
                f"record {shown(self.id)}: reference_frames {self.reference_frames} of {len(self.codes)} frames"
            )

    def chunks(self, chunk_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """The question's sounds as encoder chunks [C, chunk_frames, F] float32 and their valid mel frames [C] int32."""
        return mel_chunks(np.split(self.mel, np.cumsum(self.mel_lengths)[:-1]), chunk_frames)


def encode(record: Record) -> bytes:
    """The record as bytes."""
    arrays = {name: getattr(record, name) for name in _RANKS}
    arrays = {n: np.ascontiguousarray(a) for n, a in arrays.items() if a is not None}
    header = json.dumps(
        {
            "scalars": {name: getattr(record, name) for name in _SCALARS},
            "arrays": [[name, a.dtype.name, a.shape] for name, a in arrays.items()],
        },
        separators=(",", ":"),
    ).encode()
    parts = [_PREFIX.pack(MAGIC, VERSION, len(header)), header]
    body = b"".join(parts + [a.tobytes() for a in arrays.values()])
    return body + _CRC.pack(zlib.crc32(body))


def decode(data: bytes) -> Record:
    """The record of `encode`'s bytes; arrays are read-only views of them. Raises RecordError for any others."""
    if len(data) < _PREFIX.size + _CRC.size:
        raise RecordError(f"{len(data)} bytes are no dialogue record")
    magic, version, header_size = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise RecordError(f"no dialogue record: starts with {magic!r}, wanted {MAGIC!r}")
    if version != VERSION:
        raise RecordError(f"dialogue record of version {version}, this program reads {VERSION}")
    end = len(data) - _CRC.size
    if zlib.crc32(memoryview(data)[:end]) != _CRC.unpack_from(data, end)[0]:
        raise RecordError("damaged dialogue record: its checksum does not match")
    try:
        at = _PREFIX.size + header_size
        header = json.loads(bytes(data[_PREFIX.size : at]))
        arrays = {}
        for name, dtype, shape in header["arrays"]:
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data, _DTYPES[dtype], count, at).reshape(shape)
            at += count * _DTYPES[dtype].itemsize
        if at != end:
            raise ValueError(f"{end - at} bytes too many")
        return Record(**header["scalars"], **arrays)
    except (ValueError, TypeError, KeyError) as e:
        if isinstance(e, RecordError):
            raise
        raise RecordError(f"damaged dialogue record: {e}") from e
