"""The spawner: a small, single-threaded program that starts a worker's children and records how they ended.

It exists because a fork costs what the forking process weighs, and because whoever forks is the parent, the
first to know how a child ended.  It talks packets (`common.channel`) with its worker, and sends deposits on the
worker's own channel to the broker, which it was given a copy of.

    from the worker    spawn     one descriptor: a memfd with a msgpack map, see `nursery.Order`
                       broker    one descriptor: the channel for deposits; none: the broker is away
    to the worker      started   number, pid, and a parcel with all descriptors of the process
                       failed    number, stage, message
    to the broker      deposit   a parcel: first what was made before the fork, then what the fork made
                       undeposit the process never ran
    to the keeper      all of them once it runs, before the broker gets the last: `common.notify`

Always true
    What exists before the fork is deposited before the fork, and the child says that it runs before it executes
    its program: whatever dies in between, the header tells whether the command may be started again.
    A forked child that has not said so dies with its spawner.
    An outcome is recorded before its process is reaped.
    What runs is with the keeper before the broker is told that it runs, so that both broker and worker may die; a
    broker that died before it took the deposit is replaced by one to which the keeper hands it.
    When the worker's end closes, the spawner finishes what it is doing and ends, so that its children are
    adopted by whoever can go on recording.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, NamedTuple

import msgpack
import ptyprocess

from ..common import ending, kernel, launch, notify
from ..common.channel import Channel, Packet, parcel_rows
from ..common.descriptors import Handles
from ..common.errors import HandoffError, OutliveError, PeerError, SpawnError
from ..common.inlet import Inlet
from ..common.transcript import Facts, Lease, Transcript, mark_started

# Bytes of a conduit: a terminal yields 4 KiB at a time, so the kernel's default of 64 KiB would only count
# against what one user may have in pipes.
CONDUIT_SIZE = 16 << 10
# Seconds between two tries to reach a keeper; a new one takes a few tenths of a second.
_KEEPER_PAUSE = 0.02


class _Child(NamedTuple):
    facts: Facts
    handles: Handles


class _Command(NamedTuple):
    """What a forked child needs to become the command, all of it made before the fork.

    Each page that a child touches between fork and exec is copied for it, so that the same line costs it several
    times what it costs us.
    """

    argv: tuple[bytes, ...]
    environment: dict[bytes, bytes]
    transcript: int
    # As they were before we raised them.
    limits: dict[int, tuple[int, int]]
    # Our own pid.
    spawner: int


class _Pty(ptyprocess.PtyProcess):  # type: ignore[misc]
    """A `PtyProcess` only as far as its fork: descriptor and pid are ours, and nothing sleeps or kills.

    The original kills its child and sleeps 0.1 s when it is collected, also after a failed exec.
    """

    # Those made by the start under way: after a failed exec it is the only trace of them.
    born: ClassVar[list[_Pty]] = []

    def __init__(self, pid: int, fd: int) -> None:
        os.set_inheritable(fd, False)
        self.pid, self.fd, self.closed = pid, fd, True
        _Pty.born.append(self)

    def setwinsize(self, rows: int, cols: int) -> None:
        """The child has set its size before its program ran; once more could be a stray SIGWINCH."""


class Spawner:
    """The program's state: its worker, the broker's channel if there is one, the children."""

    def __init__(self, worker: Channel) -> None:
        self.worker = worker
        self.broker: Channel | None = None
        self.keeper = notify.Notifier()
        self.children: dict[int, _Child] = {}
        self.limits = launch.raised_limits()
        self.poller = select.epoll()
        self.poller.register(worker.fileno(), select.EPOLLIN)

    def run(self) -> None:
        """Serve until the worker's end closes."""
        while True:
            for fd, _ in self.poller.poll():
                if fd == self.worker.fileno():
                    if not self._serve():
                        return
                elif child := self.children.get(fd):
                    self._bury(child)

    def _serve(self) -> bool:
        while True:
            try:
                packet = self.worker.receive()
            except BlockingIOError:
                return True
            if packet is None:
                return False
            try:
                if packet.kind == "spawn":
                    self._spawn(packet)
                elif packet.kind == "broker":
                    self._change_broker(packet)
            finally:
                packet.close()

    def _change_broker(self, packet: Packet) -> None:
        if self.broker:
            self.broker.close()
        self.broker = None
        if packet.fds:
            import socket

            self.broker = Channel(socket.socket(fileno=packet.fds.pop()))

    def _spawn(self, packet: Packet) -> None:
        number = packet.message["number"]
        order = _read_order(packet)
        facts = Facts.from_bytes(order["facts"])
        key = facts.thread_id, facts.process_id
        handles = Handles()
        try:
            try:
                pid = self._start(facts, order, handles)
            except BaseException:
                if not self._tell_broker("undeposit", thread=key[0], process=key[1]):
                    self.keeper.tell(notify.removed(facts.mark))
                raise
        except (OutliveError, OSError) as error:
            handles.close()
            stage = error.stage if isinstance(error, SpawnError) else "prepare"
            with suppress(HandoffError):  # the worker is gone
                self.worker.send_patiently("failed", number=number, stage=stage, message=str(error))
            return
        rows, fds = parcel_rows({key: handles.held()})
        child = _Child(facts, Handles({"transcript": handles.transcript, "pidfd": handles.pidfd}))
        with suppress(HandoffError):  # the worker is gone; the broker has everything
            self.worker.send_patiently("started", fds, number=number, pid=pid, processes=rows)
        handles.transcript = handles.pidfd = -1
        handles.close()
        self.children[child.handles.pidfd] = child
        self.poller.register(child.handles.pidfd, select.EPOLLIN)

    def _start(self, facts: Facts, order: dict[str, Any], handles: Handles) -> int:
        """Make, deposit, fork, deposit; return the pid.  What was made is in `handles` even after an error."""
        lease = Lease(*order["lease"])
        output_write = -1
        conduit = 0
        try:
            if facts.tty:
                handles.conduit_read, handles.conduit_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
                _shrink(handles.conduit_write)
                conduit = os.fstat(handles.conduit_read).st_ino
                handles.inlet = Inlet.create(facts.mark)
            else:
                handles.terminal, output_write = os.pipe()
                os.set_blocking(handles.terminal, False)
            try:
                handles.transcript = Transcript.create(facts, lease, conduit=conduit)
            except ValueError as error:
                raise SpawnError(str(error), "prepare") from None
            early = handles.held()
            # The keeper is spared what may not come to run, unless there is no broker to hold it.
            kept = not self._deposit(facts, early, kept=self.keeper.there, strict=True) and self._keep(facts, early)
            environment = dict(order["environment"])
            command = _Command(facts.argv, environment, handles.transcript, self.limits, os.getpid())
            with _in_directory(facts.cwd):
                if facts.tty:
                    handles.terminal, pid = _fork_on_terminal(command, (facts.rows, facts.columns))
                else:
                    pid = _fork_on_pipe(command, output_write)
        finally:
            if output_write >= 0:
                os.close(output_write)
        handles.pidfd = os.pidfd_open(pid)
        # It runs: from here on nothing may stop us from telling the worker.
        late = {role: fd for role, fd in handles.held().items() if role not in early}
        rest = late if kept else handles.held()
        stored = self.keeper.store(facts.mark, [*rest.values()])
        if not self._deposit(facts, late, kept=stored):
            self._keep(facts, {} if stored else rest)
        return pid

    def _deposit(self, facts: Facts, held: dict[str, int], *, kept: bool, strict: bool = False) -> bool:
        rows, fds = parcel_rows({(facts.thread_id, facts.process_id): held})
        return self._tell_broker("deposit", fds, strict=strict, processes=rows, kept=kept)

    def _keep(self, facts: Facts, held: dict[str, int]) -> bool:
        """Have the keeper keep these, and hand all it keeps of the process to the broker after ours.

        A keeper that has died has a successor in a moment, and until then nobody but us would know of this start.
        """
        forward = {"FORWARD": "1", "FDNAME": notify.name_of(facts.mark)}
        deadline = time.monotonic() + notify.SEND_DEADLINE
        while self.keeper.there and time.monotonic() < deadline:
            if (not held or self.keeper.store(facts.mark, [*held.values()])) and self.keeper.tell(forward):
                return True
            time.sleep(_KEEPER_PAUSE)
        return False

    def _tell_broker(self, kind: str, fds: list[int] | None = None, *, strict: bool = False, **fields: Any) -> bool:
        """Send to the broker; `False` when there is none: a dead one is forgotten, the worker finds the next."""
        if self.broker is None:
            return False
        try:
            self.broker.send_patiently(kind, fds, **fields)
            return True
        except HandoffError as error:
            if isinstance(error.__cause__, OSError):
                self.broker.close()
                self.broker = None
            elif strict:
                raise SpawnError(
                    f"the broker does not take the process's descriptors: {error}", "deposit"
                ) from None
            return False

    def _bury(self, child: _Child) -> None:
        pidfd = child.handles.pidfd
        ending.learn(pidfd, Transcript.known(child.handles.transcript, child.facts))
        self.poller.unregister(pidfd)
        del self.children[pidfd]
        child.handles.close()


