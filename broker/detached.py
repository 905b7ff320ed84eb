"""The `DetachedStore`: processes that the broker itself pumps, keyed `(thread_id, process_id)`.

They are drained like attached ones, still take input, and their outcome is recorded at once; they send no events.
The store borrows a process's descriptors from its custody entry and gives them back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ..common.descriptors import Handles
from ..common.held import Held
from ..common.messages import AddedRule
from ..common.pump import Pump, Pumps
from ..common.transcript import Lease
from ..common.tree import Feller

Key = tuple[str, str]
# Epoch 0 in a lease stands for the broker.
BROKER_EPOCH = 0


class DetachedStore:
    """All processes in the broker's own hands."""

    def __init__(
        self,
        pumps: Pumps,
        pump: type[Pump],
        feller: Feller,
        *,
        on_ended: Callable[[Held], None],
        on_found: Callable[[Held], None] = lambda held: None,
    ) -> None:
        self._feller = feller
        self._pumps = pumps
        self._pump = pump
        self._on_ended = on_ended
        self._on_found = on_found
        self._lease = Lease.mine(BROKER_EPOCH)
        self._processes: dict[Key, Held] = {}
        self._ends: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._processes)

    def __contains__(self, key: Key) -> bool:
        return key in self._processes

    def get(self, key: Key) -> Held | None:
        """Return a process in our hands."""
        return self._processes.get(key)

    def insert(self, key: Key, handles: Handles, added: Sequence[AddedRule] = ()) -> Held:
        """Pump a process; an older one of the same key is terminated.

        `added`: what to look for in its output beside what its header says.
        Raises `HandoffError` while somebody else may be pumping, `PeerError` for a damaged transcript; the
        handles stay the caller's then.
        """
        held = Held(handles, self._pumps, self._pump, on_ended=self._on_ended, on_found=self._on_found)
        older = self._processes.get(key)
        self._processes[key] = held
        try:
            held.begin(self._lease, added)
        except BaseException:
            del self._processes[key]
            if older:
                self._processes[key] = older
            raise
        if older:
            self._terminate(older)
        return held

    def remove(self, key: Key) -> Handles | None:
        """Stop pumping, give up the lease, and return the handles; `None` when it is not in our hands."""
        held = self._processes.pop(key, None)
        return held.release() if held else None

    def _terminate(self, held: Held) -> None:
        # Its end must not be taken for that of the one which has its key now.
        held.on_ended = lambda _: None
        held.transcript.record_by("cleaned")
        task = asyncio.get_running_loop().create_task(self._see_off(held))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _see_off(self, held: Held) -> None:
        await self._feller.fell(held.transcript.facts.mark, held.handles)
        held.close()

    def close(self) -> None:
        """Stop pumping everything and close it."""
        for held in self._processes.values():
            held.close()
        self._processes.clear()
