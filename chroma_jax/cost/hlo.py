"""Reads what a compiled program really does from its HLO text: XLA's own cost analysis counts the body of a loop once.

A program is a list of computations. The entry runs once, the body of a `while` as often as its condition's bound says (loops
made by lax.scan count from 0), what it calls as often as itself.

A collective runs beside other work if it is in two halves (-start and -done) or inside fusions that compute as well; one that
stands alone in the schedule holds everything up.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+,\d+)\}")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(")
# These move nothing, or their parts are counted by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
    "partition-id", "after-all", "copy-done",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    result: str
    op: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split("), ")[0])

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%([\w.-]+)", self.rest)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective of the program.

    Attributes:
      kind: one of `_COLLECTIVES`.
      runs: how often it runs.
      nbytes: the larger of operand and result, each time.
      group: the partitions of one of its groups; None: all of them.
      overlapped: whether it runs beside other work.
    """

    kind: str
    runs: int
    nbytes: int
    group: tuple[int, ...] | None
    overlapped: bool


class Kernel(NamedTuple):
    """A Pallas kernel in the program: its name, how often it runs, and the shapes of its operands."""

    name: str
    runs: int
    operands: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Counts:
    """Per device and run of the program.

    Attributes:
      transfers: the collectives.
      kernels: Pallas kernels.
      hbm_bytes: read from and written to main memory by fusions and operations outside them, and by kernels, as if these read
        each operand once.
      cycles: what the compiler estimates for them, summed; None where it does not say. Collectives that stand alone and
        kernels are not in it.
    """

    transfers: tuple[Transfer, ...]
    kernels: tuple[Kernel, ...]
    hbm_bytes: int
    cycles: int | None

    @property
    def collectives(self) -> dict[str, tuple[int, int]]:
        """Kind -> (how many, bytes)."""
        out: dict[str, tuple[int, int]] = {}
        for t in self.transfers:
            number, total = out.get(t.kind, (0, 0))
            out[t.kind] = (number + t.runs, total + t.runs * t.nbytes)
        return dict(sorted(out.items()))


def count(text: str) -> Counts:
    """Counts from the text of an optimized module (`compiled.as_text()`)."""
    computations, entry = _parse(text)
    times: dict[str, int] = defaultdict(int)
    scheduled: set[str] = set()
    todo = [(entry, 1, True)]
    while todo:
        name, factor, is_scheduled = todo.pop()
        times[name] += factor
        if is_scheduled:
            scheduled.add(name)
        for instruction in computations[name]:
            for callee, repeats in _callees(instruction, computations):
                runs = is_scheduled and instruction.op in ("while", "call", "conditional")
                todo.append((callee, factor * repeats, runs))

    cycles, moved, kernels = 0, 0, []
    channels: dict[tuple[str, str], Transfer] = {}
    for name, instructions in computations.items():
        if name not in times:
            continue
        results = {i.name: i.result for i in instructions}
        for instruction in instructions:
            if instruction.op.removesuffix("-start") in _COLLECTIVES:
                kind, nbytes = _collective(name, instruction, results)
                apart = name in scheduled and not instruction.op.endswith("-start")
                found = Transfer(
                    kind,
                    times[name],
                    nbytes,
                    _group(instruction.rest),
                    overlapped=not apart and "all-reduce-scatter" not in name,
                )
                # Asynchronous pieces of one collective repeat it under the same channel.
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                key = (kind, channel[1] if channel else f"{name}/{instruction.name}")
                channels[key] = _merged(channels.get(key, found), found)
            if name in scheduled:
                estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
                if instruction.op != "while" and estimate:
                    cycles += int(estimate[1]) * times[name]
                moved += _hbm_bytes(instruction, results, computations) * times[name]
                if 'custom_call_target="tpu_custom_call"' in instruction.rest:
                    shapes = (_dims(results.get(operand, "")) for operand in instruction.operands)
                    kernels.append(Kernel(instruction.name, times[name], tuple(shapes)))
    return Counts(tuple(channels.values()), tuple(kernels), moved, cycles or None)


def parameter_bytes(text: str) -> int:
    """Bytes of the arguments of an optimized module, without what their layouts add."""
    computations, entry = _parse(text)
    return sum(_size(i.result, True) for i in computations[entry] if i.op == "parameter")


def _merged(a: Transfer, b: Transfer) -> Transfer:
    return Transfer(
        a.kind,
        max(a.runs, b.runs),
        max(a.nbytes, b.nbytes),
        a.group or b.group,
        a.overlapped and b.overlapped,
    )


