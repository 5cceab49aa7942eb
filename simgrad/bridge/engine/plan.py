"""Which pairs are evaluated together, and in which array shapes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from simgrad.errors import InputError
from simgrad.pairs import Pair
from simgrad.theory.kernel.cost import Shapes, kernel_flops, packing_pays

Layout = Literal["auto", "padded", "packed"]

# logits (a quarter gigabyte in float32) for every 1024 positions of the budget
_LOGITS, _LOGITS_SHARE = 2**26, 1024
_COMPILE = 2048  # tokens that could be evaluated while one more shape compiles


@dataclass(frozen=True)
class Work:
    """Pairs (by number) that share one batch of ``length`` positions and ``rows`` response rows."""

    members: tuple[int, ...]
    length: int
    rows: int
    packed: bool


def _round(n: int) -> int:
    """Next length on a grid of about four steps an octave.

    >>> [_round(n) for n in (3, 17, 33, 70, 300)]
    [16, 32, 48, 80, 320]
    """
    step = 16
    while n > 8 * step:
        step *= 2
    return -(-n // step) * step


def plan(pairs: Sequence[Pair], packed: bool, budget: int, vocab_size: int = 0) -> list[Work]:
    """Batches of similar lengths, at most ``budget`` token positions each (one pair at least).

    Lengths are rounded up to a grid; neighbouring grid lengths are merged where the padding costs
    less than compiling one more shape would, by dynamic programming over the grid. ``vocab_size``
    bounds the memory that logits take. The plan depends on the lengths alone, so an interrupted run
    that plans again gets the same batches.

    >>> short, long = Pair([1], [2], [3]), Pair([1] * 300, [2], [3])
    >>> [(len(work.members), work.length) for work in plan([long] + 20 * [short], True, 512)]
    [(20, 16), (1, 320)]
    """
    sequences = 1 if packed else 2

    def need(pair: Pair) -> int:
        responses = (len(pair.chosen), len(pair.rejected))
        return len(pair.prompt) + (sum(responses) if packed else max(responses))

    by_length: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_length.setdefault(_round(need(pair)), []).append(i)
    grid = sorted(by_length)
    longest = {
        n: max(max(len(pairs[i].chosen), len(pairs[i].rejected)) for i in by_length[n])
        for n in grid
    }

    def cost(first: int, end: int) -> int:
        rows = max(longest[n] for n in grid[first:end])
        count = sum(len(by_length[n]) for n in grid[first:end])
        return _COMPILE + count * (sequences * grid[end - 1] + rows)

    # total cost of the first k lengths, and where their last group starts
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(grid) + 1):
        best.append(min((best[first][0] + cost(first, end), first) for first in range(end)))
    groups, end = [], len(grid)
    while end:
        groups.append((best[end][1], end))
        end = best[end][1]
    work = []
    for first, end in reversed(groups):
        members = [i for n in grid[first:end] for i in by_length[n]]
        length, rows = grid[end - 1], _round(max(longest[n] for n in grid[first:end]))
        logits = (
            _LOGITS * budget // (_LOGITS_SHARE * 2 * rows * vocab_size)
            if vocab_size
            else len(members)
        )
        size = max(1, min(budget // (sequences * length), logits, len(members)))
        work += [
            Work(tuple(members[k : k + size]), length, rows, packed)
            for k in range(0, len(members), size)
        ]
    return work


def side_by_side(todo: Sequence[Work], count: int) -> list[Work]:
    """Each batch joined with the next ``count`` - 1 of the same shape: one a group of devices.

    >>> works = [Work((3, 1), 16, 16, True), Work((0,), 16, 16, True), Work((2,), 32, 16, True)]
    >>> [work.members for work in side_by_side(works, 2)]
    [(3, 1, 0), (2,)]
    """
    joined = []
    for shape, some in itertools.groupby(todo, lambda work: replace(work, members=())):
        alike = [work.members for work in some]
        for k in range(0, len(alike), count):
            joined.append(replace(shape, members=tuple(itertools.chain(*alike[k : k + count]))))
    return joined


def kernel_works(
    pairs: Sequence[Pair], shapes: Shapes, budget: int, layout: Layout = "auto"
) -> list[Work]:
    """:func:`plan` for pair kernels, each pair in the cheapest layout (``auto``) or all in one.

    Pairs are divided between the layouts only where that saves more than the shapes which have to
    be compiled on top. The plan depends on the model's shapes and the lengths alone.

    >>> from simgrad.models import ModelConfig, create
    >>> shapes = Shapes.of(*create(ModelConfig(vocab_size=99, width=64, depth=2)))
    >>> long, short = Pair([1] * 300, [2] * 9, [3]), Pair([1], [2] * 90, [3] * 90)
    >>> works = kernel_works([long] * 400 + [short] * 400, shapes, 4096)
    >>> works[0].packed, works[0].length, works[-1].packed, works[-1].length
    (False, 96, True, 320)

    Raises:
        InputError: no such layout.
    """
    if layout not in get_args(Layout):
        raise InputError(f"layout={layout!r}: choose one of {', '.join(get_args(Layout))}")

    def works(packed: bool, members: Sequence[int]) -> list[Work]:
        if not members:
            return []
        found = plan([pairs[i] for i in members], packed, budget, shapes.vocab_size)
        return [
            Work(tuple(members[k] for k in w.members), w.length, w.rows, w.packed) for w in found
        ]

    def cost(work: list[Work]) -> int:
        each = sum(
            len(w.members) * kernel_flops(shapes, w.length, w.rows, w.packed).total for w in work
        )
        compiled = {(w.length, w.rows, w.packed) for w in work}
        return each + len(compiled) * kernel_flops(shapes, _COMPILE // 2, 1, packed=False).total

    everything = range(len(pairs))
    if layout != "auto" or not pairs:
        return works(layout == "packed", everything)
    pays = [packing_pays(shapes, len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]
    divided = [
        works(packed, [i for i in everything if pays[i] == packed]) for packed in (False, True)
    ]
    return min(
        (works(False, everything), works(True, everything), divided[0] + divided[1]), key=cost
    )
