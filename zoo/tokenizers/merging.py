"""The loop of byte-pair encoding, for what the `tokenizers` library lacks: merging with drawn dropout, and by ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush

Rules = Mapping[tuple[int, int], tuple[int, int]]  # two neighbours -> the rank of their merge, and what they become


def merge(ids: Sequence[int], rules: Rules, drop: Callable[[], bool] | None = None) -> list[int]:
    """The ids of a word's letters -> its ids after all merges: the lowest rank first, the leftmost of one rank first.

    drop: asked before each merge; what it drops waits until the next merge is done. So each step takes the best of the
    pairs that were not dropped, as BPE-dropout does (Provilkov et al. 2020, algorithm 1). Time n log n.
    """
    ids, size = list(ids), len(ids)
    before, after = list(range(-1, size - 1)), list(range(1, size + 1))
    heap: list[tuple[int, int, int, tuple[int, int]]] = []  # rank, place of the left one, what they become, the two
    dropped: list[tuple[int, int, int, tuple[int, int]]] = []

    def offer(left: int) -> None:
        if left >= 0 and after[left] < size and (pair := (ids[left], ids[after[left]])) in rules:
            rank, made = rules[pair]
            heappush(heap, (rank, left, made, pair))

    for at in range(size):
        offer(at)
    while heap:
        candidate = heappop(heap)
        _, at, made, pair = candidate
        right = after[at]
        if right == size or (ids[at], ids[right]) != pair:
            continue  # a merge beside it has taken one of the two
        if drop is not None and drop():
            dropped.append(candidate)
            continue
        ids[at], ids[right], after[at] = made, -1, after[right]
        if after[at] < size:
            before[after[at]] = at
        offer(before[at])
        offer(at)
        while dropped:
            heappush(heap, dropped.pop())
    return [id for id in ids if id >= 0]
