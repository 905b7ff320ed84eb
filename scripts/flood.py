"""A child that floods numbered lines, and what must then be in its transcript.

    TAG:NUMBER\\n       4 hex digits and 10 digits: line n of a child stands at n × 16, and is nobody else's

Run as a program (it imports nothing of ours, and starts fast):  flood.py TAG LINES BURST PAUSE_MS END
END is an exit code, or -N to end by signal N.  A terminal is set raw first, so that a line stays what it is.
"""

from __future__ import annotations

import os
import re
import sys
import time

WIDTH = 16


def lines(tag: int, start: int, stop: int) -> bytes:
    """Return the lines `start` to `stop` (exclusive) of a child."""
    return b"".join(b"%04x:%010d\n" % (tag, number) for number in range(start, stop))


def printed(tag: int, start: int, stop: int) -> bytes:
    """Return what a child prints from offset `start` to `stop` (exclusive)."""
    first = start // WIDTH
    return lines(tag, first, -(-stop // WIDTH))[start - first * WIDTH :][: stop - start]


def misplaced(tag: int, offset: int, data: bytes) -> int:
    """Return how many bytes of `data` are not what the child printed at `offset`."""
    right = printed(tag, offset, offset + len(data))
    return 0 if data == right else sum(a != b for a, b in zip(data, right, strict=True))


def disordered(tag: int, data: bytes) -> int:
    """Return how many bytes of `data`, which is misplaced, belong to lines that come after a later one."""
    latest, count = -1, 0
    for line in data.split(b"\n"):
        name, _, digits = line.partition(b":")
        if name == b"%04x" % tag and len(digits) == 10 and digits.isdigit():
            number = int(digits)
            count += WIDTH * (number <= latest)
            latest = max(latest, number)
    return count


def lost_until(tag: int, offset: int, data: bytes) -> int:
    """Return how many bytes are missing before the last whole line of `data`; negative: how many too many.

    0 where no line is whole.
    """
    whole = [*re.finditer(rb"%04x:(\d{10})\n" % tag, data)]
    return int(whole[-1][1]) * WIDTH - (offset + whole[-1].start()) if whole else 0


def main() -> None:
    """Print, pause, print; then end as told."""
    tag, count, burst, pause_ms, end = (int(word) for word in sys.argv[1:])
    if os.isatty(1):
        import tty

        tty.setraw(1)
    for number, start in enumerate(range(0, count, burst)):
        view = memoryview(lines(tag, start, min(start + burst, count)))
        while view:
            view = view[os.write(1, view) :]
        # Uneven, so that kills meet every phase of a burst; the same in every run.
        time.sleep(pause_ms * (number * 7919 % 100) / 100_000)
    if end < 0:
        os.kill(os.getpid(), -end)
    os._exit(end)


if __name__ == "__main__":
    main()
