"""Machine code of NVIDIA GPUs: its instructions, and the loop in which a kernel spends its time.

instructions -> basic blocks -> dominators -> natural loops -> the main one
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

MATRIX = re.compile(r"HGMMA|HMMA|IMMA|DMMA|QGMMA|UTC\w*MMA")
"""Products of matrices, on tensor cores."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a listing."""

    address: int
    predicate: str
    """`@P0`, or empty if it always runs. Branches may have their predicate among the operands."""
    name: str
    """With its modifiers: `BAR.SYNC.DEFER_BLOCKING`."""
    operands: str

    @property
    def target(self) -> int | None:
        """The target of a branch."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.split(".")[0] == "BRA" else None
        return None if found is None else int(found[1], 16)

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        leaves = self.name.split(".")[0] in ("EXIT", "RET", "BRA")
        return not leaves or bool(self.predicate) or "," in self.operands


@dataclass(frozen=True, slots=True)
class Loop:
    """The instructions of a loop, in two parts."""

    always: tuple[Instruction, ...]
    """Instructions that every pass runs."""
    skipped: tuple[Instruction, ...]
    """Instructions that some passes skip."""


def instructions(listing: str) -> list[Instruction]:
    """The instructions of one kernel, from the output of `cuobjdump -sass`."""
    pattern = r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P[0-9T]+ )?\s*([A-Z][A-Za-z0-9_.]*)([^;]*);"
    return [
        Instruction(int(found[1], 16), (found[2] or "").strip(), found[3], found[4].strip())
        for found in re.finditer(pattern, listing)
    ]


def main_loop(code: list[Instruction]) -> Loop | None:
    """The innermost loop with most products of matrices; at equal numbers, the one with most instructions, then the
    first. None if there is no loop. A loop that only waits for a barrier does not count."""
    starts, follow = _blocks(code)
    dominators = _dominators(follow)

    def inside(blocks: Iterable[int]) -> tuple[Instruction, ...]:
        return tuple(i for block in sorted(blocks) for i in code[starts[block] : starts[block + 1]])

    loops = {
        head: loop
        for head, loop in _natural_loops(follow, dominators).items()
        if not all(i.name.startswith(("SYNCS", "YIELD", "BRA")) for i in inside(loop[0]))
    }
    innermost = [
        (body, latches)
        for head, (body, latches) in loops.items()
        if not any(other in body for other in loops if other != head)
    ]
    if not innermost:
        return None

    def weight(loop: tuple[set[int], set[int]]) -> tuple[int, int]:
        body = inside(loop[0])
        return sum(bool(MATRIX.match(i.name)) for i in body), len(body)

    body, latches = max(innermost, key=weight)
    always = {block for block in body if all(block in dominators[latch] for latch in latches)}
    return Loop(inside(always), inside(body - always))


def _blocks(code: list[Instruction]) -> tuple[list[int], list[list[int]]]:
    """(beginnings of the basic blocks in the code, and its end; for each block the blocks that may follow)."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    cuts = {0, len(code)}
    for i, instruction in enumerate(code):
        if instruction.target in place:
            cuts |= {place[instruction.target], i + 1}
        elif instruction.name.startswith(("EXIT", "RET")):
            cuts.add(i + 1)
    starts = sorted(cuts)
    block_at = {start: block for block, start in enumerate(starts)}
    follow: list[list[int]] = []
    for block, end in enumerate(starts[1:]):
        last = code[end - 1]
        after = [block + 1] if last.goes_on and end < len(code) else []
        if last.target in place:
            after.append(block_at[place[last.target]])
        follow.append(after)
    return starts, follow


def _dominators(follow: list[list[int]]) -> list[set[int]]:
    """For each block the blocks on every path to it, including itself; none if no path leads to it."""
    before: list[list[int]] = [[] for _ in follow]
    reached, todo = {0}, [0]
    while todo:
        block = todo.pop()
        for after in follow[block]:
            before[after].append(block)
            if after not in reached:
                reached.add(after)
                todo.append(after)
    found = [set(reached) if block in reached else set() for block in range(len(follow))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = {block} | set.intersection(*(found[b] for b in before[block]))
            changed |= new != found[block]
            found[block] = new
    return found


def _natural_loops(
    follow: list[list[int]], dominators: list[set[int]]
) -> dict[int, tuple[set[int], set[int]]]:
    """Head of a loop -> (its blocks, the blocks that jump back to the head)."""
    before: dict[int, list[int]] = {}
    for block, after in enumerate(follow):
        for one in after:
            before.setdefault(one, []).append(block)
    loops: dict[int, tuple[set[int], set[int]]] = {}
    for block, after in enumerate(follow):
        for head in after:
            if head not in dominators[block]:
                continue
            body, latches = loops.setdefault(head, ({head}, set()))
            latches.add(block)
            todo = [block]
            while todo:
                one = todo.pop()
                if one not in body:
                    body.add(one)
                    todo += [b for b in before[one] if dominators[b]]
    return loops
