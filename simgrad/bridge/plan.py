"""Which pairs are evaluated together, and in which array shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simgrad.pairs import Pair

__all__ = ["Work", "plan"]

_LOGITS, _LOGITS_SHARE = 2**26, 1024  # logits (a quarter gigabyte in float32) for every 1024 positions of the budget
_COMPILE = 2048  # tokens that could be evaluated while one more shape compiles


@dataclass(frozen=True)
class Work:
    """Pairs (by number) that share one batch of ``length`` positions and ``rows`` response rows."""

    members: tuple[int, ...]
    length: int
    rows: int


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

    Lengths are rounded up to a grid; neighbouring grid lengths are merged where the padding costs less
    than compiling one more shape would, by dynamic programming over the grid. ``vocab_size`` bounds the
    memory that logits take. The plan depends on the
    lengths alone, so an interrupted run that plans again gets the same batches.

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
    longest = {n: max(max(len(pairs[i].chosen), len(pairs[i].rejected)) for i in by_length[n]) for n in grid}

    def cost(first: int, end: int) -> int:
        rows = max(longest[n] for n in grid[first:end])
        count = sum(len(by_length[n]) for n in grid[first:end])
        return _COMPILE + count * (sequences * grid[end - 1] + rows)

    best: list[tuple[int, int]] = [(0, 0)]  # total cost of the first k lengths, and where their last group starts
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
        logits = _LOGITS * (budget // _LOGITS_SHARE) // (2 * rows * vocab_size) if vocab_size else len(members)
        size = max(1, min(budget // (sequences * length), logits, len(members)))
        work += [Work(tuple(members[k : k + size]), length, rows) for k in range(0, len(members), size)]
    return work
