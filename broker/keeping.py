"""The keeper, as the broker sees it: what it holds for us, what we have it keep, what it tells.

Nothing waits for it: what it has no room for at this moment is queued here, with descriptors of our own.  Without a
keeper (`python -m outlive.broker` by hand) everything here does nothing, and a dead broker loses what is detached.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..common import notify
from ..common.names import SocketPath
from ..common.notify import Fields


class Keeping:
    """Our end of the keeper.  The callbacks are called from the loop."""

    def __init__(
        self,
        line: socket.socket | None,
        *,
        on_found: Callable[[list[int]], None],
        on_orphan: Callable[[int, int, int], None],
        on_lost: Callable[[], None],
    ) -> None:
        """`line`: from the keeper to us.  `on_found`: descriptors of one process, theirs from then on.

        `on_orphan`: pid, start time and wait status of an adopted process that has ended.
        """
        self._line = line
        self._on_found = on_found
        self._on_orphan = on_orphan
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[Fields, list[int]]] = deque()
        self._numbers = itertools.count()
        self._answers: dict[str, asyncio.Future[bool]] = {}
        self._socket: socket.socket | None = None
        path = os.environ.get(notify.ADDRESS)
        self._path = Path(path) if path else None
        if self._path and line:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            with SocketPath(self._path) as address, suppress(OSError):
                self._socket.connect(address)
        if line:
            line.setblocking(False)
            self._loop.add_reader(line.fileno(), self._receive)

    @property
    def line(self) -> socket.socket | None:
        """The keeper's line to us, to be handed to a successor; `None` when there is no keeper."""
        return self._line

    async def hear(self) -> bool:
        """Take in all that the keeper was told by anybody, us included, before this call; tell whether we have.

        Not when it is stopped, or has died: what the next one is told comes to the broker that takes over from us.
        Asked to hand us what it keeps under a name that it does not know, it answers with the name, in its turn.
        """
        if self._line is None or self._socket is None:
            return self._path is None
        name = f"{next(self._numbers):x}"
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._answers[name] = answer
        self._tell({"FORWARD": "1", "FDNAME": name})
        try:
            async with asyncio.timeout(notify.SEND_DEADLINE):
                return await answer
        except TimeoutError:
            return False
        finally:
            self._answers.pop(name, None)

    def store(self, mark: str, fds: Sequence[int]) -> None:
        """Have it keep these descriptors, which stay ours too."""
        self._tell(notify.stored(mark), fds)

    def remove(self, mark: str) -> None:
        """Have it close what it keeps of the process with this mark.

        Ours may have died, and spawners tell the next one, whose broker will hear nothing from us of what is gone.
        """
        if self._socket is None and self._path:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as once, suppress(OSError):
                once.setblocking(False)
                with SocketPath(self._path) as address:
                    once.connect(address)
                notify.send(once, notify.removed(mark))
        self._tell(notify.removed(mark))

    def ready(self) -> None:
        """Say that we are the broker, and take requests."""
        self._tell({"MAINPID": str(os.getpid())})
        self._tell({"READY": "1"})

    def stopping(self) -> None:
        """Say that our end is wanted."""
        self._tell({"STOPPING": "1"})

    def _tell(self, fields: Fields, fds: Sequence[int] = ()) -> None:
        if self._socket is None:
            return
        if not self._queue and self._sent(fields, fds):
            return
        if not self._queue:
            self._loop.add_writer(self._socket.fileno(), self._flush)
        self._queue.append((fields, [os.dup(fd) for fd in fds]))

    def _sent(self, fields: Fields, fds: Sequence[int]) -> bool:
        assert self._socket is not None
        try:
            notify.send(self._socket, fields, fds)
        except BlockingIOError:
            return False
        except OSError:  # it has died; the next one gets everything anew
            pass
        return True

    def _flush(self) -> None:
        while self._queue:
            fields, fds = self._queue[0]
            if not self._sent(fields, fds):
                return
            _close(fds)
            self._queue.popleft()
        if self._socket:
            self._loop.remove_writer(self._socket.fileno())

    def _receive(self) -> None:
        while self._line:
            try:
                datagram = notify.receive(self._line)
            except BlockingIOError:
                return
            except OSError:
                datagram = None
            if datagram is None:
                self.close()
                self._on_lost()
                return
            fields, fds, _ = datagram
            if "ORPHAN" in fields:
                numbers = [fields.get(name, "") for name in ("ORPHAN", "START", "STATUS")]
                if all(number.isdecimal() for number in numbers):
                    self._on_orphan(*map(int, numbers))
            elif fds:
                self._on_found(fds)
                fds = []
            elif (answer := self._answers.get(fields.get("FDNAME", ""))) and not answer.done():
                answer.set_result(True)
            _close(fds)

    def listen_no_more(self) -> None:
        """Leave what the keeper tells from now on to whoever gets the line."""
        if self._line:
            self._loop.remove_reader(self._line.fileno())

    def let_go(self) -> socket.socket | None:
        """Return the line for a successor; we hear nothing more, and say only what is queued."""
        line, self._line = self._line, None
        if line:
            self._loop.remove_reader(line.fileno())
        self.close()
        return line

    def close(self) -> None:
        """Hang up; what is queued goes if there is room."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(False)
        if self._line:
            self._loop.remove_reader(self._line.fileno())
            self._line.close()
            self._line = None
        if self._socket:
            self._loop.remove_writer(self._socket.fileno())
            self._socket.setblocking(True)
            self._socket.settimeout(notify.SEND_DEADLINE)
            with suppress(OSError):
                self._flush_all()
            self._socket.close()
            self._socket = None

    def _flush_all(self) -> None:
        assert self._socket is not None
        while self._queue:
            fields, fds = self._queue.popleft()
            with suppress(OSError):
                notify.send(self._socket, fields, fds)
            _close(fds)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
