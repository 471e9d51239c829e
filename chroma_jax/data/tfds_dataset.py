"""The prepared records as a `tensorflow-datasets` dataset, in array_record format: neither writing nor reading needs TensorFlow.

    builder = ChromaDialogues(records={"train": "data/train", "validation": "data/heldout"}, data_dir="tfds")
    builder.download_and_prepare()
    source = tfds.data_source("chroma_dialogues", split="train[:90%]", data_dir="tfds")   # random access, for grain and others
    record = record_of(source[0])

Missing names are empty strings, missing arrays have length 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds

from chroma_jax import paths
from chroma_jax.data import metadata as md
from chroma_jax.data import records
from chroma_jax.data.records import Record

# Arrays of two axes lie flat, their width beside them: tfds loses the shape of those that are empty.
_ARRAYS = {
    "question_ids": np.int32,
    "mel": np.float32,
    "mel_lengths": np.int32,
    "text": np.int32,
    "codes": np.int32,
    "reference_ids": np.int32,
    "voice_ids": np.int32,
    "voice_codes": np.int32,
    "hidden": np.float32,  # holds bfloat16 and float16 exactly
}
_WIDTHS = {
    "mel": "num_mel_bins",
    "codes": "num_codebooks",
    "voice_codes": "num_codebooks",
    "hidden": "hidden_size",
}
_NUMBERS = {
    "line": np.int64,
    "reference_frames": np.int64,
    "num_mel_bins": np.int64,
    "num_codebooks": np.int64,
    "hidden_size": np.int64,  # 0 without hidden states
    "question_seconds": np.float64,
    "answer_seconds": np.float64,
}
# codes_dtype and hidden_dtype: what the record has them in.
_TEXTS = ("id", "speaker", "language", "codes_dtype", "hidden_dtype")


class ChromaDialogues(tfds.core.GeneratorBasedBuilder):
    """Spoken dialogues for Chroma: question, answer text, answer codes, reference voice.

    Args:
      records: of each split, the directory that `chroma_jax.prepare` made. Only `download_and_prepare` needs it.
      **kwargs: as for every tfds builder (data_dir, ...).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: Mapping[str, str] = {"1.0.0": "First version."}

    def __init__(self, *, records: Mapping[str, str | os.PathLike] | None = None, **kwargs: Any):
        self._records = dict(records or {})
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            name: tfds.features.Tensor(shape=(None,), dtype=dtype)
            for name, dtype in _ARRAYS.items()
        }
        features |= {
            # Unless they are bytes, tfds rounds all floats to single precision.
            name: tfds.features.Tensor(
                shape=(), dtype=dtype, encoding="bytes" if dtype is np.float64 else "none"
            )
            for name, dtype in _NUMBERS.items()
        }
        features |= {name: tfds.features.Text() for name in _TEXTS}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Spoken dialogues, prepared by chroma_jax: token ids, log-mel features, Mimi codes.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        if not self._records:
            raise ValueError(
                "ChromaDialogues needs records={split: directory} of datasets made by chroma_jax.prepare"
            )
        return {split: self._generate_examples(path) for split, path in self._records.items()}

    def _generate_examples(
        self, directory: str | os.PathLike
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        from array_record.python.array_record_module import ArrayRecordReader

        number = 0
        for shard in md.read_metadata(directory).shards:
            reader = ArrayRecordReader(os.path.join(paths.expand(directory), shard["name"]))
            for i in range(shard["records"]):
                yield number, example_of(records.decode(bytes(reader.read([i])[0])))
                number += 1
            reader.close()


def example_of(record: Record) -> dict[str, Any]:
    """The features of a record."""
    arrays = {name: getattr(record, name) for name in _ARRAYS}
    if record.hidden is None:
        arrays["hidden"] = np.zeros((0, 0), np.float32)
    example = {name: array.astype(_ARRAYS[name]).reshape(-1) for name, array in arrays.items()}
    example |= {width: arrays[name].shape[1] for name, width in _WIDTHS.items()}
    return example | {
        "id": record.id,
        "speaker": record.speaker or "",
        "language": record.language or "",
        "line": record.line,
        "reference_frames": record.reference_frames,
        "question_seconds": record.question_seconds,
        "answer_seconds": record.answer_seconds,
        "codes_dtype": record.codes.dtype.name,
        "hidden_dtype": "" if record.hidden is None else record.hidden.dtype.name,
    }


def record_of(example: Mapping[str, Any]) -> Record:
    """The record of an example that tfds reads: `example_of` undone."""
    texts = {name: _text(example[name]) for name in _TEXTS}
    arrays = {name: np.asarray(example[name], dtype) for name, dtype in _ARRAYS.items()}
    for name, width in _WIDTHS.items():
        size = int(example[width])
        arrays[name] = arrays[name].reshape(-1 if size else 0, size)
    for name in ("codes", "voice_codes"):
        arrays[name] = arrays[name].astype(texts["codes_dtype"])
    kind = texts["hidden_dtype"]
    hidden = arrays["hidden"].astype(getattr(ml_dtypes, kind, kind)) if kind else None
    return Record(
        id=texts["id"],
        speaker=texts["speaker"] or None,
        language=texts["language"] or None,
        line=int(example["line"]),
        reference_frames=int(example["reference_frames"]),
        question_seconds=float(example["question_seconds"]),
        answer_seconds=float(example["answer_seconds"]),
        **arrays | {"hidden": hidden},
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
