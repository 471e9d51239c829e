"""Lists of what is to be spoken: Seed-TTS-eval's `meta.lst`, or lines of JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

# Fields of a line of meta.lst, by their number.
_FIELDS = {
    2: ("name", "text"),
    3: ("name", "text", "prompt"),
    4: ("name", "prompt_text", "prompt", "text"),
    5: ("name", "prompt_text", "prompt", "text", "recording"),
}
_KEYS = ("name", "text", "prompt", "prompt_text", "recording", "speaker")


@dataclasses.dataclass(frozen=True)
class Item:
    """One text to be spoken."""

    name: str  # its WAV is <name>.wav
    text: str
    prompt: pathlib.Path | None = None  # a recording of the voice to speak in
    prompt_text: str | None = None  # what it says
    recording: pathlib.Path | None = None  # a human speaking the text in that voice
    speaker: str | None = None  # whose voice it is, where that is known


def read_list(path: str | os.PathLike) -> list[Item]:
    """The items of a list, in order; paths in it are relative to it.

    A line of `meta.lst` has 2 to 5 fields between `|`: name and text; name, text, prompt WAV; name, prompt text, prompt WAV,
    text; and with the human recording of the text. A file that ends in `.jsonl` has objects with `name` and `text`, and as
    they are known `prompt`, `prompt_text`, `recording`, `speaker`.

    Raises ValueError naming file and line: foreign layouts, empty texts, names twice or unfit for a file, sounds that are not there.
    """
    path = pathlib.Path(path)
    lines = read_lines(path)
    parse = _from_json if path.suffix == ".jsonl" else _from_fields
    items, seen = [], {}
    for number, line in lines:
        where = f"{path}:{number}"
        given = parse(line, where)
        name, text = given["name"].strip(), given["text"].strip()
        if not name or name in (".", "..") or set(name) & set('/\\:*?"<>|\0'):
            raise ValueError(f"{where}: {name[:60]!r} cannot name a file")
        if not text:
            raise ValueError(f"{where}: {name} has no text")
        if name in seen:
            raise ValueError(f"{where}: the name {name} is on line {seen[name]} already")
        seen[name] = number
        sounds = {k: path.parent / given[k] for k in ("prompt", "recording") if given.get(k)}
        items.append(
            Item(
                name, text, sounds.get("prompt"), given.get("prompt_text") or None, sounds.get("recording"),
                given.get("speaker"),
            )
        )  # fmt: skip
    check_files(path, [s for item in items for s in (item.prompt, item.recording) if s])
    return items


def read_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """(number, line) of the lines that are not blank. Raises ValueError for no such file, none of them, or foreign bytes."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as e:
        raise ValueError(f"no such file: {path}") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: is not UTF-8 text") from e
    except IsADirectoryError as e:
        raise ValueError(f"{path}: is a directory, wanted a list") from e
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: has no lines")
    return lines


def read_object(line: str, where: str) -> dict[str, Any]:
    """A line of JSON that is an object. Raises ValueError saying where it is not."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: is not JSON: {e}") from e
    if not isinstance(found, dict):
        raise ValueError(f"{where}: wanted an object, got {type(found).__name__}")
    return found


def check_files(path: pathlib.Path, files: list[pathlib.Path]) -> None:
    """Raises ValueError naming the first of the files that is not there, and how many there are of that kind."""
    absent = [f for f in dict.fromkeys(files) if not f.is_file()]
    if absent:
        raise ValueError(f"{path}: {len(absent)} of its sound files are not there, as {absent[0]}")


def digest(*paths: str | os.PathLike) -> str:
    """The first 12 digits of the SHA-256 of files one after the other."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(pathlib.Path(path).read_bytes())
    return sha.hexdigest()[:12]


def _from_fields(line: str, where: str) -> dict[str, str]:
    fields = [f.strip() for f in line.rstrip("\r").split("|")]
    if len(fields) not in _FIELDS:
        raise ValueError(
            f"{where}: wanted 2 to 5 fields between |, as name|prompt text|prompt.wav|text, got {len(fields)}"
        )
    return dict(zip(_FIELDS[len(fields)], fields, strict=True))


def _from_json(line: str, where: str) -> dict[str, str]:
    found = read_object(line, where)
    unknown = sorted(set(found) - set(_KEYS))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    for key, value in found.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be text, got {type(value).__name__}")
    for key in ("name", "text"):
        if not found.get(key):
            raise ValueError(f"{where}: has no {key}")
    return found