def _read_order(packet: Packet) -> dict[str, Any]:
    fd = packet.fds[0]
    order = msgpack.unpackb(os.pread(fd, os.fstat(fd).st_size, 0), strict_map_key=False)
    if not isinstance(order, dict):
        raise PeerError("spawn: the order is not a map")
    return order


def _shrink(pipe: int) -> None:
    import fcntl

    with suppress(OSError):  # it works at any size
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, CONDUIT_SIZE)


@contextmanager
def _in_directory(path: bytes) -> Iterator[None]:
    """Be in the command's directory for the fork: its child has it from us."""
    try:
        os.chdir(path)
    except OSError as error:
        raise _told(f"directory|{_shown(path)}: {error.strerror}") from None
    try:
        yield
    finally:
        os.chdir("/")


def _fork_on_terminal(command: _Command, size: tuple[int, int]) -> tuple[int, int]:
    """Return (master, pid); `size`: rows and columns."""
    _Pty.born.clear()
    try:
        child = _Pty.spawn(
            [sys.executable],  # only to satisfy its search; `_become` executes the real program
            preexec_fn=partial(_become, *command),
            dimensions=size,
            pass_fds=(command.transcript,),
        )
    except OSError as error:
        raise SpawnError(f"no terminal for the command: {error}", "fork") from None
    except Exception as error:
        # Raised in the child, sent here as text by ptyprocess.
        for failed in _Pty.born:
            os.close(failed.fd)
            os.waitpid(failed.pid, 0)
        raise _told(str(error)) from None
    os.set_blocking(child.fd, False)
    return child.fd, child.pid


