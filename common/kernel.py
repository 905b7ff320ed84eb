"""The few Linux calls that Python lacks, and facts that only the kernel knows.

The only module with ctypes or ioctl numbers.  Each function asks one thing, returns plain values, and lets
`OSError` through; a feature that a kernel does not have is a `None` or a `False`, never a guess.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import termios
import time
from functools import cache

_libc = ctypes.CDLL(None, use_errno=True)
# Without errno: a forked child pays for each page that it touches first, and keeping errno takes eighteen.
_prctl = ctypes.CDLL(None).prctl  # looked up before any fork

_TFD_TIMER_ABSTIME = 1
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_PR_SET_PDEATHSIG = 1
_SIGKILL = int(signal.SIGKILL)
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_MFD_NOEXEC_SEAL = 0x08
# What MFD_NOEXEC_SEAL sets.
_F_SEAL_EXEC = 0x20
_SO_PEERPIDFD = 77
_TIOCSIG = 0x40045436
_TIOCGPTN = 0x80045430
# _IOWR(0xFF, 11, struct pidfd_info), for the struct's first published size of 64 bytes.
_PIDFD_GET_INFO = 0xC040FF0B
_KCMP_FILE = 0
# Of the machines we have met; elsewhere the call counts as missing.
_SYS_KCMP = {
    "x86_64": 312,
    "aarch64": 272,
    "riscv64": 272,
    "loongarch64": 272,
    "ppc64le": 354,
    "s390x": 343,
}.get(os.uname().machine, -1)
_PIDFD_INFO_PID = 1 << 0
_PIDFD_INFO_EXIT = 1 << 3


def _check(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def _control(option: int, value: int) -> None:
    if _prctl(option, value, 0, 0, 0) < 0:
        raise OSError(errno.EINVAL, f"prctl({option}): {os.strerror(errno.EINVAL)}")  # it has no other


def boottime() -> float:
    """Return seconds since boot, suspend included (`CLOCK_BOOTTIME`): the clock of every deadline."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def timer() -> int:
    """Return a timer on `CLOCK_BOOTTIME`, a descriptor that is readable once its time has come."""
    fd = _libc.timerfd_create(time.CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC)
    _check(fd, "timerfd_create")
    return int(fd)


def set_timer(fd: int, instant: int) -> None:
    """Have a timer's time come at `instant`, in nanoseconds since boot; at once if that has passed."""
    seconds, nanoseconds = divmod(max(instant, 1), 1_000_000_000)
    value = struct.pack("qqqq", 0, 0, seconds, nanoseconds)
    _check(_libc.timerfd_settime(fd, _TFD_TIMER_ABSTIME, value, None), "timerfd_settime")


@cache
def boot_id() -> str:
    """Return this boot's id: descriptors, pids and deadlines mean nothing outside it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def punch_hole(fd: int, start: int, length: int) -> None:
    """Give the pages of `fd` wholly inside `[start, start + length)` back, keeping the file's size."""
    result = _libc.fallocate(
        ctypes.c_int(fd),
        ctypes.c_int(_FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE),
        ctypes.c_int64(start),
        ctypes.c_int64(length),
    )
    _check(result, "fallocate")


def become_subreaper() -> None:
    """Make orphaned descendants ours to wait for."""
    _control(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> bool:
    """Be killed by the kernel when our parent dies; false if `parent` is our parent no more."""
    _control(_PR_SET_PDEATHSIG, _SIGKILL)
    return os.getppid() == parent


def outlive_parent() -> None:
    """Take `die_with` back."""
    _control(_PR_SET_PDEATHSIG, 0)


def memfd(name: str) -> int:
    """Return a new memfd that can be sealed and never executed, mode 0600, close-on-exec."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3 does not know the flag
            raise
        fd = os.memfd_create(name, flags)
    os.fchmod(fd, 0o600)
    return fd


def seal(fd: int) -> None:
    """Forbid shrinking `fd`, and any further seal: a holder could otherwise seal it against writing."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)


def seals(fd: int) -> int:
    """Return the seals of a memfd; raises `OSError` (EINVAL) for any other file."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


def is_sealed_memfd(fd: int) -> bool:
    """Tell whether `fd` is a memfd with the seals that `seal` sets, and none that keeps it from growing."""
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    try:
        return seals(fd) & ~_F_SEAL_EXEC == wanted
    except OSError:
        return False


def window_size(terminal: int) -> tuple[int, int]:
    """Return the size of a terminal as (columns, rows)."""
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(terminal, termios.TIOCGWINSZ, b"\0" * 8))
    return columns, rows


def set_window_size(terminal: int, columns: int, rows: int) -> None:
    """Set a terminal's size; the kernel sends SIGWINCH to its foreground group when it changed."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def signal_foreground(master: int, signal_number: int) -> None:
    """Signal the foreground group of a PTY, also where its Ctrl-C is off.

    The kernel takes SIGINT, SIGQUIT and SIGTSTP here; others go to the group by its number.
    """
    if signal_number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):
        fcntl.ioctl(master, _TIOCSIG, signal_number)
        return
    group = os.tcgetpgrp(master)
    if group <= 0:  # after the leader's end the master has no group: killpg(0) would be our own
        raise ProcessLookupError(errno.ESRCH, "the terminal has no foreground group")
    os.killpg(group, signal_number)


