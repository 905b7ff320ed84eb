"""The ids of a thread's processes: which one is next.  Pure.

Always true
    An id is given out once, whoever gave it out before: at random as long as there are some, then counting.
    The next one costs the same however many were used.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from ..common.names import RANDOM_IDS


class Ids:
    """The ids of one thread."""

    def __init__(self, seed: int | None = None) -> None:
        """`seed`: makes them predictable, for tests."""
        self._random = random.Random(seed) if seed is not None else random.SystemRandom()
        self._used: set[int] = set()
        self._highest = RANDOM_IDS.stop - 1
        # What is left, in any order, once trying would mostly meet used ones.
        self._left: list[int] = []

    def use(self, ids: Iterable[str]) -> None:
        """Take note of ids that were given out."""
        for number in map(int, ids):
            if number in RANDOM_IDS:
                self._used.add(number)
            else:
                self._highest = max(self._highest, number)

    def __contains__(self, id: str) -> bool:
        number = int(id)
        return number in self._used if number in RANDOM_IDS else number <= self._highest

    def next(self) -> str:
        """Give one out."""
        free = len(RANDOM_IDS) - len(self._used)
        number = self._highest + 1
        if free > len(RANDOM_IDS) // 10:
            while (number := self._random.choice(RANDOM_IDS)) in self._used:
                pass
        elif free:
            if not self._left:
                self._left = [number for number in RANDOM_IDS if number not in self._used]
                self._random.shuffle(self._left)
            while (number := self._left.pop()) in self._used:
                pass
        self.use([str(number)])
        return str(number)
