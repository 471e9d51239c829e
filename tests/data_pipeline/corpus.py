"""A small corpus cut from a recording, and what the tests of this directory share."""

import dataclasses
import json

import numpy as np

from chroma_jax.audio.wav import save_wav
from chroma_jax.data import metadata, records
from chroma_jax.data.prepare import Options

SPEAKERS = ["ada", "ada", "bob", "ada", "bob", "eve", None, "bob", "ada", "eve"]
WORDS = [
    "and",
    "mister",
    "john",
    "dashwood",
    "had",
    "then",
    "leisure",
    "to",
    "consider",
    "how",
    "much",
    "there",
    "might",
    "be",
]
# Small batches: few, small programs.
OPTIONS = Options(max_voice_seconds=1.6, max_voice_tokens=40, shard_size=3, batch_seconds=11.0, batch_tokens=512, threads=2)  # fmt: skip


def write_corpus(folder, clip, count=10, **changes):
    """`count` rows of pieces of a recording; `changes` maps a row's number ("row3") to its changed keys."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        length = 6000 + 4700 * (i % 5) + 311 * i  # 0.25 to 1.2 s
        start = (9001 * i) % (len(clip) - length)
        save_wav(folder / f"a{i}.wav", clip[start : start + length], 24000)
        row = {
            "id": f"r{i}",
            "answer_text": " ".join(WORDS[i % 7 : i % 7 + 2 + i % 3]),
            "answer_audio": f"a{i}.wav",
        }
        if SPEAKERS[i % 10]:
            row["speaker"] = SPEAKERS[i % 10]
        if i % 3 == 1:
            row["question_text"] = f"What is number {i}?"
        else:
            save_wav(folder / f"q{i}.wav", clip[::-1][start : start + 16000 + 999 * i], 24000)
            row["question"] = f"q{i}.wav"
        if i == 6:
            row |= {"voice_audio": "a2.wav", "voice_text": "then leisure"}
        if i == 8:
            row["turns"] = [
                {"role": "user", "audio": "q0.wav"},
                {"role": "assistant", "text": "Yes?"},
            ]
        row |= changes.get(f"row{i}", {})
        rows.append({key: value for key, value in row.items() if value != "<none>"})
    manifest = folder / "data.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def read_records(directory):
    """All records of a dataset, in order."""
    from array_record.python.array_record_module import ArrayRecordReader

    out = []
    for shard in metadata.read_metadata(directory).shards:
        reader = ArrayRecordReader(str(directory / shard["name"]))
        out += [records.decode(bytes(data)) for data in reader.read_all()]
        reader.close()
    return out


def same(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), field.name
        else:
            assert x == y, field.name
