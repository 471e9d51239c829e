"""Which parameters train: a list of path rules that covers every parameter exactly once.

A rule is (regular expression, what): "train" (float32 master weights, gradients, moments), "lora" (the kernel is frozen, two
small factors beside it train), "average" (no gradient: it follows averages of what the model computes, as codebooks do) or "freeze".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

TRAIN, FREEZE, LORA, AVERAGE = "train", "freeze", "lora", "average"

_NEVER = ((r"reasoner/.*", FREEZE), (r"codec/.*", FREEZE))
_KERNELS = r"(backbone|decoder)/llama/layers/(attention/[qkvo]|gate|up|down)"

STAGE_1 = ((r"backbone/.*", TRAIN), (r"decoder/.*", TRAIN), *_NEVER)
STAGE_2 = ((r"backbone/.*", FREEZE), (r"decoder/.*", TRAIN), *_NEVER)
REASONER = ((r"reasoner/.*", TRAIN), (r"backbone/.*", FREEZE), (r"decoder/.*", FREEZE), _NEVER[1])
_CODEBOOKS = r"codec/quantizer/.*/(embed_sum|cluster_usage|initialized)"
LORA_FINE_TUNING = (
    (_KERNELS, LORA),
    (r"(backbone|decoder)/llama/.*/?norm/scale|(backbone|decoder)/llama/layers/.*_norm/scale", FREEZE),
    (r"backbone/(audio_embedding|head)|decoder/(projection|heads)", FREEZE),
    *_NEVER,
)  # fmt: skip


def codec_rules(
    *, discriminator: bool = False, distillation: bool = False
) -> tuple[tuple[str, str], ...]:
    """The rules of objective "codec", for a model with these parts."""
    rules = (
        (_CODEBOOKS, AVERAGE),
        (r"codec/(?!quantizer).*|codec/quantizer/.*_proj", TRAIN),
    )
    if discriminator:
        rules += ((r"discriminator/.*", TRAIN),)
    if distillation:
        rules += ((r"distillation/.*", TRAIN), (r"audio_encoder/.*", FREEZE))
    return rules


class Selection(NamedTuple):
    """Path -> what, and which rule said so."""

    what: Mapping[str, str]
    rule: Mapping[str, str]

    def paths(self, what: str) -> list[str]:
        """The parameters under rules of that kind."""
        return [path for path, choice in self.what.items() if choice == what]


def select(rules: tuple[tuple[str, str], ...], paths: Any) -> Selection:
    """Applies rules to parameter paths; a rule matches whole paths.

    Raises:
      ValueError: an unknown kind, an expression that is none, a parameter under no rule or under several, a rule that
        matches nothing, a "lora" rule on what is no kernel of a block, or nothing that trains.
    """
    compiled = []
    for pattern, kind in rules:
        if kind not in (TRAIN, FREEZE, LORA, AVERAGE):
            raise ValueError(
                f"rule {pattern!r}: {kind!r} must be {TRAIN}, {FREEZE}, {LORA} or {AVERAGE}"
            )
        try:
            compiled.append((re.compile(pattern), kind))
        except re.error as e:
            raise ValueError(f"rule {pattern!r} is no regular expression: {e}") from e
    what, rule, unused = {}, {}, [pattern for pattern, _ in rules]
    for path in paths:
        found = [(p.pattern, kind) for p, kind in compiled if p.fullmatch(path)]
        if len(found) != 1:
            names = " and ".join(repr(pattern) for pattern, _ in found) or "no rule"
            raise ValueError(
                f"parameter {path} is matched by {names}; exactly one rule must match it"
            )
        rule[path], what[path] = found[0]
        if what[path] == LORA and not re.fullmatch(_KERNELS, path):
            raise ValueError(
                f"parameter {path} is under a {LORA} rule, which is for kernels of Backbone and Decoder blocks"
            )
        if what[path] == AVERAGE and not re.fullmatch(_CODEBOOKS, path):
            raise ValueError(
                f"parameter {path} is under an {AVERAGE} rule, which is for the Codec's codebooks"
            )
        unused = [pattern for pattern in unused if pattern != rule[path]]
    if unused:
        raise ValueError(f"rule {unused[0]!r} matches no parameter")
    if not {TRAIN, LORA} & set(what.values()):
        raise ValueError("no parameter trains: every rule says freeze")
    return Selection(what, rule)


def check_reached(selection: Selection, objective: str, stages: tuple[str, ...]) -> None:
    """Raises ValueError for a parameter that would train although the loss does not reach it: weight decay alone would move it.

    Args:
      selection: the rules applied.
      objective: its name, for the error.
      stages: first components of the paths that its loss reaches.
    """
    for path, what in selection.what.items():
        if what != FREEZE and path.split("/")[0] not in stages:
            raise ValueError(
                f"objective {objective!r} trains {' and '.join(stages)} only, but rule {selection.rule[path]!r} says "
                f"{what} for {path}"
            )


def summary(selection: Selection, frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """A table: what each rule covers, and the numbers and bytes of what is frozen and what trains.

    Args:
      selection: the rules applied.
      frozen: frozen arrays (or shapes) by path, LoRA's base kernels among them.
      trained: trained arrays by path; a LoRA factor's path begins with its kernel's. Bytes count master weights and
        two moments.
    """
    rows = [("rule", "what", "tensors", "parameters", "bytes")]
    for pattern in dict.fromkeys(selection.rule.values()):
        paths = {path for path, rule in selection.rule.items() if rule == pattern}
        what = selection.what[next(iter(paths))]
        kept = [leaf for path, leaf in frozen.items() if path in paths]
        moved = [
            leaf
            for path, leaf in trained.items()
            if path in paths or (what == LORA and path.rpartition("/")[0] in paths)
        ]
        if kept:
            rows.append((pattern, "base" if what == LORA else what, *_count(kept, 1)))
        if moved:
            rows.append((pattern, what, *_count(moved, 3)))
    rows.append(("total trained", "", *_count(trained.values(), 3)))
    rows.append(("total frozen", "", *_count(frozen.values(), 1)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _count(leaves: Any, copies: int) -> tuple[str, str, str]:
    leaves = list(leaves)
    size = sum(leaf.size for leaf in leaves)
    nbytes = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves) * copies
    return str(len(leaves)), f"{size:,}", f"{nbytes:,}"