def _fork_on_pipe(command: _Command, output: int) -> int:
    """Return the pid of a child whose standard input is /dev/null and whose output is one pipe."""
    error_read, error_write = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(error_read)
        os.close(error_write)
        raise SpawnError(f"no process for the command: {error.strerror}", "fork") from None
    if pid == 0:
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            _close_all_but(command.transcript, error_write)
            _become(*command)
        except BaseException as error:
            os.write(error_write, str(error).encode("utf-8", "surrogateescape"))
        finally:
            os._exit(127)
    os.close(error_write)
    told = os.read(error_read, 4096)
    os.close(error_read)
    if told:
        os.waitpid(pid, 0)
        raise _told(told.decode("utf-8", "replace"))
    return pid


def _close_all_but(*kept: int) -> None:
    low = 3
    for fd in [*sorted(kept), launch.descriptor_limit()]:
        os.closerange(low, fd)
        low = fd + 1


def _become(
    argv: tuple[bytes, ...],
    environment: dict[bytes, bytes],
    transcript: int,
    limits: dict[int, tuple[int, int]],
    spawner: int,
) -> None:
    """Turn the forked child into the command; raises `RuntimeError` with the stage and the reason."""
    # Until it says that it runs, it must not outlive us: the command would be started again beside it.
    if not kernel.die_with(spawner):
        os._exit(127)
    try:
        launch.restore_limits(limits)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"limits|{error}") from None
    mark_started(transcript, os.getpid())
    kernel.outlive_parent()
    try:
        # A path needs no search, and the search is Python.
        execute = os.execve if b"/" in argv[0] else os.execvpe
        execute(argv[0], argv, environment)
    except OSError as error:
        raise RuntimeError(f"exec|{_shown(argv[0])}: {error.strerror}") from None
    except ValueError as error:
        raise RuntimeError(f"exec|{error}") from None


def _shown(raw: bytes) -> str:
    """Return a path for a message: short, and text, whatever it is.

    ptyprocess encodes the message in the child and writes it to a pipe; a child that fails there would go on as
    a second spawner.
    """
    text = raw[:200].decode("utf-8", "backslashreplace")
    return text if len(raw) <= 200 else f"{text}… ({len(raw)} bytes)"


def _told(text: str) -> SpawnError:
    stage, bar, reason = text.partition("|")
    if not bar:
        stage, reason = "spawn", text
    return SpawnError(f"the command could not be started ({stage}): {reason}", stage)


def deafen(*numbers: int) -> None:
    """Do nothing at these signals and at all that are ignored, such as SIGPIPE, which Python ignores.

    Handled, not ignored: `execve` gives handled signals back their default, and leaves ignored ones ignored.
    """
    for number in signal.valid_signals():
        if number in numbers or signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _nothing)


def _nothing(number: int, frame: object) -> None:
    """Handle a signal."""


def main() -> None:
    """Run the spawner on descriptor 3, the socket to its worker."""
    import socket

    os.chdir("/")
    # A collection in a freshly forked child would touch, and so copy, pages that it is about to throw away.
    gc.disable()
    gc.freeze()
    # The terminal's keys and the user's signals are for the children, not for us.  The mask is theirs, too.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    deafen(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    Spawner(Channel(socket.socket(fileno=launch.FIRST_FD))).run()


if __name__ == "__main__":
    main()
