"""What is known of a whole dataset: dataset.json, which makes it complete, and index.npz, the lengths of every record.

dataset.json                 format, fingerprints of configuration and Codec, shards, statistics; written last
index.npz                    per record: lengths, speaker, utterance (`INDEX_COLUMNS`)
records-00000.array_record   the records, in the order of the manifest
records-00000.json           of each shard: what it was made from, and its part of the index
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from chroma_jax import paths
from chroma_jax.audio.mel import MelConfig
from chroma_jax.audio.tokenizer import Tokenizer
from chroma_jax.checkpoint.params import path_name
from chroma_jax.config import ChromaConfig
from chroma_jax.data import files
from chroma_jax.messages import shorten

METADATA, INDEX = "dataset.json", "index.npz"
FORMAT, VERSION = "chroma_jax dialogues", 1
# Of each record: lengths of its arrays; the speaker's number, -1 for none; a hash of the answer's codes.
INDEX_COLUMNS = {
    "question": np.int32,  # tokens N
    "chunks": np.int32,  # C
    "text": np.int32,  # L
    "frames": np.int32,  # T
    "reference_ids": np.int32,  # R
    "reference_frames": np.int32,
    "voice_ids": np.int32,  # P
    "voice_frames": np.int32,  # V
    "speaker": np.int32,
    "utterance": np.int64,
}
# A fingerprint looks at this many values of every parameter.
_SAMPLES = 4096


class DatasetError(ValueError):
    """A dataset that is missing, incomplete, damaged, or made for something else."""

    def __init__(self, message: str):
        super().__init__(shorten(message))


def config_parts(config: ChromaConfig, mel: MelConfig | None = None) -> dict[str, Any]:
    """What of a configuration the arrays of a record depend on. `mel` defaults to the values of the published model."""
    reasoner, codec = config.reasoner, config.codec
    mel = mel or MelConfig(num_mel_bins=reasoner.audio.num_mel_bins)
    return {
        "text_start_token_id": config.text_start_token_id,
        "text_end_token_id": config.text_end_token_id,
        "im_end_token_id": config.im_end_token_id,
        "audio_token_id": reasoner.audio_token_id,
        "audio_start_token_id": reasoner.audio_start_token_id,
        "audio_end_token_id": reasoner.audio_end_token_id,
        "pad_token_id": reasoner.pad_token_id,
        "text_vocab_size": reasoner.vocab_size,
        "num_codebooks": config.num_codebooks,
        "audio_vocab_size": config.backbone.vocab_size,
        "codebook_eos_token_id": config.codebook_eos_token_id,
        "codebook_pad_token_id": config.codebook_pad_token_id,
        "codec_sampling_rate": codec.sampling_rate,
        "codec_frame_samples": codec.frame_samples,
        "codebook_size": codec.codebook_size,
        "chunk_frames": reasoner.audio.chunk_frames,
        "mel": dataclasses.asdict(mel),
    }


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON-able value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_fingerprint(module: Any) -> str:
    """16 hexadecimal digits that stand for a module's (`model.codec`, `model.reasoner`) shapes and some values of every parameter."""
    digest = hashlib.sha256()
    leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(module)}
    for name, leaf in sorted(leaves.items()):
        stride = max(1, leaf.size // _SAMPLES)
        values = np.asarray(leaf.reshape(-1)[::stride]).astype(np.float32)
        digest.update(f"{name}{list(leaf.shape)}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits that stand for how text, and a conversation's frame, become ids."""
    probe = "Hello, world! It's 12:30; naïve 東京 «ß»\n\t  done."
    return fingerprint([tokenizer.encode(probe), tokenizer.chat_template])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """The content of dataset.json."""

    config: Mapping[str, Any]  # config_parts
    codec: str  # weights_fingerprint of the Codec that made the codes
    tokenizer: str  # fingerprint of the tokenizer that made the ids
    hidden: Mapping[str, Any] | None  # {"dtype", "width", "reasoner"} where it is precomputed
    settings: Mapping[str, Any]  # of `prepare`: limits, system prompt
    key: str  # stands for the manifest's rows and everything above
    num_records: int
    shards: tuple[Mapping[str, Any], ...]  # {"name", "records", "bytes"}
    speakers: tuple[str, ...]
    statistics: Mapping[str, Any]
    skipped: tuple[Mapping[str, Any], ...]  # rows left out: {"line", "reason"}

    @property
    def fingerprint(self) -> str:
        """Of the configuration alone."""
        return fingerprint(self.config)


def write_metadata(directory: str, metadata: Metadata) -> None:
    """Writes dataset.json, atomically: from here on the dataset is complete."""
    content = {"format": FORMAT, "version": VERSION, "fingerprint": metadata.fingerprint}
    content |= dataclasses.asdict(metadata)
    files.write_atomically(
        os.path.join(directory, METADATA),
        json.dumps(content, indent=1, ensure_ascii=False).encode(),
    )


def read_metadata(directory: str | os.PathLike) -> Metadata:
    """Reads dataset.json and checks that every shard is there. Raises DatasetError naming the directory and what is wrong."""
    directory = paths.expand(directory)
    paths.check_remote(directory)
    path = os.path.join(directory, METADATA)
    there = set(paths.names(directory))
    if not there and not paths.at(directory).is_dir():
        raise DatasetError(f"{directory}: no such dataset directory")
    if METADATA not in there:
        begun = any(name.startswith("records-") for name in there)
        what = "an unfinished dataset (run prepare again)" if begun else "no dataset"
        raise DatasetError(f"{directory} is {what}: it has no {METADATA}")
    try:
        content = json.loads(paths.at(path).read_bytes())
        if not isinstance(content, dict) or content.pop("format") != FORMAT:
            raise DatasetError(f"{path} is not the metadata of a dialogue dataset")
        version, claimed = content.pop("version"), content.pop("fingerprint")
        if version != VERSION:
            raise DatasetError(f"{path} has version {version}, this program reads {VERSION}")
        for name in ("shards", "speakers", "skipped"):
            content[name] = tuple(content[name])
        metadata = Metadata(**content)
        if claimed != metadata.fingerprint:
            raise DatasetError(f"{path} is damaged: its fingerprint does not match")
    except DatasetError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise DatasetError(f"{path} is damaged: {e}") from e
    for shard in metadata.shards:
        file = os.path.join(directory, shard["name"])
        if shard["name"] not in there:
            raise DatasetError(f"{directory} is incomplete: {shard['name']} is missing")
        # In an object store each size would be a request; what is wrong is told when it is read.
        if not paths.is_remote(file) and os.path.getsize(file) != shard["bytes"]:
            raise DatasetError(
                f"{directory} is damaged: {shard['name']} has {os.path.getsize(file)} bytes, it should have {shard['bytes']}"
            )
    return metadata


def check_made_for(
    metadata: Metadata,
    config: ChromaConfig,
    *,
    codec: str | None = None,
    tokenizer: str | None = None,
    reasoner: str | None = None,
    name: str = "dataset",
) -> None:
    """Raises DatasetError if a dataset was made for another configuration, Codec, tokenizer or (with hidden states) Reasoner.

    The last three are fingerprints, checked when given.
    """
    mel = MelConfig(**metadata.config["mel"]) if "mel" in metadata.config else None
    want = config_parts(config, mel)
    for key in sorted(set(want) | set(metadata.config)):
        if want.get(key) != metadata.config.get(key):
            raise DatasetError(
                f"{name} was prepared for another configuration: its {key} is {metadata.config.get(key)}, "
                f"the model's is {want.get(key)}"
            )
    if mel.num_mel_bins != config.reasoner.audio.num_mel_bins:
        raise DatasetError(
            f"{name} was prepared for another configuration: it has {mel.num_mel_bins} mel bins, "
            f"the model wants {config.reasoner.audio.num_mel_bins}"
        )
    pairs = [("Codec", metadata.codec, codec), ("tokenizer", metadata.tokenizer, tokenizer)]
    if metadata.hidden is not None:
        width = config.reasoner.text.hidden_size
        if metadata.hidden["width"] != width:
            raise DatasetError(
                f"{name} holds Reasoner states of width {metadata.hidden['width']}, the model's is {width}"
            )
        pairs.append(("Reasoner", metadata.hidden["reasoner"], reasoner))
    for what, got, wanted in pairs:
        if wanted is not None and got != wanted:
            raise DatasetError(
                f"{name} was prepared with another {what}: {got}, the model's is {wanted}; prepare it again"
            )


def read_index(directory: str | os.PathLike, metadata: Metadata) -> dict[str, np.ndarray]:
    """The columns of index.npz, each [num_records]. Raises DatasetError when they are not there."""
    path = os.path.join(paths.expand(directory), INDEX)
    try:
        with np.load(io.BytesIO(paths.at(path).read_bytes()), allow_pickle=False) as stored:
            index = {name: stored[name].astype(dtype) for name, dtype in INDEX_COLUMNS.items()}
            key = str(stored["key"])
    except Exception as e:  # zipfile and numpy have many ways to refuse a file
        raise DatasetError(f"{path} is missing or damaged: {e}") from e
    if key != metadata.key or any(len(c) != metadata.num_records for c in index.values()):
        raise DatasetError(f"{path} does not belong to the dataset beside it")
    return index
