"""Errors stay one readable line."""

import ast
import pathlib

import pytest

import chroma_jax
from chroma_jax import messages


def test_short_text_stays():
    assert messages.shorten("no\n  such file ") == "no such file"


@pytest.mark.parametrize("limit", [20, 199, 200])
def test_long_text_keeps_both_ends(limit):
    got = messages.shorten("begin " + "x" * 10_000 + " end", limit)
    assert len(got) == limit
    assert got.startswith("begin")
    assert got.endswith(" end")


@pytest.mark.parametrize(
    ("value", "want"), [("a", "'a'"), (b"a", "b'a'"), ([1, 2], "[1, 2]"), (None, "None")]
)
def test_shown(value, want):
    assert messages.shown(value) == want


@pytest.mark.parametrize("value", ["x" * 10**7, b"x" * 10**7, list(range(1000))], ids=type)
def test_shown_is_short(value):
    assert len(messages.shown(value)) <= 60


def written(node: ast.AST) -> int:
    """Characters of a message that stand in the source."""
    if isinstance(node, ast.Constant):
        return len(node.value) if isinstance(node.value, str) else 0
    if isinstance(node, ast.JoinedStr):
        return sum(map(written, node.values))
    if isinstance(node, ast.BinOp):
        return written(node.left) + written(node.right)
    return 0


def test_no_error_is_long_before_it_says_what_it_got():
    """Names and values come on top of what the source holds, so that must leave them room."""
    root = pathlib.Path(chroma_jax.__file__).parent
    long = []
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                length = sum(map(written, node.exc.args))
                if length > 170:
                    long.append(f"{file.relative_to(root)}:{node.lineno}: {length}")
    assert not long
