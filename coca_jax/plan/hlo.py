"""Parse a compiled program (XLA's HLO text): collective traffic by kind, and memory traffic.

XLA's own `cost_analysis` counts the body of a loop once, and our layers are loops. Here each instruction counts as
often as its loops run. Figures are per chip, since a partitioned program is what one chip runs.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PRODUCTS = ("convolution", "dot")  # TPU programs express all products as convolutions
_SENDING = (*COLLECTIVES, *(f"{kind}-start" for kind in COLLECTIVES))

# They move nothing, or their traffic is counted at their users.
_FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "opt-barrier"),
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one chip moves in one run of a program.

    Attributes:
      collectives: Bytes sent by a chip, by kind. With ring algorithms over g chips and an array of total size s:
        all-gather, reduce-scatter and all-to-all send s (g - 1) / g, all-reduce twice that, a permutation its operand.
      exposed: Bytes of synchronous collectives, which the program waits for.
      hbm: Bytes read from and written to the chip's main memory; scratch memory is not counted.
      hbm_of: `hbm` by kind of instruction: its opcode, or the target of a custom call.
      hbm_apart: Bytes of instructions without a matrix product, except kernels, collectives and background transfers;
        no product runs meanwhile.
      product_cycles: Clock cycles that the compiler expects for instructions with a matrix product, including their
        memory traffic; 0 if it does not say (only TPU programs do, and not for kernels). The compiler's figures for
        other instructions are not used: they are several times what memory and vector unit would take.
      unknown_loops: Loops with an unknown trip count, which are counted as one iteration.
    """

    collectives: dict[str, float]
    exposed: float
    hbm: float
    hbm_of: dict[str, float]
    hbm_apart: float
    product_cycles: float
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes after the operands
    text: str  # text between the parentheses
    root: bool

    @property
    def calls(self) -> list[str]:
        branches = _BRANCHES.search(self.rest)
        names = [n.strip().lstrip("%") for n in branches.group(1).split(",")] if branches else []
        return names + _CALLS.findall(self.rest)

    @property
    def kind(self) -> str:
        """Opcode, or the target of a custom call."""
        target = _TARGET.search(self.rest) if self.opcode == "custom-call" else None
        return target.group(1) if target else self.opcode

    @property
    def arrays(self) -> list[tuple[float, bool]]:
        """Size in bytes, and whether it is in main memory, for each array of the result."""
        return [
            (_bytes(*found.groups()[:2]), "S(" not in (found.group(3) or "")) for found in _ARRAY.finditer(self.shape)
        ]

    @property
    def size(self) -> float:
        return sum(size for size, _ in self.arrays)

    @property
    def in_hbm(self) -> float:
        return sum(size for size, is_in_hbm in self.arrays if is_in_hbm)


Computation = dict[str, _Instruction]


def traffic(text: str, chips: int) -> Traffic:
    """Count the traffic of a compiled program.

    Args:
      text: `compiled.as_text()` of a partitioned program.
      chips: Chips of the whole program, for collectives without replica groups.

    Raises:
      ValueError: The text has no entry computation.
    """
    computations, entry = _parse(text)
    sent: dict[str, float] = dict.fromkeys(COLLECTIVES, 0.0)
    hbm: dict[str, float] = collections.defaultdict(float)
    exposed, apart, cycles, unknown = 0.0, 0.0, 0.0, 0
    with_products, with_collectives = (_containing(computations, opcodes) for opcodes in (_PRODUCTS, _SENDING))

    def visit(name: str, times: float) -> None:
        nonlocal exposed, apart, cycles, unknown
        for size, kind, waits in _collectives(computations, name, chips):
            sent[kind] += times * size
            exposed += times * size if waits else 0.0
        here = computations[name]
        for instruction in here.values():
            moved = _memory(computations, here, instruction)
            if moved:
                hbm[instruction.kind] += times * moved
            if instruction.opcode in _PRODUCTS or with_products.intersection(instruction.calls):
                estimate = _CYCLES.search(instruction.rest)
                cycles += times * float(estimate.group(1)) if estimate else 0.0
            elif not (
                instruction.opcode.endswith("-start")
                or instruction.opcode in ("custom-call", *_SENDING)
                or with_collectives.intersection(instruction.calls)
            ):
                apart += times * moved
            if instruction.opcode == "while":
                trip_count = _trip_count(computations, instruction)
                unknown += trip_count is None
                visit(_called(instruction, "body"), times * (1 if trip_count is None else trip_count))
            elif instruction.opcode in ("call", "conditional"):
                # One branch runs; count the first.
                for callee in instruction.calls[:1]:
                    visit(callee, times)

    visit(entry, 1.0)
    return Traffic(sent, exposed, sum(hbm.values()), dict(hbm), apart, cycles, unknown)


