"""What outlive is compared with, measured beside it: the least that anybody could do instead.

    Flood               children that write as fast as they can, and a C reader that does nothing but read().
    bare_spawner        ptyprocess, in a small process that does nothing else.
    bare_descriptors    one descriptor to another process and back.

Always true
    A flood begins when its gate is opened, when whoever reads has seen a byte of each child: starting is not timed.
    Without a C compiler both ends of a flood are Python, and `Programs.name` says so.
"""

from __future__ import annotations

import array
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Seconds that the bare reader may take before it counts as broken.
_READ_WITHIN = 300.0

# Both ends of a flood.  `flood BYTES GATE RESULT`: make the terminal raw, print one byte, wait until the GATE (a
# FIFO) is opened, print BYTES, append "START END" in nanoseconds to RESULT.  `read N BYTES GATE RESULT`: N floods,
# each on a terminal of its own, read to their ends; one byte is printed when all of them wait.
FLOOD_C = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static char block[65536];

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int flood(long long bytes, const char *gate, const char *result) {
    struct termios mode;
    tcgetattr(1, &mode);
    cfmakeraw(&mode);
    tcsetattr(1, TCSANOW, &mode);
    memset(block, 'x', sizeof block);
    if (write(1, "r", 1) != 1 || open(gate, O_RDONLY) < 0) return 1;
    long long start = now();
    while (bytes > 0) {
        ssize_t n = write(1, block, bytes < (long long)sizeof block ? (size_t)bytes : sizeof block);
        if (n < 0) return 1;
        bytes -= n;
    }
    char line[64];
    int length = snprintf(line, sizeof line, "%lld %lld\n", start, now());
    return write(open(result, O_WRONLY | O_APPEND | O_CREAT, 0600), line, length) != length;
}

int main(int argc, char **argv) {
    if (argc == 5) return flood(atoll(argv[2]), argv[3], argv[4]);
    int count = atoi(argv[2]), left = count, silent = count;
    struct pollfd *terminals = calloc(count, sizeof *terminals);
    char *seen = calloc(count, 1);
    for (int i = 0; i < count; i++) {
        if (forkpty(&terminals[i].fd, 0, 0, 0) == 0)
            execl(argv[0], argv[0], "flood", argv[3], argv[4], argv[5], (char *)0);
        terminals[i].events = POLLIN;
    }
    while (left > 0) {
        if (count > 1) poll(terminals, count, -1);
        for (int i = 0; i < count; i++) {
            if (terminals[i].fd < 0 || (count > 1 && !terminals[i].revents)) continue;
            if (read(terminals[i].fd, block, sizeof block) <= 0) {
                terminals[i].fd = -1;
                left--;
            } else if (!seen[i]) {
                seen[i] = 1;
                if (--silent == 0 && write(1, "r", 1) != 1) return 1;
            }
        }
    }
    return 0;
}
"""

# The same without a compiler; then the baseline is only as fast as Python's read().
FLOOD_PYTHON = r"""
import os, pty, select, sys, time, tty

def flood(left, gate, result):
    tty.setraw(1)
    block = b"x" * 65536
    os.write(1, b"r")
    os.open(gate, os.O_RDONLY)
    start = time.monotonic_ns()
    while left > 0:
        left -= os.write(1, block[:left])
    line = b"%d %d\n" % (start, time.monotonic_ns())
    os.write(os.open(result, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), line)

def read(count, arguments):
    terminals = {}
    poll = select.poll()
    for _ in range(count):
        pid, fd = pty.fork()
        if pid == 0:
            os.execv(sys.executable, [sys.executable, sys.argv[0], "flood", *arguments])
        terminals[fd] = False
        poll.register(fd, select.POLLIN)
    left, silent = count, count
    while left:
        for fd, _ in poll.poll():
            try:
                data = os.read(fd, 65536)
            except OSError:
                data = b""
            if not data:
                poll.unregister(fd)
                left -= 1
            elif not terminals[fd]:
                terminals[fd] = True
                silent -= 1
                if not silent:
                    os.write(1, b"r")

if sys.argv[1] == "flood":
    flood(int(sys.argv[2]), *sys.argv[3:])
