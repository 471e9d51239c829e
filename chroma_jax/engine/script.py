"""Words for the model to say: known whole, or while somebody else is still writing them.

    script = Script()                  # e.g. what another language model says
    script.write("Good morn")
    script.write("ing, ")
    script.close()

A `Script` is text on the host; a `Prompter` gives its tokens to the rows of a running batch, ahead of
what they speak.

Axes: B rows, W places for tokens.
"""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from chroma_jax.audio.tokenizer import Tokenizer
from chroma_jax.engine.state import Forced

PLACES = 64  # W: tokens that a row can be given ahead


class Script:
    """A text that is written piece by piece and read once. Writer and reader may be different threads.

    Its tokens are those of the whole text, however it was cut: a word becomes tokens when it is clear
    that it is complete.

    Args:
      text: the whole text; None for one that will be written.

    Raises:
      ValueError: a whole text without a word, or something else than text.
    """

    def __init__(self, text: str | None = None):
        self._lock = threading.Lock()
        self._text = ""  # written, but not yet read
        self._closed = threading.Event()
        self._read = self._claimed = False
        self._on_write: Callable[[], None] = lambda: None
        if text is not None:
            if isinstance(text, str) and not text.strip():
                raise ValueError(f"there is nothing to say in {text!r:.60}")
            self.write(text)
            self.close()

    def write(self, text: str) -> None:
        """Adds to the text. Raises ValueError for what is no text, and after `close`."""
        if not isinstance(text, str):
            raise ValueError(f"what is to be said must be text, got {text!r:.60}")
        with self._lock:
            if self._closed.is_set():
                raise ValueError("the script is closed: nothing can be added to it")
            self._text += text
        self._on_write()

    def close(self) -> None:
        """Nothing follows."""
        with self._lock:
            self._closed.set()
        self._on_write()

    def claim(self) -> None:
        """Marks the script as that of one request. Raises ValueError the second time."""
        with self._lock:
            if self._claimed:
                raise ValueError("a script is said once: make another one")
            self._claimed = True

    @property
    def text(self) -> str:
        """What has been written and not yet read."""
        return self._text

    @property
    def closed(self) -> bool:
        """Whether nothing follows."""
        return self._closed.is_set()

    def release(self) -> None:
        """The request that had it came to nothing: another one may have it."""
        self._claimed = False

    def wait(self) -> None:
        """Waits until nothing follows."""
        self._closed.wait()

    @property
    def read(self) -> bool:
        """Whether `tokens` has given everything."""
        return self._read

    def tokens(self, tokenizer: Tokenizer, end: int) -> list[int]:
        """The tokens that have become certain since the last call; at the end of the text, `end` follows."""
        with self._lock:
            if self._read:
                return []
            if self._closed.is_set():
                text, self._text, self._read = self._text, "", True
                return [*tokenizer.encode(text), end]
            cut = _certain(self._text)
            text, self._text = self._text[:cut], self._text[cut:]
        return tokenizer.encode(text) if text else []

    def watch(self, on_write: Callable[[], None]) -> None:
        """Calls `on_write` after every change."""
        self._on_write = on_write


def _certain(text: str) -> int:
    """Characters of a text whose tokens no continuation changes: up to the last end of a run of letters.

    Tokenizers cut a text into words before they look for tokens. A run of letters ends a word whatever
    follows it but letters, digits and combining marks.
    """
    for i in range(len(text) - 1, 0, -1):
        follows = text[i]
        if text[i - 1].isalpha() and not follows.isalnum() and unicodedata.category(follows)[0] != "M":  # fmt: skip
            return i
    return 0


class Prompter:
    """What the rows of a running batch are given to speak, kept a little ahead of them.

    Args:
      rows: B of the batch.
      tokenizer: of the scripts.
      end: the token that ends a text.
    """

    def __init__(self, rows: int, tokenizer: Tokenizer, end: int):
        self._tokenizer, self._end_token = tokenizer, end
        self._scripts: list[Script | None] = [None] * rows
        self._waiting: list[list[int]] = [[] for _ in range(rows)]  # read, without a place yet
        self._tokens = np.zeros((rows, PLACES), np.int32)
        self._end = np.zeros(rows, np.int32)
        self._spoken = np.zeros(rows, np.int32)  # tokens that dispatched beats have used
        self._changed = False

    def enter(self, row: int, script: Script | None) -> None:
        """The row begins a reply, with these words or its own."""
        # A new row comes with no place filled, and most rows speak their own words.
        self._changed |= script is not None
        self._scripts[row], self._waiting[row] = script, []
        self._end[row] = self._spoken[row] = 0

    def starved(self, row: int, beats: int = 1) -> bool:
        """Whether the row's words of so many more beats are not all known yet."""
        script = self._scripts[row]
        if script is None:
            return False
        self._waiting[row] += script.tokens(self._tokenizer, self._end_token)
        ahead = self._end[row] + len(self._waiting[row]) - self._spoken[row]
        return not script.read and ahead < beats

    def forced(self) -> Forced | None:
        """What the device should have now; None where it has that."""
        for row, waiting in enumerate(self._waiting):
            if not waiting:
                continue
            room = PLACES - (self._end[row] - self._spoken[row])
            # A few at a time: the arrays travel as a whole.
            if len(waiting) > room and room < PLACES // 2:
                continue
            count = min(room, len(waiting))
            places = (self._end[row] + np.arange(count)) % PLACES
            self._tokens[row, places] = waiting[:count]
            self._end[row] += count
            del waiting[:count]
            self._changed = True
        if not self._changed:
            return None
        self._changed = False
        return Forced(self._tokens.copy(), self._end.copy())

    def speak(self, rows: Sequence[bool], beats: int) -> None:
        """So many beats of `rows` [B] have been dispatched."""
        for row, moves in enumerate(rows):
            if moves and self._scripts[row] is not None:
                self._spoken[row] += beats
