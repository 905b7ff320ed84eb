"""`python -m outlive.broker.keeper [READY]`: the parent of the broker; it keeps what must not die with the broker.

It holds a second copy of every descriptor, adopts orphans and remembers how they ended, starts a broker that died
again, and ends when its broker was told to.  It understands nothing of what it holds, so that little in it can go
wrong.  What is said to it, and by it: `common.notify`.

READY is a descriptor for the first broker, which writes one line to it; `taken` when another keeper has the lock.
Under systemd it is the unit's main process and passes everything up, so that its own death loses nothing either.
Without, the broker starts the next keeper, and gives it all it holds.  A keeper that came later is no ancestor of
the workers of before: of their orphans, only the kernel can tell how they ended (Linux 6.15 and newer).

    SIGTERM    passed on to the broker
    SIGHUP     execute our own program anew, with everything we hold: an upgrade of the keeper

Always true
    What was sent to us before a broker died is taken in before the next one is started.
    How an orphan ended is remembered before it is reaped, and told to every broker that starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

from ..common import kernel, launch, notify
from ..common.paths import Paths

# Seconds before a broker that did not come up is started again: the first pause, doubling up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
# Brokers in a row that did not come up after which we end, if we hold nothing.
GIVE_UP_AFTER = 5
# Ends of orphans that are remembered.
RECORDS_MAX = 4096
# Exit status with something left to keep, by which systemd knows that it has to start the next keeper.
NEEDED = 75
# Where what we hold is written down while we execute our own program: a descriptor.
STATE = "OUTLIVE_KEEPER"
SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP)


class Keeper:
    """One keeper, from its start to its end."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.store: dict[str, list[int]] = {}
        self.records: deque[dict[str, str]] = deque(maxlen=RECORDS_MAX)
        self.broker, self.failures, self.start_at = 0, 0, 0.0
        self.ready = self.stopping = False
        self.line: socket.socket | None = None
        self.backlog: deque[dict[str, str]] = deque()
        self.up = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # systemd's socket.  Our children find ours in its place, and it beside, as a sign that it is there.
        self.upwards = os.environ.get(notify.UNIT if STATE in os.environ else notify.ADDRESS)
        if self.upwards:
            os.environ[notify.UNIT] = self.upwards
        os.environ[notify.ADDRESS] = str(paths.keeper)
        self.woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        kernel.become_subreaper()

    def begin(self, ready: int) -> None:
        """Take the lock, the socket and what systemd kept for us; `BlockingIOError`: there is a keeper already."""
        self.lock = os.open(self.paths.keeper_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.store = notify.inherited(launch.FIRST_FD)
        self.socket = notify.listen(self.paths.keeper)
        self._start_broker(ready)

    def run(self) -> None:
        """Keep until the broker has ended because it was wanted to."""
        while True:
            poll = select.poll()
            poll.register(self.woken, select.POLLIN)
            poll.register(self.socket, select.POLLIN)
            if self.backlog and self.line:
                poll.register(self.line, select.POLLOUT)
            came = dict(poll.poll(None if self.broker else max(0.0, self.start_at - time.monotonic()) * 1000))
            signals = os.read(self.woken, 1024) if self.woken in came else b""
            if signal.SIGTERM in signals:
                # systemd's is a stop: the end also of a broker that could not be told yet, or is not there.
                self.stopping = self.stopping or bool(self.upwards)
                if self.broker:
                    os.kill(self.broker, signal.SIGTERM)
            self._receive()
            self._reap()
            if not self.broker:
                if self.stopping or (self.failures >= GIVE_UP_AFTER and not self.store):
                    self.paths.keeper.unlink(missing_ok=True)
                    return
                if time.monotonic() >= self.start_at:
                    self._start_broker()
            self._flush()
            if signal.SIGHUP in signals:
                self._execute_anew()

    # What we are told.

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            while True:
                fields, fds, user = notify.receive(self.socket) or ({}, [], -1)
                if user == os.getuid():
                    fds = self._told(fields, fds)
                for fd in fds:
                    os.close(fd)

    def _told(self, fields: dict[str, str], fds: list[int]) -> list[int]:
        """Do what a datagram says; return the descriptors that we do not keep."""
        name = fields.get("FDNAME", "")
        if fields.get("MAINPID", "").isdecimal():
            self.broker = int(fields["MAINPID"])
        self.ready |= "READY" in fields
        self.stopping |= "STOPPING" in fields
        if self.upwards and not fields.keys() & {"MAINPID", "FORWARD"}:
            with suppress(OSError):
                notify.send(self.up, fields, fds, self.upwards)
        if "FORWARD" in fields:
            self.backlog.append(fields)
        elif "FDSTOREREMOVE" in fields:
            fds += self.store.pop(name, [])
        elif "FDSTORE" in fields and sum(map(len, self.store.values())) + len(fds) <= notify.STORE_MAX:
            self.store.setdefault(name, []).extend(fds)
            return []
        return fds

    # The broker and our other children.

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self._receive()  # its last words; they may change who the broker is
                pid = found.si_pid
                if pid == self.broker:
                    self.broker = 0
                    self._pause(failed=not self.ready)
                status = found.si_status << 8 * (found.si_code == os.CLD_EXITED)
                record = {"ORPHAN": str(pid), "START": str(kernel.start_time(pid)), "STATUS": str(status)}
                self.records.append(record)
                self.backlog.append(record)
                os.waitid(os.P_PID, pid, os.WEXITED)

    def _pause(self, *, failed: bool) -> None:
        """Start the next broker at once, or, after one that did not come up, a while later."""
        if self.line:  # nobody reads it any more, and poll would not wait
            self.line.close()
        self.line, self.ready = None, False
        self.failures = self.failures + 1 if failed else 0
        pause = min(FIRST_PAUSE * 2.0 ** min(self.failures - 1, 16), LONGEST_PAUSE) if failed else 0.0
        self.start_at = time.monotonic() + pause

    def _start_broker(self, ready: int = -1) -> None:
        """Start a broker with everything we hold."""
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line.setblocking(False)
        self.backlog = deque(self.records)
        names = ["keeper", *(name for name, kept in self.store.items() for _ in kept)]
        fds = [theirs.fileno(), *(fd for kept in self.store.values() for fd in kept)]
        extra = {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
        arguments = [str(launch.FIRST_FD + len(fds))] if ready >= 0 else []
        try:
            fds += [ready] if ready >= 0 else []
            self.broker = launch.launch("outlive.broker", arguments, fds=fds, log=2, extra=extra)
        except OSError as error:
            print(f"keeper: no broker: {error}", file=sys.stderr, flush=True)
            self._pause(failed=True)
        theirs.close()
        if ready >= 0:
            os.close(ready)

    def _flush(self) -> None:
        """Tell the broker what it takes; the rest when it has room."""
        with suppress(OSError):  # no room; or it has died, and the next one gets everything anyway
            while self.backlog and self.line:
                fields = self.backlog[0]
                notify.send(self.line, fields, self.store.get(fields.get("FDNAME", ""), []))
                self.backlog.popleft()

    # Ourselves.

    def _execute_anew(self) -> None:
        """Become our own program as it is now, with the same pid, children and descriptors."""
        state = kernel.memfd("outlive-keeper")
        line = self.line.fileno() if self.line else -1
        table = [self.lock, self.socket.fileno(), line, self.store, self.broker, self.ready, self.failures]
        os.pwrite(state, json.dumps([*table, *self.records]).encode(), 0)
        os.environ[STATE] = str(state)
        try:
            launch.become("outlive.broker.keeper", (state, *self._numbers()), SIGNALS)
        except OSError as error:
            print(f"keeper: not executed anew: {error}", file=sys.stderr, flush=True)
        os.close(int(os.environ.pop(STATE)))

    def _numbers(self) -> Iterator[int]:
        line = [self.line.fileno()] if self.line else []
        return chain((self.lock, self.socket.fileno()), line, *self.store.values())

    def resume(self) -> None:
        """Go on with what `_execute_anew` wrote down."""
        state = int(os.environ.pop(STATE))
        table = json.loads(os.pread(state, os.fstat(state).st_size, 0))
        self.lock, listener, line, self.store, self.broker, self.ready, self.failures, *records = table
        self.records.extend(records)
        self.socket = socket.socket(fileno=listener)
        self.line = socket.socket(fileno=line) if line >= 0 else None
        for fd in self._numbers():
            os.set_inheritable(fd, False)
        os.close(state)
        os.kill(os.getpid(), signal.SIGCHLD)  # who ended meanwhile


def main() -> int:
    """Run the keeper; returns the exit status."""
    os.chdir("/")
    os.umask(0o077)
    launch.raise_limits()
    keeper = Keeper(Paths.from_environment())
    if STATE in os.environ:
        keeper.resume()
    else:
        ready = int(sys.argv[1]) if len(sys.argv) > 1 else -1
        keeper.paths.prepare()
        if keeper.upwards:  # one log, whoever started us
            os.dup2(keeper.paths.open_log(), 2)
        try:
            keeper.begin(ready)
        except BlockingIOError:
            if ready >= 0:
                os.write(ready, b"taken")
            return NEEDED if keeper.upwards else 0
    keeper.run()
    return NEEDED if keeper.store else 0


if __name__ == "__main__":
    sys.exit(main())
