"""What is to be spoken: a conversation up to a question, and its answer."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """One turn. A `spoken` line of the user becomes sound; the assistant's earlier lines stay text."""

    role: str  # "user" or "assistant"
    text: str
    spoken: bool = True


class Script(NamedTuple):
    """A row before it is spoken."""

    turns: tuple[Line, ...]  # the question last
    answer: str
    split: str  # "train" or "validation"
    kind: str  # of question, to count by
    apart: str = ""  # what of it was kept apart from training

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return self.turns[-1].text


class UnwritableError(ValueError):
    """A row for which the writer has no usable text; the message is the reason to count it under."""