def _containing(computations: dict[str, Computation], opcodes: Sequence[str]) -> set[str]:
    """Names of computations that contain one of these opcodes, directly or in a fusion."""
    found: set[str] = set()

    def holds(i: _Instruction) -> bool:
        return i.opcode in opcodes or (i.opcode == "fusion" and bool(found.intersection(i.calls)))

    while True:
        added = {name for name, c in computations.items() if name not in found and any(map(holds, c.values()))}
        if not added:
            return found
        found |= added


# ---------------------------------------------------------------------------------------------------------------------
# Text -> instructions


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations[header.group(2)] = {}
                entry = header.group(2) if header.group(1) else entry
        elif line.rstrip() == "}":
            current = None
        elif found := _NAME.match(line):
            shape, end = _balanced(line, found.end())
            opening = line.index("(", end)
            operands, close = _balanced(line, opening)
            current[found.group(2)] = _Instruction(
                name=found.group(2),
                shape=shape,
                opcode=line[end:opening].strip(),
                operands=tuple(_OPERAND.findall(operands)),
                rest=line[close:],
                text=operands[1:-1],
                root=bool(found.group(1)),
            )
    if not entry:
        raise ValueError("the text has no ENTRY computation: pass compiled.as_text()")
    return computations, entry


def _balanced(line: str, start: int) -> tuple[str, int]:
    """The parenthesized part, or otherwise the token, that starts at `start`, and its end."""
    if line[start] != "(":
        end = line.index(" ", start)
        return line[start:end], end
    depth = 0
    for at in range(start, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if not depth:
            return line[start : at + 1], at + 1
    raise ValueError(f"parentheses do not close: {line[:200]}")


def _bytes(kind: str, sizes: str) -> float:
    """Bytes of an array such as `bf16` with sizes `8,128`; 0 for tokens and the like."""
    bits = 8 if kind == "pred" else int(found.group()) if (found := re.search(r"\d+", kind)) else 0
    return math.prod(int(size) for size in sizes.split(",") if size) * bits / 8


def _called(instruction: _Instruction, role: str) -> str:
    found = re.search(rf"\b{role}=%?([\w.\-]+)", instruction.rest)
    assert found, f"{instruction.opcode} {instruction.name} has no {role}"
    return found.group(1)


def _trip_count(computations: dict[str, Computation], loop: _Instruction) -> int | None:
    """Iterations of a loop: its annotation, or the limit its counter is compared with (scans count from 0)."""
    if known := re.search(r'"?known_trip_count"?:?=?\{"?n"?:"?(\d+)', loop.rest):
        return int(known.group(1))
    condition = computations[_called(loop, "condition")]
    bodies = [condition, *(computations[c] for i in condition.values() for c in i.calls)]
    compared = [i for body in bodies for i in body.values() if i.opcode == "compare"]
    limits = [int(i.text) for i in condition.values() if i.opcode == "constant" and re.fullmatch(r"\d+", i.text)]
    return limits[0] if len(compared) == len(limits) == 1 and "direction=LT" in compared[0].rest else None


# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def _collectives(computations: dict[str, Computation], name: str, chips: int) -> Iterator[tuple[float, str, bool]]:
    """Bytes sent, kind and whether it is synchronous, for each collective of one loop body or of the entry.

    An asynchronous collective appears in several fusions, from its start to its end, with equal channel and chain ids;
    it is counted once.
    """
    found: dict[tuple[str, ...], tuple[float, str, bool]] = {}
    stack = [(name, "")]
    while stack:
        computation, fused = stack.pop()
        here = computations[computation]
        chained = "async_collective" in fused or any("AsyncCollective" in i.rest for i in here.values())
        for i in here.values():
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                group = _group(i, chips)
                # TPU programs express a reduce-scatter as a fusion of an all-reduce and a slice.
                kind = "reduce-scatter" if "all-reduce-scatter" in fused else kind
                labels = re.findall(r'(?:channel_id=|chain_id=")(\d+)', i.rest)
                key = ("chain", kind, *labels) if chained else (computation, i.name)
                found[key] = (_sent(here, i, kind, group), kind, not (chained or i.opcode.endswith("-start")))
            elif i.opcode in ("fusion", "async-start"):
                stack += [(callee, f"{fused} {callee}") for callee in i.calls if callee in computations]
    yield from found.values()


def _sent(here: Computation, i: _Instruction, kind: str, group: int) -> float:
    operand_bytes = sum(here[o].size for o in i.operands if o in here)
    share = (group - 1) / group
    if kind == "all-gather":
        return operand_bytes * (group - 1)
    if kind == "all-reduce":
        return 2 * operand_bytes * share
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", i.rest)
        return operand_bytes * (sum(a != b for a, b in pairs) / len(pairs) if pairs else 1.0)
    return operand_bytes * share  # reduce-scatter and all-to-all


def _group(i: _Instruction, chips: int) -> int:
    """Number of chips in one group of a collective."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", i.rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", i.rest):
        return int(tiled.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", i.rest):
        return listed.group(1).count(",") + 1
    return chips


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def _memory(computations: dict[str, Computation], here: Computation, i: _Instruction) -> float:
    """Bytes of main memory that one instruction reads and writes."""
    if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or "AllocateBuffer" in i.rest:
        return 0.0
    operands = [here[o] for o in i.operands if o in here]
    if i.opcode == "fusion":
        callee = computations[i.calls[0]]
        read = sum(min(o.in_hbm, _read(computations, callee, n)) for n, o in enumerate(operands))
        written = [size for size, array in zip(_written(computations, callee), i.arrays, strict=False) if array[1]]
        return read + sum(written)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return (i.size if operands and operands[0].in_hbm else 0.0) + i.in_hbm
    if i.opcode == "dynamic-update-slice":
        return operands[1].in_hbm + (operands[1].size if i.in_hbm else 0.0)
    if i.opcode.endswith("-start"):
        # A copy returns (destination, source, counter), other starts (source, destination, counters).
        arrays = [array for array in i.arrays if array[0] > 8]
        size, is_in_hbm = arrays[0 if i.opcode == "copy-start" else -1] if arrays else (0.0, False)
        return sum(min(o.in_hbm, size) for o in operands[:1]) + (size if is_in_hbm else 0.0)
    # cuBLAS products on GPUs return their workspace, untyped bytes, among their results.
    workspace = sum(float(n) for n in re.findall(r"\bs8\[(\d+)\]", i.shape)) if i.kind.startswith("__cublas") else 0.0
    return sum(o.in_hbm for o in operands if o.opcode != "constant") + i.in_hbm - workspace


def _read(computations: dict[str, Computation], callee: Computation, number: int) -> float:
    """Bytes that a fused computation reads of a parameter; of a stack of layers, only the layers it slices."""
    names = [i.name for i in callee.values() if i.opcode == "parameter" and i.text == str(number)]
    total = 0.0
    users: dict[str, list[_Instruction]] = collections.defaultdict(list)
    for i in callee.values():
        for operand in set(i.operands):
            users[operand].append(i)
    while names:
        name = names.pop()
        for user in users[name]:
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.size
            elif user.opcode == "fusion":
                inner = computations[user.calls[0]]
                total += sum(_read(computations, inner, n) for n, o in enumerate(user.operands) if o == name)
            elif user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                continue  # passed on, or updated in place
            else:
                return callee[name].size
    return total


def _written(computations: dict[str, Computation], callee: Computation) -> list[float]:
    """Bytes that a fused computation writes per result; for an update in place, only the update."""
    root = next(i for i in callee.values() if i.root)
    results = [callee[o] for o in root.operands if o in callee] if root.opcode == "tuple" else [root]
    sizes = []
    for result in results:
        while result.opcode == "bitcast" and result.operands[0] in callee:
            result = callee[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            sizes.append(callee[result.operands[1]].size)
        elif result.opcode == "fusion":
            sizes.append(sum(_written(computations, computations[result.calls[0]])))
        else:
            sizes.append(0.0 if result.opcode == "parameter" else result.size)
    return sizes
