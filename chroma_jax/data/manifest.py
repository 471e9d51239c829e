"""The manifest: one JSON object a line, a spoken answer to a question; and the checks that every row passes before work starts.

    {"question": "q/1.wav", "answer_text": "It is four.", "answer_audio": "a/1.wav", "speaker": "ada"}

    question         sound file; or question_text, or both (the text follows the sound in the same turn)
    answer_text      what the answer says
    answer_audio     sound file of it
    voice_audio      optional reference recording of the answer's speaker, with voice_text, what it says
    speaker          optional name; answers of one speaker serve each other as voice prompts
    turns            optional earlier conversation: [{"role": "user", "audio": "q/0.wav"}, {"role": "assistant", "text": "Yes?"}]
    id, language     optional

Paths are relative to the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from chroma_jax import paths
from chroma_jax.audio.chat import Turn
from chroma_jax.audio.decode import check_file
from chroma_jax.audio.prompt import Processor, Question
from chroma_jax.audio.wav import load_audio
from chroma_jax.config import ChromaConfig
from chroma_jax.data.voices import VoiceLimits, cut_voice
from chroma_jax.messages import shown
from chroma_jax.schedule import total_length

_KEYS = frozenset(
    [
        "id",
        "question",
        "question_text",
        "turns",
        "answer_text",
        "answer_audio",
        "voice_audio",
        "voice_text",
        "speaker",
        "language",
    ]
)
_AUDIO_KEYS = ("question", "answer_audio", "voice_audio")
_TEXT_KEYS = ("question_text", "answer_text", "voice_text", "speaker", "language")
_SILENCE = 1e-4  # peak below which an answer or a voice is taken to be silent


class BadRow(NamedTuple):
    """A row that cannot be used."""

    line: int
    reason: str
    files: str = (
        ""  # `content` of its files when it was looked at; empty where the row is wrong in itself
    )


def bad_row(row: Row, error: Exception) -> BadRow:
    """The row that an error was met with, as one that cannot be used while its files are what they are."""
    return BadRow(row.line, printable(error), content(row))


def printable(error: Exception) -> str:
    """What an error says, in characters that every file and terminal of UTF-8 takes."""
    return str(error).encode("utf-8", "backslashreplace").decode()


def content(row: Row) -> str:
    """16 hexadecimal digits that stand for the bytes of a row's files, or for what keeps them from being read."""
    digest = hashlib.sha256()
    for file in row.files:
        try:
            with open(file, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        except (OSError, ValueError) as e:
            digest.update(type(e).__name__.encode())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the manifest, its paths made absolute."""

    line: int
    id: str
    turns: tuple[Turn, ...]  # the conversation, the question last
    answer_text: str
    answer_audio: str
    voice_audio: str | None
    voice_text: str | None
    speaker: str | None
    language: str | None

    @property
    def files(self) -> list[str]:
        """All sound files that the row names."""
        heard = [turn.audio for turn in self.turns if turn.audio is not None]
        return [*heard, self.answer_audio, *([self.voice_audio] if self.voice_audio else [])]


class Manifest(NamedTuple):
    """What the file says; no sound has been looked at."""

    rows: list[Row | BadRow]  # one per line that is not blank, in order
    hashes: list[str]  # of each line


class Sounds(NamedTuple):
    """The arrays of a row that come before the models."""

    question: Question
    text: np.ndarray  # [L] int32, im_end included
    answer: np.ndarray  # [N] float32 at the codec's rate
    reference_ids: np.ndarray  # [R] int32
    reference_frames: int
    voice_ids: np.ndarray  # [P] int32; empty without a voice of its own
    voice: np.ndarray  # [N'] float32


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Reads and checks every line; rows that are wrong in themselves or occur twice are `BadRow`s.

    Raises ValueError when the file cannot be read or has no rows.
    """
    path = paths.expand(path)
    root = os.path.dirname(os.path.abspath(path))
    rows: list[Row | BadRow] = []
    hashes = []
    ids: dict[str, int] = {}
    contents: dict[str, int] = {}
    try:
        with open(path, "rb") as f:
            for line, data in enumerate(f, start=1):
                if not data.strip():
                    continue
                hashes.append(hashlib.sha256(data.strip()).hexdigest()[:16])
                try:
                    row = _read_row(data, line, root)
                    _refuse_twin(row, ids, contents)
                except ValueError as e:
                    row = BadRow(line, printable(e))
                rows.append(row)
    except OSError as e:
        raise ValueError(f"manifest {path} cannot be read: {e.strerror or e}") from e
    if not rows:
        raise ValueError(f"manifest {path} has no rows")
    return Manifest(rows, hashes)


def _read_row(data: bytes, line: int, root: str) -> Row:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"is not JSON: {e}") from e
    if not isinstance(values, dict):
        raise ValueError(f"must be a JSON object, got {type(values).__name__}")
    _refuse_half_characters(values, "the row")
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        raise ValueError(f"unknown key {shown(unknown[0])}; known are {', '.join(sorted(_KEYS))}")
    values = {key: value for key, value in values.items() if value is not None}
    for key in (*_AUDIO_KEYS, *_TEXT_KEYS):
        if key in values and (not isinstance(values[key], str) or not values[key].strip()):
            raise ValueError(f"{key} must be text that is not empty, got {shown(values[key])}")
    for key in ("answer_text", "answer_audio"):
        if key not in values:
            raise ValueError(f"{key} is missing")
    if "question" not in values and "question_text" not in values:
        raise ValueError("question (a sound file) or question_text is missing")
    if ("voice_audio" in values) != ("voice_text" in values):
        raise ValueError("voice_audio and voice_text go together, one of them is missing")
    name = values.get("id", f"line-{line}")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ValueError(f"id must be text or a whole number, got {shown(name)}")

    def absolute(value: str | None) -> str | None:
        return None if value is None else os.path.normpath(os.path.join(root, paths.expand(value)))

    turns = values.get("turns", [])
    if not isinstance(turns, list):
        raise ValueError(f"turns must be a list, got {type(turns).__name__}")
    earlier = [_read_turn(turn, i, absolute) for i, turn in enumerate(turns)]
    last = Turn(audio=absolute(values.get("question")), text=values.get("question_text"))
    return Row(
        line=line,
        id=str(name),
        turns=(*earlier, last),
        answer_text=values["answer_text"],
        answer_audio=absolute(values["answer_audio"]),
        voice_audio=absolute(values.get("voice_audio")),
        voice_text=values.get("voice_text"),
        speaker=values.get("speaker"),
        language=values.get("language"),
    )


