"""What a synthesis is told: typed, and checked when it is made. Values live in configs/*.py."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
_WRITERS = ("world", "endpoint", "local")
_SPEAKERS = ("command", "python", "hibari", "piper", "endpoint", "chroma")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How many rows: numbers `first` to `first + train - 1`, and so for validation. A row's number decides all that is drawn for it."""

    train: int
    validation: int = 0
    first: int = 0

    def __post_init__(self):
        _at_least("rows", self, train=0, validation=0, first=0)
        if not self.train + self.validation:
            raise ValueError("rows.train and rows.validation are 0: there is nothing to make")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterConfig:
    """Who writes questions and answers.

    kind: "world", the program of facts; "endpoint", a model behind an OpenAI-compatible /v1/chat/completions; "local", a model of
    transformers on this machine.
    reading: of "world": the share of rows that say a given sentence.
    model: of "endpoint" its name there, of "local" a directory or Hub id. url: of "endpoint", as in "http://localhost:8000/v1". key: the
    environment variable that holds its key, if it wants one.
    questions: a file of questions, one a line, of which one in `held_one_in` is kept for validation; without it the model writes the
    questions, about `topics`.
    system: replaces the instruction that answers are made with. temperature, max_tokens: of the model. attempts: for each row.
    """

    kind: str
    reading: float = 0.0
    model: str = ""
    url: str = ""
    key: str = ""
    questions: str = ""
    topics: tuple[str, ...] = ()
    held_one_in: int = 10
    system: str = ""
    temperature: float = 0.8
    max_tokens: int = 120
    attempts: int = 3

    def __post_init__(self):
        _one_of("writer.kind", self.kind, _WRITERS)
        _at_least("writer", self, held_one_in=2, temperature=0, max_tokens=1, attempts=1)
        if not 0 <= self.reading <= 1:
            raise ValueError(f"writer.reading must be from 0 to 1, got {self.reading}")
        if self.kind != "world":
            if not self.model:
                raise ValueError(f"writer.model is missing: which model writes ({self.kind})")
            if not (self.questions or self.topics):
                raise ValueError("writer.questions (a file) or writer.topics must be given")
        if self.kind == "endpoint" and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"writer.url must be an address such as http://localhost:8000/v1, got {self.url!r}")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VoiceConfig:
    """One voice.

    name: what its answers' `speaker` is called. speaker: what speaks, one of those in `speakers`. options: of that. licence: of program and
    voice; it is written into every record. says: "questions", "answers" or "both". split: "train", "validation" or "both".
    """

    name: str
    speaker: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    licence: str
    says: str = "both"
    split: str = "both"

    def __post_init__(self):
        _one_of("speaker", self.speaker, _SPEAKERS)
        _one_of("says", self.says, ("questions", "answers", "both"))
        _one_of("split", self.split, (*SPLITS, "both"))
        for name in ("name", "licence"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} of a voice must not be empty")
        if not self.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"name of a voice must be letters, digits, - and _, got {self.name!r}")

    def can(self, role: str, split: str) -> bool:
        """Whether it speaks "questions" or "answers" of a split."""
        return self.says in (role, "both") and self.split in (split, "both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoundConfig:
    """What every clip is made into, and how questions are made to differ.

    rate: of the files, in Hz. loudness: in LUFS (BS.1770). silence: at both ends, in seconds at most.
    takes: how often a voice says a text anew; clips are shared between rows otherwise.
    Of questions only: `speed`, played up to this share faster or slower, pitch and all; `gain`, up to so many dB softer;
    `noise`, in this share of them, `noise_db` or more below the speech.
    """

    rate: int = 24000
    loudness: float = -20.0
    silence: float = 0.1
    takes: int = 1
    speed: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    noise_db: float = 15.0

    def __post_init__(self):
        _at_least("sound", self, rate=8000, silence=0, takes=1, speed=0, gain=0, noise=0)
        if self.speed > 0.5:
            raise ValueError(f"sound.speed must be at most 0.5, got {self.speed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What a clip must be to stay; None switches a filter off. See `filters`.

    Of questions only sound, seconds and pace are looked at, unless `hear_questions`.

    max_words: of an answer. min_seconds, max_seconds: of a clip. min_pace, max_pace: letters and spaces a second. pace_spread: how far the
    pace may be from the voice's median, as a share of it.
    max_wer: of what `words` heard; first_and_last: its first and last word must be there. min_similarity: to the voice, by `speaker`. min_mos, by `quality`;
    mos_drop: how far it may be below the voice's median.
    max_pause: silence inside, in seconds.
    room: spoken frames per text token that there must be at least; words and marks count as tokens.
    attempts: seeds that a clip gets.
    words, speaker, quality: judges by their names in `chroma_jax.evaluation.judges`; "" for none.
    """

    max_words: int = 80
    min_seconds: float = 0.3
    max_seconds: float = 60.0
    min_pace: float | None = 8.0
    max_pace: float | None = 22.0
    pace_spread: float | None = 0.3
    max_wer: float | None = 0.1
    first_and_last: bool = True
    min_similarity: float | None = 0.79
    min_mos: float | None = 2.8
    mos_drop: float | None = 0.5
    max_pause: float | None = 1.0
    room: float | None = 2.0
    hear_questions: bool = False
    attempts: int = 3
    words: str = ""
    speaker: str = ""
    quality: str = ""

    def __post_init__(self):
        _at_least("filters", self, max_words=1, min_seconds=0, attempts=1)
        for judge, limits in (("words", ("max_wer",)), ("speaker", ("min_similarity",)), ("quality", ("min_mos", "mos_drop"))):  # fmt: skip
            wanted = [name for name in limits if getattr(self, name) is not None]
            if wanted and not getattr(self, judge):
                raise ValueError(f"filters.{wanted[0]} is set but filters.{judge} names no judge; set it to None to go without")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """A synthesis.

    shard_size: rows that are finished together, what a kill can lose. seed: of all that is drawn.
    voice_prompts: the splits whose rows name a clip of the answer's voice to speak in, never the answer itself: "none", "validation" or
    "both". Rows without one get another answer of their voice in training. language: of the manifest.
    """

    rows: RowsConfig
    writer: WriterConfig
    voices: tuple[VoiceConfig, ...]
    sound: SoundConfig = dataclasses.field(default_factory=lambda: SoundConfig())
    filters: FilterConfig
    shard_size: int = 64
    seed: int = 0
    voice_prompts: str = "validation"
    language: str = "en"

    def __post_init__(self):
        _at_least("", self, shard_size=1, seed=0)
        _one_of("voice_prompts", self.voice_prompts, ("none", VALIDATION, "both"))
        names = [voice.name for voice in self.voices]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"voices: two are called {name!r}")
        for split in SPLITS:
            if not getattr(self.rows, split):
                continue
            answers = [v.name for v in self.voices if v.can("answers", split)]
            questions = [v.name for v in self.voices if v.can("questions", split)]
            if not answers:
                raise ValueError(f"voices: none may answer in {split}")
            for name in answers:
                if not set(questions) - {name}:
                    raise ValueError(
                        f"voices: nobody else may ask what {name!r} answers in {split}"
                    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SynthesisConfig:
        """From nested mappings, such as the ConfigDict of a configs/*.py. Raises ValueError naming the key."""
        return _read(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings of what JSON can hold."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=dict))

    def of_clips(self) -> dict[str, Any]:
        """What decides how a text sounds and whether it stays: all but who writes how many rows."""
        values = self.to_dict()
        return {key: values[key] for key in ("voices", "sound", "filters", "seed")}


def fingerprint(values: Any) -> str:
    """Twelve digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _read(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping) and hasattr(values, "to_dict"):
        values = values.to_dict()
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix[:-1]} must be a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{key}; known are {', '.join(hints)}")
    for field in dataclasses.fields(cls):
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING  # fmt: skip
        if not optional and field.name not in values:
            raise ValueError(f"missing key {prefix}{field.name}")
    try:
        return cls(**{key: _convert(hints[key], v, prefix + key) for key, v in values.items()})
    except ValueError as e:
        if prefix.endswith("].") and not str(e).startswith(
            prefix
        ):  # a voice does not know which it is
            raise ValueError(f"{prefix[:-1]}: {e}") from e
        raise


def _convert(hint: Any, value: Any, name: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if dataclasses.is_dataclass(kind):
        return _read(kind, value, f"{name}.")
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ValueError(f"{name} must be a list, got {value!r}")
        of = typing.get_args(kind)[0]
        return tuple(_convert(of, item, f"{name}[{i}]") for i, item in enumerate(value))
    if kind in (int, float, str, bool):
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")
        return kind(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, got {value!r}")
    return dict(value)


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def _at_least(prefix: str, values: Any, **lowest: float) -> None:
    for name, low in lowest.items():
        if getattr(values, name) < low:
            full = f"{prefix}.{name}" if prefix else name
            raise ValueError(f"{full} must be at least {low}, got {getattr(values, name)}")
