"""A prepared dataset, opened for a model: records by number, and the voice that each speaks in."""

from __future__ import annotations

import os

import numpy as np

from chroma_jax import paths
from chroma_jax.config import ChromaConfig
from chroma_jax.data import metadata as md
from chroma_jax.data import records
from chroma_jax.data.records import Record
from chroma_jax.data.shard_reader import ShardReader
from chroma_jax.data.voices import VoiceDraw
from chroma_jax.schedule import total_length


class Dataset:
    """Random access to the records of a directory that `prepare` made.

    Args:
      directory: the dataset.
      config: the model that will be trained on it.
      codec, tokenizer, reasoner: fingerprints (`metadata`) that must be those of the dataset, where given.

    Raises:
      DatasetError: no dataset, an unfinished, empty or damaged one, or one that was made for another model.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: ChromaConfig,
        *,
        codec: str | None = None,
        tokenizer: str | None = None,
        reasoner: str | None = None,
    ):
        self.directory = paths.expand(directory)
        self.metadata = md.read_metadata(directory)
        md.check_made_for(
            self.metadata,
            config,
            codec=codec,
            tokenizer=tokenizer,
            reasoner=reasoner,
            name=self.directory,
        )
        if not self.metadata.num_records:
            raise md.DatasetError(f"{self.directory} is empty: it has no records")
        self.index = md.read_index(directory, self.metadata)
        self._check_room(config)
        usable = (self.index["reference_frames"] > 0) & (self.index["reference_ids"] > 0)
        self._draw = VoiceDraw(self.index["speaker"], self.index["utterance"], usable)
        shards = self.metadata.shards
        files = [os.path.join(self.directory, shard["name"]) for shard in shards]
        self._shards = ShardReader(files, [shard["records"] for shard in shards])
        if len(self._shards) != self.metadata.num_records:
            raise md.DatasetError(
                f"{self.directory} is damaged: its shards have {len(self._shards)} records, "
                f"its {md.METADATA} counts {self.metadata.num_records}"
            )

    def __len__(self) -> int:
        return self.metadata.num_records

    def __getitem__(self, number: int) -> Record:
        """Raises DatasetError, naming record and dataset, when it is damaged."""
        try:
            return records.decode(self._shards[number])
        except (records.RecordError, RuntimeError) as e:
            raise md.DatasetError(f"record {number} of {self.directory}: {e}") from e

    def voice(
        self, record: Record, number: int, seed: int, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Transcript ids [P] and codes [F, Q] of the voice that record `number` speaks in, in an epoch.

        Another utterance of its speaker, drawn by (seed, epoch, number); else the row's own recording; else, where there is neither, the
        answer itself.
        """
        other = self._draw(number, seed, epoch)
        if other is None and len(record.voice_codes):
            return record.voice_ids, record.voice_codes
        speaker = record if other is None else self[other]
        return speaker.reference_ids, speaker.codes[: speaker.reference_frames]

    @property
    def longest_voice(self) -> tuple[int, int]:
        """Most transcript tokens and most frames that `voice` gives."""
        index = self.index
        ids = max(index["reference_ids"].max(), index["voice_ids"].max())
        return int(ids), int(max(index["reference_frames"].max(), index["voice_frames"].max()))

    def _check_room(self, config: ChromaConfig) -> None:
        text, frames = self.index["text"], self.index["frames"]
        spoken = np.minimum(text, -(-frames // 2))
        most = int(total_length(*self.longest_voice, spoken, frames).max())
        if most > config.backbone.llama.max_positions:
            raise md.DatasetError(
                f"{self.directory}: its longest record takes {most} positions, the Backbone has "
                f"{config.backbone.llama.max_positions}; prepare it for this model"
            )
