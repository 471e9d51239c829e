"""Crops of sound for training a codec: which sound makes which batch, as a function of the batch's number alone.

    sounds = Sounds(["out/corpus/manifest.jsonl"], sampling_rate=24000)
    batches = crop_pipeline(sounds, CropLimits(seconds=0.96), batch_size=4, seed=0)

Nothing is carried from batch to batch: an iterator's state is the number of batches it has given, as in `data/pipeline.py`. Every
process draws the whole batch and reads its own rows. Every second of sound is as likely as any other.

Axes: B rows of a batch, N samples.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from chroma_jax.audio.mel import MelConfig, log_mel, mel_chunks
from chroma_jax.audio.wav import AudioError, load_audio, resample
from chroma_jax.data.metadata import fingerprint
from chroma_jax.data.mixture import Source
from chroma_jax.data.pipeline import BatchIterator, Evaluation, Reading, check_rows

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_KEYS = ("audio", "answer_audio", "voice_audio", "question")  # of a manifest's lines
_ENDLESS = 1 << 40  # batches


class Crops(NamedTuple):
    """Pieces of sound of one length."""

    wave: Any  # [B, N] float32, zeros behind the end of a sound that is shorter
    lengths: Any  # [B] int32, samples that are sound; 0 of a row that is padding
    record_ids: Any  # [B] int64, which sounds these are of; stays on the host
    chunks: Any = None  # [B, C, chunk_frames, mel] float32, the same sound for an audio encoder, where one listens
    chunk_lengths: Any = None  # [B, C] int32, mel frames of each

    @property
    def rows(self) -> int:
        """B."""
        return self.wave.shape[0]

    def needed(self) -> Crops:
        """Without what stays on the host."""
        return self._replace(record_ids=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropLimits:
    """How sound is cut and varied.

    seconds: length of a crop. gain_db: loudness changes by up to this much, either way. speed: tempo and pitch together change by up
    to this part, either way, as a tape's do: another voice for nothing.
    """

    seconds: float
    gain_db: float = 0.0
    speed: float = 0.0

    def __post_init__(self):
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"data.crop_seconds must be positive, got {self.seconds}")
        if not 0 <= self.gain_db <= 60:
            raise ValueError(f"data.gain_db must be between 0 and 60, got {self.gain_db}")
        if not 0 <= self.speed < 1:
            raise ValueError(f"data.speed must be at least 0 and below 1, got {self.speed}")


class Ears(NamedTuple):
    """The features that an audio encoder wants."""

    mel: MelConfig
    chunk_frames: int

    def hear(self, wave: np.ndarray, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
        """Crops [B, N] -> (chunks [B, C, chunk_frames, mel], lengths [B, C])."""
        heard = []
        for row in wave:
            row = resample(row, sampling_rate, self.mel.sampling_rate)
            heard.append(mel_chunks([log_mel(row, self.mel)], self.chunk_frames))
        return tuple(np.stack(arrays) for arrays in zip(*heard, strict=True))


class Draw(NamedTuple):
    """A batch's rows."""

    sounds: np.ndarray  # [B] int64, numbers of sounds; negative: padding
    starts: np.ndarray  # [B] float64, seconds
    gains: np.ndarray  # [B] float64, factors
    speeds: np.ndarray  # [B] float64, factors


