"""What threads and processes need of the loop: the one place with sockets, signals and the clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from .peers import Peer


class World(Protocol):
    """What the loop does for us."""

    # Why the last upgrade did not come up; empty for one that did.
    upgrade_failed: str

    @property
    def deltas_wanted(self) -> bool:
        """Whether somebody wants output as it comes."""

    @property
    def keeper_pid(self) -> int | None:
        """The keeper's pid, if there is one."""

    async def upgrade(self) -> str:
        """Have the installed program take over; return why it did not come up."""

    def start_worker(self, thread_id: str, epoch: int) -> int:
        """Start a worker and return its pid; raises `OSError`."""

    def kill_worker(self, pid: int) -> None:
        """Kill a worker."""

    def notice_deaths(self) -> None:
        """Tell `worker_died` now of the workers that are dead by now."""

    def transmit(self, peer: Peer, frame: bytes) -> None:
        """Send a frame; raises `zmq.ZMQError`."""

    def publish(self, event: str, thread_id: str, process_id: str | None = None, **fields: Any) -> None:
        """Tell the subscribers."""

    def descriptors_left(self) -> int:
        """How many descriptors may still be opened before the reserve."""

    def keep(self, mark: str, fds: Sequence[int]) -> None:
        """Have the keeper keep descriptors of the process with this mark."""

    def unkeep(self, mark: str) -> None:
        """Have it close them."""

    async def hear_keeper(self) -> bool:
        """Take in what the keeper was told before now; tell whether we have."""

    def epoch_is_over(self, thread_id: str, epoch: int) -> bool:
        """Tell whether worker and spawners of this epoch are all dead."""

    def log(self, text: str) -> None:
        """Write to the log."""