def _group(rest: str) -> tuple[int, ...] | None:
    """The first group of a collective, in any of the ways that XLA writes them; None: all, or not understood."""
    numbers = lambda text: [int(n) for n in text.split(",") if n]  # noqa: E731
    if found := _GROUPS.search(rest) or _PAIRS.search(rest):
        return tuple(numbers(found[1])) or None
    if found := _IOTA_GROUPS.search(rest):
        dims = numbers(found[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose(numbers(found[3])) if found[3] else ids
        return tuple(ids.reshape(-1, int(found[1]))[0].tolist())
    if found := _MESH_GROUPS.search(rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = found[2].replace("'", "").replace(" ", "").split(",")
        if not set(axes) <= set(sizes):
            return None  # parts of an axis
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return tuple(ids[tuple(slice(None) if n in axes else 0 for n in sizes)].ravel().tolist())
    return None


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(Instruction(*found.groups(), root="ROOT %" in line[:12]))
    return computations, entry


def _callees(instruction: Instruction, computations) -> Iterator[tuple[str, int]]:
    if instruction.op == "while":
        condition, body = instruction.attribute("condition"), instruction.attribute("body")
        bounds = [
            int(found[1])
            for i in computations.get(condition, ())
            if i.op == "constant" and (found := re.match(r"(\d+)\)", i.rest))
        ]
        yield body, max(bounds, default=1)
        return
    for name in ("calls", "to_apply"):
        callee = instruction.attribute(name)
        if callee in computations:
            yield callee, 1
    if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
        for callee in re.findall(r"%([\w.-]+)", branches[1]):
            yield callee, 1


def _size(result: str, everywhere: bool = False) -> int:
    """Bytes of a result in main memory (layouts in other memories carry S(n)), or anywhere."""
    total = 0
    for kind, dims, layout in _SHAPE.findall(result):
        if everywhere or "S(" not in (layout or ""):
            width = 1 if kind.startswith("f8") else _BYTES.get(kind, 4)
            total += width * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _dims(result: str) -> tuple[int, ...]:
    """The shape of a result that is one array; () of others."""
    found = _SHAPE.findall(result)
    return tuple(int(n) for n in found[0][1].split(",") if n) if len(found) == 1 else ()


def _collective(computation: str, instruction: Instruction, results) -> tuple[str, int]:
    kind = instruction.op.removesuffix("-start")
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"
    operands = sum(_size(results.get(name, ""), True) for name in instruction.operands)
    # The result of a -start holds the operand too.
    result = _size(instruction.result, True)
    return kind, max(operands, result - operands if instruction.op.endswith("-start") else result)


def _hbm_bytes(instruction: Instruction, results, computations) -> int:
    if instruction.op in _FREE or instruction.op.endswith(("-done", "-update")):
        return 0
    if instruction.op in ("slice", "dynamic-slice", "gather"):
        return 2 * _size(instruction.result)
    if instruction.op == "dynamic-update-slice":
        return 2 * _size(results.get(instruction.operands[1], ""))
    if instruction.op == "copy-start":
        # Result: destination, source, context. One is read, the other written.
        return _size(instruction.result)
    inside = computations.get(instruction.attribute("calls") or "", ())
    result = instruction.result
    if instruction.op == "async-start" and inside:
        result = inside[-1].result  # its own holds the operands and a context, too
    # Of what is updated in place only the new part is written, and the buffer that it goes into is not read.
    written, in_place = _size(result), []
    for update, whole in _updates(inside, result):
        shapes = {i.name: i.result for i in inside}
        written += min(0, _size(shapes.get(update.operands[1], ""), True) - whole)
        in_place.append(_origin(update.operands[0], inside))
    read = 0
    for index, operand in enumerate(instruction.operands):
        name = _parameter(inside, index)
        if name is not None and name in in_place:
            continue
        size = _size(results.get(operand, ""))
        part = None if name is None else _part_read(name, inside, computations)
        read += size if part is None else min(size, part)
    return read + written


def _updates(inside, result: str) -> Iterator[tuple[Instruction, int]]:
    """The dynamic-update-slices among a fusion's results, with the bytes of each of those in main memory."""
    by_name = {i.name: i for i in inside}
    root = next((i for i in inside if i.root), None)
    if root is None:
        return
    names = root.operands if root.op == "tuple" else [root.name]
    for name, shape in zip(names, _SHAPE.finditer(result), strict=False):
        found = by_name.get(_origin(name, inside))
        if found is not None and found.op == "dynamic-update-slice" and len(found.operands) > 1:
            yield found, _size(shape[0])


def _origin(name: str, inside) -> str:
    """The instruction behind any bitcasts."""
    by_name = {i.name: i for i in inside}
    while name in by_name and by_name[name].op == "bitcast":
        name = by_name[name].operands[0]
    return name


def _parameter(inside, index: int) -> str | None:
    """The name of a computation's parameter."""
    found = (i.name for i in inside if i.op == "parameter" and i.rest.startswith(f"{index})"))
    return next(found, None)


def _part_read(name: str, inside, computations) -> int | None:
    """Bytes that a computation reads of a value of which it takes parts only; None: it reads all. Fusions nest."""
    total = 0
    for user in (i for i in inside if name in i.operands):
        if user.op in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
            total += _size(user.result, True)
            continue
        if user.op == "bitcast" and not user.root:
            part = _part_read(user.name, inside, computations)
        elif user.op == "fusion" and user.operands.count(name) == 1:
            within = computations.get(user.attribute("calls") or "", ())
            parameter = _parameter(within, user.operands.index(name))
            part = parameter and _part_read(parameter, within, computations)
        else:
            part = None
        if part is None:
            return None
        total += part
    return total