else:
    read(int(sys.argv[2]), sys.argv[3:])
"""

# For each line of input: spawn /bin/true, read to the end, wait; print the seconds.  In a process of its own,
# because a fork costs what the forking process weighs.
SPAWN_PYTHON = r"""
import sys, time
from ptyprocess import PtyProcess

for line in sys.stdin:
    start = time.perf_counter()
    child = PtyProcess.spawn(["/bin/true"])
    try:
        while True:
            child.read(65536)
    except EOFError:
        pass
    child.wait()
    print(time.perf_counter() - start, flush=True)
    child.delayafterclose = child.delayafterterminate = 0
    child.close()
"""


@dataclass(frozen=True, slots=True)
class Programs:
    """What floods and reads: its argv without arguments, and a name that says what it is."""

    argv: list[str]
    name: str

    @classmethod
    def build(cls, where: Path) -> Programs:
        """Compile them, or fall back to Python."""
        why = "no compiler found"
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler:
            source, program = where / "flood.c", where / "flood"
            source.write_text(FLOOD_C)
            built = subprocess.run([compiler, "-O2", "-o", program, source, "-lutil"], stderr=subprocess.PIPE)
            if built.returncode == 0:
                return cls([str(program)], "C reader")
            why = f"{compiler} failed: {built.stderr.decode(errors='replace').strip()[:300]}"
        source = where / "flood.py"
        source.write_text(FLOOD_PYTHON)
        return cls([sys.executable, str(source)], f"Python reader, {why}")


class Flood:
    """One flood of `count` children: the gate they wait at, and how long they took."""

    def __init__(self, programs: Programs, folder: Path, count: int, size: int) -> None:
        self.count = count
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self._gate = self.folder / "gate"
        self._result = self.folder / "result"
        os.mkfifo(self._gate)
        self.arguments = [str(size), str(self._gate), str(self._result)]
        self.child = [*programs.argv, "flood", *self.arguments]
        self.reader = [*programs.argv, "read", str(count), *self.arguments]
        self._open = -1

    def let_go(self) -> None:
        """Open the gate."""
        self._open = os.open(self._gate, os.O_WRONLY)

    def seconds(self) -> float:
        """Return the time from the first byte of the first child to the last byte of the last one."""
        times = [[int(word) for word in line.split()] for line in self._result.read_text().splitlines()]
        if len(times) != self.count:
            raise RuntimeError(f"{len(times)} of {self.count} floods reported their end")
        return (max(end for _, end in times) - min(start for start, _ in times)) / 1e9

    def close(self) -> None:
        """Close the gate."""
        if self._open >= 0:
            os.close(self._open)

    def run_baseline(self) -> float:
        """Let the bare reader drain it, and return the seconds."""
        with subprocess.Popen(self.reader, stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.read(1)
            self.let_go()
            process.wait(_READ_WITHIN)
        self.close()
        return self.seconds()


@contextmanager
def bare_spawner() -> Iterator[Callable[[], float]]:
    """Give a function that lets a small process spawn /bin/true, and returns the milliseconds."""
    argv = [sys.executable, "-c", SPAWN_PYTHON]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def spawn() -> float:
            assert process.stdin
            assert process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline()) * 1e3

        try:
            yield spawn
        finally:
            process.kill()


@contextmanager
def bare_descriptors() -> Iterator[Callable[[], float]]:
    """Give a function that sends a descriptor to another process and back, and returns the milliseconds."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            ours.close()
            while True:
                data, fds, _, _ = socket.recv_fds(theirs, 16, 1)
                if not data:
                    break
                socket.send_fds(theirs, [data], fds)
                os.close(fds[0])
        os._exit(0)
    theirs.close()
    subject = os.open(os.devnull, os.O_RDONLY)

    def round_trip() -> float:
        start = time.perf_counter()
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [subject]))])
        _, fds, _, _ = socket.recv_fds(ours, 16, 1)
        taken = time.perf_counter() - start
        os.close(fds[0])
        return taken * 1e3

    try:
        yield round_trip
    finally:
        ours.close()
        os.close(subject)
        os.waitpid(pid, 0)