class Sounds:
    """Sound files, numbered through; nothing of them is read but their headers.

    Args:
      sources: sound files, directories (all sound files under them), or manifests: JSON lines that name sound files, relative to the manifest, under
        "audio", "answer_audio", "voice_audio" or "question". A `Source` gives one a weight: its share of the rows.
      sampling_rate: of what is read.
      ears: of an audio encoder that listens too.

    Raises:
      ValueError: no sources, one that is missing or without sound, or a file that is not sound.
    """

    def __init__(
        self, sources: Sequence[str | Source], sampling_rate: int, ears: Ears | None = None
    ):
        if not sources:
            raise ValueError("no sound: name a directory or a manifest")
        sources = [s if isinstance(s, Source) else Source(directory=s) for s in sources]
        self.sampling_rate, self.ears = sampling_rate, ears
        self.weights = [float(source.weight) for source in sources]
        self.files: list[str] = []
        self.offsets = [0]
        for source in sources:
            self.files += _files_of(os.fspath(source.directory))
            self.offsets.append(len(self.files))
        self.sources = [os.fspath(source.directory) for source in sources]
        self.seconds = np.array([_seconds(file) for file in self.files])

    def __len__(self) -> int:
        return len(self.files)

    def describe(self) -> list[str]:
        """Lines for the log."""
        spans = zip(self.sources, self.weights, self.offsets, self.offsets[1:], strict=False)
        return [
            f"{name}: {stop - start} sounds, {self.seconds[start:stop].sum() / 60:.1f} min, weight {weight:g}"
            for name, weight, start, stop in spans
        ]

    @property
    def key(self) -> list[Any]:
        """What a plan of batches depends on."""
        names = [os.path.basename(file) for file in self.files]
        return [names, self.seconds.round(4).tolist(), self.weights, self.sampling_rate]

    def name(self, number: int) -> str:
        """What a sound is called in an error."""
        return self.files[number]

    def draw(self, number: int, rows: int, limits: CropLimits, seed: int) -> Draw:
        """The rows of training batch `number`."""
        rng = np.random.default_rng([seed, number])
        share = np.array(self.weights) / sum(self.weights)
        of = rng.choice(len(share), rows, p=share)
        where, gains, speeds = rng.random((3, rows))
        sounds, starts = np.zeros(rows, np.int64), np.zeros(rows)
        for row, source in enumerate(of):
            ends = np.cumsum(self.seconds[self.offsets[source] : self.offsets[source + 1]])
            at = where[row] * ends[-1]
            local = min(int(np.searchsorted(ends, at, side="right")), len(ends) - 1)
            sounds[row] = self.offsets[source] + local
            starts[row] = at - (ends[local - 1] if local else 0.0)
        speeds = 1 + limits.speed * (2 * speeds - 1)
        latest = np.maximum(self.seconds[sounds] - limits.seconds * speeds, 0.0)
        starts = np.minimum(starts, latest)
        return Draw(sounds, starts, 10 ** (limits.gain_db * (2 * gains - 1) / 20), speeds)

    def in_order(self, number: int, rows: int, limits: CropLimits) -> Draw:
        """The rows of evaluation batch `number`: the middle of each sound, each once; those missing in the last batch are padding."""
        sounds = np.arange(number * rows, (number + 1) * rows)
        sounds = np.where(sounds < len(self.files), sounds, -1)
        starts = np.maximum(self.seconds[sounds] - limits.seconds, 0.0) / 2
        return Draw(sounds, starts, np.ones(rows), np.ones(rows))

    def read(self, draw: Draw, limits: CropLimits) -> Crops:
        """The crops of drawn rows."""
        size, rows = round(limits.seconds * self.sampling_rate), len(draw.sounds)
        wave, lengths = np.zeros((rows, size), np.float32), np.zeros(rows, np.int32)
        for row, number in enumerate(draw.sounds.tolist()):
            if number < 0:
                continue
            piece = self._piece(self.files[number], draw.starts[row], draw.speeds[row], size)
            wave[row, : len(piece)] = np.clip(piece * draw.gains[row], -1, 1)
            lengths[row] = len(piece)
        crops = Crops(wave, lengths, draw.sounds)
        return crops if self.ears is None else self._heard(crops)

    def _heard(self, crops: Crops) -> Crops:
        chunks, lengths = self.ears.hear(crops.wave, self.sampling_rate)
        return crops._replace(chunks=chunks, chunk_lengths=lengths)

    def _piece(self, file: str, start: float, speed: float, size: int) -> np.ndarray:
        """At most `size` samples from `start` seconds on, played `speed` times as fast."""
        import soundfile

        try:
            with soundfile.SoundFile(file) as sound:
                rate = sound.samplerate
                first = min(round(start * rate), max(sound.frames - 1, 0))
                sound.seek(first)
                wanted = int(np.ceil(size * rate * speed / self.sampling_rate)) + 1
                samples = sound.read(wanted, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError, OSError) as e:
            raise AudioError(f"{file}: cannot be read: {e}") from e
        if not len(samples):
            return np.zeros(0, np.float32)
        # A tape that runs faster holds more samples in a second.
        wave = samples.mean(axis=1)
        if rate != self.sampling_rate or speed != 1:
            wave = resample(wave, rate * speed, self.sampling_rate)
        return wave[:size]


