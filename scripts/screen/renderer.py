"""The process that renders: it reads what is to be drawn from standard input and answers with pictures.

A frame is a length of 4 bytes, big-endian, and so many bytes of msgpack: a `Drawing` comes in, a `Drawn` goes out.

Always true
    It holds nothing but its pipes and what it draws, writes no file, and takes bounded memory and time: a byte
    stream that asks for more, or finds a fault of the emulator, ends this process and nothing else.

Not here
    Where the bytes come from: `screens`.
"""

from __future__ import annotations

import resource
import sys

import msgspec

from .emulator import AFTER_GAP, Emulator, Picture, installed

# Bytes of address space, of which an interpreter with an emulator takes a tenth.
_MEMORY_MAX = 1 << 30
# Seconds of computing for one drawing, which is 1 MiB at most; with pyte that may take 5.
_SECONDS_MAX = 10


class Drawing(msgspec.Struct, frozen=True, kw_only=True):
    """Draw `data` on the screen of that name, which has this size now, and show it.

    `start`: on an empty screen.  `gap`: something before `data` is missing.  `forget`: screens not needed any more.
    """

    name: str
    columns: int
    rows: int
    data: bytes
    start: bool
    gap: bool
    forget: list[str]


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """The screen then; `None` when no emulator is installed."""

    picture: Picture | None


def whole(data: bytes) -> bytes:
    """Return what follows the torn line or sequence at the beginning of `data`."""
    for at, byte in enumerate(data[:4096]):
        if byte < 0x20:
            return data[at:]
    return data


def _limit() -> None:
    for limit, most in (
        (resource.RLIMIT_AS, _MEMORY_MAX),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _limit_time() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + _SECONDS_MAX, hard))


def main() -> None:
    """Serve until standard input ends."""
    _limit()
    kind = installed()
    screens: dict[str, Emulator] = {}
    decoder, encoder = msgspec.msgpack.Decoder(Drawing), msgspec.msgpack.Encoder()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while len(size := requests.read(4)) == 4:
        _limit_time()
        drawing = decoder.decode(requests.read(int.from_bytes(size, "big")))
        for name in drawing.forget:
            screens.pop(name, None)
        picture = _draw(drawing, kind, screens) if kind else None
        reply = encoder.encode(Drawn(picture=picture))
        replies.write(len(reply).to_bytes(4, "big") + reply)
        replies.flush()


def _draw(drawing: Drawing, kind: type[Emulator], screens: dict[str, Emulator]) -> Picture:
    if drawing.start:
        screens[drawing.name] = kind(drawing.columns, drawing.rows)
    screen = screens[drawing.name]
    screen.resize(drawing.columns, drawing.rows)
    if drawing.gap:
        screen.feed(AFTER_GAP)
    screen.feed(whole(drawing.data) if drawing.gap else drawing.data)
    return screen.picture()


if __name__ == "__main__":
    main()
