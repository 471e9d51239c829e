"""--config.KEY=VALUE on a command line: sets or clears any field of a typed configuration, whether its file names it or not.

A key is a dotted path of fields, as in train.optimizer.clip_norm. The field's type says how a value is read: text as it is,
numbers as numbers, rules and mappings as Python spells them. "None" clears: a field that may be None becomes so, another one goes
back to its default.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

_NEAR = 3  # keys that an error names


def split(argv: Sequence[str], flag: str = "config") -> tuple[list[str], list[tuple[str, str]]]:
    """(arguments without those of the form --flag.KEY=VALUE or --flag.KEY VALUE, their keys and values).

    Raises ValueError for a key without a value.
    """
    rest, changes = [], []
    arguments = iter(argv)
    for argument in arguments:
        found = re.fullmatch(rf"--?{re.escape(flag)}\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if argument == "--":
            return [*rest, argument, *arguments], changes
        if found is None:
            rest.append(argument)
            continue
        value = found[2] if found[2] is not None else next(arguments, None)
        if value is None:
            raise ValueError(f"{argument} has no value, as in {argument}=3")
        changes.append((found[1], value))
    return rest, changes


def override(
    cls: type, values: MutableMapping[str, Any], changes: Sequence[tuple[str, str]]
) -> None:
    """Changes nested mappings (or an ml_collections ConfigDict) that `config.read` makes a `cls` of, in place.

    Raises ValueError naming the key: it is unknown, or its value cannot be read.
    """
    with _writable(values):
        for key, text in changes:
            *parents, name = key.split(".")
            node, kind = values, cls
            for parent in parents:
                kind = _field(cls, kind, parent, key)
                if node.get(parent) is None:
                    node[parent] = {}
                node = node[parent]
            _set(node, name, _field(cls, kind, name, key), key, text, kind)


def keys(cls: type, prefix: str = "") -> list[str]:
    """All keys of a dataclass and of those inside it, dotted."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        kind, _ = _kind(hint)
        found.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            found += keys(kind, f"{prefix}{name}.")
    return found


@contextlib.contextmanager
def _writable(values: Any) -> Iterator[None]:
    """A ConfigDict takes new keys and other types meanwhile; references between its fields are followed as ever."""
    with contextlib.ExitStack() as stack:
        if hasattr(values, "unlocked"):
            stack.enter_context(values.unlocked())
            stack.enter_context(values.ignore_type())
        yield


def _kind(hint: Any) -> tuple[Any, bool]:
    """(the type, whether None is one of its values)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return options[0], type(None) in options


def _field(root: type, kind: Any, name: str, key: str) -> Any:
    """The type hint of field `name` in what a hint describes; of a mapping, that of its values."""
    kind, _ = _kind(kind)
    if typing.get_origin(kind) is not None and issubclass(typing.get_origin(kind), Mapping):
        return typing.get_args(kind)[1]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if name in hints:
            return hints[name]
    known = keys(root)
    last = key.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last]
    near += [k for k in difflib.get_close_matches(key, known, _NEAR) if k not in near]
    hint = f"; near it are {', '.join(near[:_NEAR])}" if near else ""
    raise ValueError(f"the configuration has no key {key}{hint}")


def _set(node: Any, name: str, hint: Any, key: str, text: str, parent: Any) -> None:
    kind, clears = _kind(hint)
    if text.lower() == "none" and not clears:
        fields = {f.name: f for f in dataclasses.fields(_kind(parent)[0])}
        if fields[name].default is dataclasses.MISSING:
            raise ValueError(f"{key} cannot be None: it has no default")
        node.pop(name, None)
        return
    node[name] = None if text.lower() == "none" else _read(kind, key, text)


def _read(kind: Any, key: str, text: str) -> Any:
    if kind is str:
        return text
    try:
        return kind(text) if kind in (int, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError) as e:
        wanted = {int: "a whole number", float: "a number"}.get(kind, "a Python literal")
        raise ValueError(f"{key} must be {wanted}, got {text!r}") from e