def crop_pipeline(
    sounds: Sounds,
    limits: CropLimits,
    *,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    reading: Reading | None = None,
) -> BatchIterator:
    """Endless batches of `Crops` for training. Raises ValueError for a batch that does not divide over the processes."""
    check_rows(batch_size, process_index, process_count)
    batches = _Batches(sounds, limits, _ENDLESS, batch_size, seed, process_index, process_count)
    key = fingerprint([sounds.key, dataclasses.asdict(limits), batch_size, seed])
    per_epoch = max(1, int(sounds.seconds.sum() / (limits.seconds * batch_size)))
    return BatchIterator(batches, key, per_epoch, reading or Reading())


def crop_evaluation(
    sounds: Sounds,
    limits: CropLimits,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    reading: Reading | None = None,
) -> Evaluation:
    """Batches that hold the middle of every sound once, unchanged."""
    check_rows(batch_size, process_index, process_count)
    count = -(-len(sounds) // batch_size)
    batches = _Batches(sounds, limits, count, batch_size, None, process_index, process_count)
    return Evaluation(batches, reading or Reading())


class _Batches:
    """Random access to one process's part of each batch: what grain reads from."""

    def __init__(
        self,
        sounds: Sounds,
        limits: CropLimits,
        count: int,
        rows: int,
        seed: int | None,
        process_index: int,
        process_count: int,
    ):
        self.mixture, self.limits, self._count = sounds, limits, count
        self._rows, self._seed = rows, seed
        self._process_index, self._process_count = process_index, process_count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Draw:
        if self._seed is None:
            draw = self.mixture.in_order(number, self._rows, self.limits)
        else:
            draw = self.mixture.draw(number, self._rows, self.limits, self._seed)
        rows = self._rows // self._process_count
        start = self._process_index * rows
        return Draw(*(x[start : start + rows] for x in draw))

    def assemble(self, draw: Draw) -> Crops:
        """Reads the rows."""
        return self.mixture.read(draw, self.limits)


def _files_of(source: str) -> list[str]:
    if os.path.isdir(source):
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(source)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
        files = sorted(found)
    elif source.lower().endswith(SUFFIXES):
        files = [source]
    else:
        files = _files_in(source)
    if not files:
        raise ValueError(f"{source}: names no sound files")
    return files


def _files_in(manifest: str) -> list[str]:
    root, files = os.path.dirname(os.path.abspath(manifest)), []
    try:
        with open(manifest, encoding="utf-8") as f:
            for line, text in enumerate(f, start=1):
                if not text.strip():
                    continue
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError(f"{manifest}:{line}: must be an object")
                files += [os.path.join(root, row[key]) for key in _KEYS if row.get(key)]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{manifest}: cannot be read: {e}") from e
    return list(dict.fromkeys(files))


def _seconds(file: str) -> float:
    import soundfile

    try:
        info = soundfile.info(file)
    except (soundfile.SoundFileError, RuntimeError, OSError) as e:
        raise AudioError(f"{file}: not a sound file that can be read: {e}") from e
    if not info.frames:
        raise AudioError(f"{file}: has no samples")
    return info.frames / info.samplerate


def whole(sounds: Sounds, number: int) -> np.ndarray:
    """A sound from beginning to end, [N] float32."""
    return load_audio(sounds.files[number], sounds.sampling_rate)