def _refuse_half_characters(value: Any, name: str) -> None:
    """Raises ValueError for text that no file can hold: JSON can spell half a pair, such as "\\ud83d" without what follows it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"{name} has half a character, {value[e.start]!r}") from e
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_half_characters(key, name)
            _refuse_half_characters(inner, key)
    elif isinstance(value, list):
        for inner in value:
            _refuse_half_characters(inner, name)


def _read_turn(turn: Any, i: int, absolute) -> Turn:
    if not isinstance(turn, Mapping) or not set(turn) <= {"role", "text", "audio"}:
        raise ValueError(
            f"turn {i} must be an object with role, and text or audio, got {shown(turn)}"
        )
    for key, value in turn.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"turn {i}: {key} must be text, got {shown(value)}")
    return Turn(
        role=turn.get("role") or "user", text=turn.get("text"), audio=absolute(turn.get("audio"))
    )


def _refuse_twin(row: Row, ids: dict[str, int], contents: dict[str, int]) -> None:
    """Raises ValueError for an id, or a pair of question and answer, that an earlier row has."""
    content = hashlib.sha256(repr((row.turns, row.answer_audio)).encode()).hexdigest()
    for what, seen, key in (("id", ids, row.id), ("question and answer", contents, content)):
        if key in seen:
            twin = f"id {shown(row.id)}" if what == "id" else f"the same {what}"
            raise ValueError(f"duplicate: {twin} is on line {seen[key]}")
    ids[row.id] = contents[content] = row.line


def check_files(row: Row) -> None:
    """The quick check: every file is there and has the header of a sound file. Raises ValueError naming the file."""
    for file in row.files:
        check_file(file)


def load_row(row: Row, processor: Processor, limits: VoiceLimits) -> Sounds:
    """Reads all sound and text of a row. Raises ValueError saying what cannot be read, is empty or silent, or does not fit."""
    config = processor.config
    text = processor.tokenizer.encode(row.answer_text)
    if not text:
        raise ValueError("answer_text has no tokens")
    if max(text) >= config.reasoner.vocab_size:
        raise ValueError(
            f"answer_text has token {max(text)} outside the vocabulary of {config.reasoner.vocab_size}"
        )
    text = np.array([*text, config.im_end_token_id], np.int32)
    answer = _speech(row.answer_audio, config)
    question = processor.question(list(row.turns))
    frames = num_frames(config, answer)
    _check_room(config, len(question.ids), len(text), frames + 1, limits)
    reference_ids, reference_frames = cut_voice(
        row.answer_text, frames, processor.tokenizer, limits
    )
    voice_ids, voice = np.zeros(0, np.int32), np.zeros(0, np.float32)
    if row.voice_audio is not None:
        voice = _speech(row.voice_audio, config)
        voice_ids, kept = cut_voice(
            row.voice_text, num_frames(config, voice), processor.tokenizer, limits
        )
        voice = voice[: kept * config.codec.frame_samples]
    return Sounds(question, text, answer, reference_ids, reference_frames, voice_ids, voice)


def num_frames(config: ChromaConfig, wave: np.ndarray) -> int:
    """Codec frames of a wave."""
    return -(-len(wave) // config.codec.frame_samples)


def _speech(file: str, config: ChromaConfig) -> np.ndarray:
    wave = load_audio(file, config.codec.sampling_rate)
    if np.abs(wave).max() < _SILENCE:
        raise ValueError(f"{file}: is silent")
    if len(wave) < config.codec.frame_samples:
        raise ValueError(f"{file}: {len(wave)} samples are less than one frame")
    return wave


def _check_room(
    config: ChromaConfig, question: int, text: int, frames: int, limits: VoiceLimits
) -> None:
    """Raises ValueError for a dialogue that the Reasoner, or the Backbone with the longest voice, cannot hold."""
    positions = config.reasoner.text.max_positions
    if question + text > positions:
        raise ValueError(
            f"too long: {question} question and {text} answer tokens, the Reasoner has {positions} positions"
        )
    positions = config.backbone.llama.max_positions
    # Tokens that speech has no room for are not in the sequence (see `schedule`).
    wanted = total_length(limits.max_tokens, limits.max_frames, min(text, -(-frames // 2)), frames)
    if wanted > positions:
        raise ValueError(
            f"too long: an answer of {frames} frames and {text} tokens after the longest voice takes {wanted} positions, "
            f"the Backbone has {positions}"
        )
