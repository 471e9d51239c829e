"""Words that are still being written become the tokens that they become when they are known, and reach the rows in order."""

import numpy as np
import pytest

from chroma_jax.audio.tokenizer import tiny_tokenizer
from chroma_jax.config import tiny
from chroma_jax.engine import script as module
from chroma_jax.engine.script import PLACES, Prompter, Script

END = 7


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(tiny())


class Words:
    """A tokenizer whose tokens are as long as they can be, by the pattern of the Qwen models."""

    def __init__(self):
        self.vocabulary: dict[str, int] = {}

    def encode(self, text):
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Split

        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        words = Split(Regex(pattern), "isolated").pre_tokenize_str(text)
        return [self.vocabulary.setdefault(word, len(self.vocabulary) + 10) for word, _ in words]


TEXTS = [
    "Good morning, how are you? It's 12 o'clock.",
    "  two  spaces, a tab\t and\n\nlines\r\n  end  ",
    "你好，世界。今天天气很好！ Ça va? naïve e\u0301te\u0301",
    "x",
    "123 456,789 -- (yes) [no] don't they'll",
    "...",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_cut_gives_the_tokens_of_the_whole(text):
    words = Words()
    want = [*words.encode(text), END]
    rng = np.random.default_rng(0)
    for trial in range(30):
        cuts = np.sort(rng.integers(0, len(text) + 1, rng.integers(0, 6)))
        script, got = Script(), []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            script.write(text[start:stop])
            if trial % 2:
                got += script.tokens(words, END)
        assert not script.read
        script.close()
        got += script.tokens(words, END)
        assert got == want
        assert script.read and script.tokens(words, END) == []


def test_words_are_not_held_back_longer_than_needed(tokenizer):
    script = Script()
    for text, told in (("Good", ""), (" mor", "Good"), ("ning, ", " morning"), ("你好", ""), ("。", ", 你好")):  # fmt: skip
        script.write(text)
        assert tokenizer.decode(script.tokens(tokenizer, END)) == told


@pytest.mark.parametrize("bad", [None, 3, b"x", ["x"], True], ids=str)
def test_what_is_no_text_is_named(bad):
    with pytest.raises(ValueError, match="must be text"):
        Script().write(bad)
    if bad is not None:
        with pytest.raises(ValueError, match="must be text"):
            Script(bad)


def test_a_script_is_written_to_its_end_and_said_once():
    with pytest.raises(ValueError, match="nothing to say"):
        Script(" \n")
    script = Script("Yes.")
    with pytest.raises(ValueError, match="closed"):
        script.write("No.")
    script.claim()
    with pytest.raises(ValueError, match="said once"):
        script.claim()


@pytest.mark.parametrize("seed", range(3))
def test_rows_get_their_words_in_order_and_before_they_need_them(tokenizer, seed):
    """Against a device that speaks: rows come, are written for, wait for words, and go."""
    rng = np.random.default_rng(seed)
    rows, beats = 3, int(rng.integers(1, 17))
    prompter = Prompter(rows, tokenizer, END)
    tokens, end = np.zeros((rows, PLACES), int), np.zeros(rows, int)  # what the device has
    texts, scripts, spoken, said = [None] * rows, [None] * rows, np.zeros(rows, int), 0
    for _ in range(400):
        for row in range(rows):
            if texts[row] is None and rng.random() < 0.2:
                length = int(rng.integers(1, 300))
                texts[row] = "".join(rng.choice(list("ab ,.")) for _ in range(length)) + "z"
                scripts[row] = Script()
                prompter.enter(row, scripts[row])
                spoken[row] = end[row] = 0  # a new row comes with no place filled
                texts[row] = [texts[row], 0]
            elif texts[row] is not None and not scripts[row].closed:
                text, at = texts[row]
                more = int(rng.integers(0, 40))
                scripts[row].write(text[at : at + more])
                texts[row][1] = at + more
                if at + more >= len(text):
                    scripts[row].close()
        moving = np.array([t is not None for t in texts])
        moving &= ~np.array([prompter.starved(row, beats) for row in range(rows)])
        forced = prompter.forced()
        if forced is not None:
            tokens, end = forced.tokens, forced.end
        prompter.speak(moving, beats)
        for row in np.flatnonzero(moving):
            want = [*tokenizer.encode(texts[row][0]), END]
            for _ in range(beats):
                if spoken[row] < len(want):
                    assert spoken[row] < end[row]
                    assert tokens[row, spoken[row] % PLACES] == want[spoken[row]]
                    spoken[row] += 1
            if spoken[row] == len(want):
                texts[row], said = None, said + 1
                prompter.enter(row, None)
    assert said > 5


def test_the_cut_is_behind_letters():
    assert module._certain("it's") == 2
    assert module._certain("e\u0301") == 0
    assert module._certain("12 ") == 0