def pidfd_exit_status(pidfd: int) -> int | None:
    """Return the wait status of a process that was already reaped, or `None` where the kernel cannot say.

    Linux 6.15 and newer.  Before the reap the code reads 0 without the EXIT bit, which is no answer.
    """
    request = bytearray(64)
    struct.pack_into("Q", request, 0, _PIDFD_INFO_PID | _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, request)
    except OSError:
        return None
    (mask,) = struct.unpack_from("Q", request, 0)
    return int(struct.unpack_from("i", request, 60)[0]) if mask & _PIDFD_INFO_EXIT else None


def pidfd_pid(pidfd: int) -> int | None:
    """Return the pid that a pidfd stands for, or `None` when that process has been reaped."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb", buffering=0) as file:
        _, _, line = file.read(4096).partition(b"\nPid:")
    pid = int(line.partition(b"\n")[0] or 0)
    return pid if pid > 0 else None


def is_pidfd(fd: int) -> bool:
    """Tell whether `fd` is a pidfd."""
    return "pidfd" in os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2]


def is_pty_master(fd: int) -> bool:
    """Tell whether `fd` is the master of a pseudoterminal."""
    try:
        fcntl.ioctl(fd, _TIOCGPTN, b"\0\0\0\0")
    except OSError:
        return False
    return True


def is_same_file(first: int, second: int) -> bool:
    """Tell whether two descriptors are the same open file, with one position; `False` where nobody can tell."""
    pid = os.getpid()
    numbers = ctypes.c_ulong(first), ctypes.c_ulong(second)
    return bool(_libc.syscall(ctypes.c_long(_SYS_KCMP), pid, pid, _KCMP_FILE, *numbers) == 0)


def is_reaped(pidfd: int) -> bool:
    """Tell whether the process behind `pidfd` has been waited for, so that its pid may be recycled."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _stat_fields(pid: int) -> list[bytes] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and brackets; what follows the last bracket starts at field 3.
    return text[text.rindex(b")") + 2 :].split()


def start_time(pid: int) -> int | None:
    """Return when `pid` started, in clock ticks since boot, or `None` when there is no such process.

    A pid and its start time together name one process of this boot.
    """
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else None


def is_dead(pid: int, started: int) -> bool:
    """Tell whether the process that started as `pid` at `started` has ended, be it reaped or not."""
    fields = _stat_fields(pid)
    return fields is None or int(fields[19]) != started or fields[0] in (b"Z", b"X")


def child_status(pidfd: int) -> int | None:
    """Return the wait status of an ended child of ours, which stays to be reaped; `None` for any other."""
    try:
        found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if found is None:
        return None
    # Here `waitid` tells code and signal apart, which a wait status has in two bytes.
    return found.si_status << 8 if found.si_code == os.CLD_EXITED else found.si_status


def zombie_status(pid: int) -> int | None:
    """Return the wait status of `pid` if it is a zombie of a user we may inspect, else `None`.

    Of others, such as a setuid program, the kernel shows 0 in this field, which is no answer.
    """
    fields = _stat_fields(pid)
    if not fields or fields[0] != b"Z":
        return None
    status = int(fields[49])
    return status if status or os.geteuid() == 0 or _is_like_us(pid) else None


def _is_like_us(pid: int) -> bool:
    """Tell whether all user and group ids of `pid` are ours."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = dict(line.split(b":", 1) for line in file if b":" in line)
    except OSError:
        return False
    users, groups = ([int(number) for number in lines[name].split()] for name in (b"Uid", b"Gid"))
    return set(users) == {os.geteuid()} and set(groups) == {os.getegid()}


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Return (pid, uid) of whoever connected, as the kernel recorded it."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("iii", raw)
    return pid, uid


def peer_pidfd(connection: socket.socket) -> int | None:
    """Return a pidfd of whoever connected (Linux 6.5 and newer; else by pid), `None` when it is gone."""
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
        return int(struct.unpack("i", raw)[0])
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return None
    try:
        return os.pidfd_open(peer_credentials(connection)[0])
    except ProcessLookupError:
        return None


def can_splice_terminals() -> bool:
    """Tell whether this kernel splices from a terminal, and sends to one, outside of some sandboxes.

    Linux 5.11 and newer.
    """
    master, slave = os.openpty()
    read_end, write_end = os.pipe()
    file = memfd("outlive")
    try:
        os.set_blocking(master, False)
        try:
            os.pwrite(file, b"x", 0)
            os.sendfile(master, file, None, 1)
            os.splice(master, write_end, 1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True
    finally:
        for fd in (master, slave, read_end, write_end, file):
            os.close(fd)


# Whether this kernel has what we use; each tries it on something of our own.


def has_subreapers() -> bool:
    """Tell whether orphans can be adopted, without becoming one who does."""
    was = ctypes.c_int()
    return int(_prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was), 0, 0, 0)) == 0


def has_noexec_seal() -> bool:
    """Tell whether a memfd can be made that nobody can ever execute (Linux 6.3 and newer)."""
    try:
        os.close(os.memfd_create("outlive", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_NOEXEC_SEAL))
    except OSError:
        return False
    return True


def has_peer_pidfd() -> bool:
    """Tell whether the kernel names a peer by pidfd (Linux 6.5 and newer)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            raw = ours.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
        except OSError:
            return False
        os.close(struct.unpack("i", raw)[0])
        return True


def has_kcmp() -> bool:
    """Tell whether the kernel says if two descriptors are the same open file (`kcmp`)."""
    first, second = os.pipe()
    copy = os.dup(first)
    try:
        return is_same_file(first, copy) and not is_same_file(first, second)
    finally:
        for fd in (first, second, copy):
            os.close(fd)
