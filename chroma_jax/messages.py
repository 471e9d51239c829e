"""Errors that stay one readable line, whatever they are about. Only the standard library."""

from __future__ import annotations

LONGEST = 200  # characters of an error


def shorten(text: object, limit: int = LONGEST) -> str:
    """The text in one line of at most `limit` characters: what is too much is left out of the middle."""
    line = " ".join(str(text).split())
    if len(line) <= limit:
        return line
    # What is wrong tends to stand first, and what to do about it last.
    head = (limit - 3) * 3 // 5
    return f"{line[:head]}...{line[len(line) - (limit - 3 - head) :]}"


def shown(value: object, limit: int = 60) -> str:
    """A value as an error shows it: its `repr`, shortened."""
    # Of something huge, the beginning is enough to make a repr of.
    long = isinstance(value, str | bytes | bytearray) and len(value) > 4 * limit
    return shorten(repr(value[: 4 * limit] if long else value), limit)
