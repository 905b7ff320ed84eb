"""The commands that look, and change nothing: status, doctor, ps, threads, wakes, logs, screen, events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .arguments import ThreadName, WakeNumber
from .frame import (
    FAILED,
    Process,
    command,
    in_thread,
    key_of,
    process_argument,
    show,
    thread_of,
    thread_table,
    with_host,
)
from .rendering import ends_with_reader, message, printable, table, write, write_json, write_line, write_text

if TYPE_CHECKING:
    from ..common.client import Host
    from ..common.messages import Output, ProcessRow
    from ..common.program import WakeRow


@command()
def status(as_json: bool) -> None:
    """Show what the broker holds, and its version.

    \b
    Example: outlive status --json
    """
    answer = with_host(lambda host: host.status())
    lines = []
    for name, value in answer.items():
        if isinstance(value, dict):
            value = ", ".join(f"{count} {what}" for what, count in value.items())
        lines.append(f"{name.replace('_', ' '):<18}{'-' if value is None else value}")
    show(answer, as_json, "\n".join(lines))


@command()
def doctor(as_json: bool) -> int:
    """Check that this machine is fit for outlive.

    Says of each thing what was found, what it means, and what to do. Changes nothing and starts no broker. Exit
    status 1 when something is an error; notes and warnings are none.

    \b
    Examples: outlive doctor
              outlive doctor --json | jq '.[] | select(.severity != "ok")'
    """
    from ..common.paths import Paths
    from .doctor.examination import examine

    found = []
    for finding in examine(Paths.from_environment()):
        found.append(finding)
        if not as_json:
            write_line(
                f"{finding.severity:<8} {finding.check}: {printable(finding.found)}; {printable(finding.meaning)}"
            )
            if finding.advice:
                write_line(f"         → {printable(finding.advice)}")
    if as_json:
        write_json([finding.to_builtins() for finding in found])
    return FAILED if any(finding.severity == "error" for finding in found) else 0


@command()
@click.option("-t", "--thread", type=ThreadName(), metavar="THREAD", help="Only this thread's.")
@click.option("--all", "ended", is_flag=True, help="Also those that have ended, until they expire.")
def ps(thread: str | None, ended: bool, as_json: bool) -> None:
    """List processes: the live ones of all threads.

    \b
    Example: outlive ps -t build --all
    """

    async def work(host: Host) -> list[ProcessRow]:
        return await (thread_of(host, thread) if thread else host).processes(ended=ended)

    rows = with_host(work)
    if as_json:
        show(rows, True, "")
        return
    import shlex

    table(
        ("THREAD", "ID", "STATE", "PID", "TTY", "STARTED", "BYTES", "OUTCOME", "COMMAND"),
        [
            (
                row.thread,
                row.process_id,
                row.state,
                row.pid,
                "yes" if row.tty else "no",
                row.started_at[:19] + "Z",
                row.bytes_written,
                _brief(row.outcome),
                shlex.join(row.command),
            )
            for row in rows
        ],
        numbers=("PID", "BYTES"),
        spare=("STARTED", "TTY", "BYTES", "PID", "OUTCOME"),
    )


def _brief(outcome: dict[str, Any] | None) -> str | None:
    from ..common.outcome import signal_name

    if outcome is None:
        return None
    if outcome["kind"] == "exited":
        return f"exit {outcome['code']}"
    return signal_name(outcome["signal"]) if outcome["kind"] == "signaled" else "lost"


@command()
def threads(as_json: bool) -> None:
    """List threads, and whether they are awake.

    Also the program of each, and for how much it is still to be woken.

    \b
    Example: outlive threads
    """
    rows = with_host(lambda host: host.threads())
    show(rows, True, "") if as_json else thread_table(rows)


@command()
@click.option("-t", "--thread", type=ThreadName(), metavar="THREAD", help="Only this thread's.")
@click.option("--all", "everything", is_flag=True, help="Also what is over.")
@click.option("--retry", type=WakeNumber(), metavar="NUMBER", help="Deliver a dead letter once more.")
@click.option("--drop", type=WakeNumber(), metavar="NUMBER", help="Do not deliver a wake.")
def wakes(thread: str | None, everything: bool, retry: int | None, drop: int | None, as_json: bool) -> None:
    """List what threads are to be woken for, and what could not be delivered.

    A wake is pending until its thread's program has returned. One with which the program has failed five times is
    dead: repair the program, and --retry the wake, or --drop it. What the agent had read by itself is not
    delivered; --retry does that, too.

    \b
    Examples: outlive wakes -t build --all
              outlive wakes --retry 17
    """
    if retry is not None and drop is not None:
        raise click.UsageError("--retry and --drop exclude each other")

    async def work(host: Host) -> list[WakeRow]:
        if retry is not None:
            return [await host.retry_wake(retry)]
        if drop is not None:
            return [await host.drop_wake(drop)]
        return await (thread_of(host, thread) if thread else host).wakes(all=everything)

    rows = with_host(work)
    if as_json:
        show(rows if retry is None and drop is None else rows[0], True, "")
        return
    table(
        ("NUMBER", "THREAD", "PROCESS", "RULE", "STATE", "FAILED", "SINCE", "OUTCOME", "FAILURE"),
        [
            (
                row.number,
                row.thread,
                row.process_id,
                row.rule,
                row.state,
                row.failures,
                row.at[:19] + "Z",
                _brief(row.outcome),
                row.failure,
            )
            for row in rows
        ],
        numbers=("NUMBER", "FAILED"),
        spare=("SINCE",),
    )


@command()
@in_thread
@process_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until the process has ended.")
@click.option(
    "--since",
    type=click.IntRange(0, (1 << 62) - 1),
    default=0,
    metavar="OFFSET",
    help="Start at this byte of the output.",
)
@click.option("--raw", is_flag=True, help="Write the kept bytes and nothing else; gaps are told on standard error.")
def logs(thread: str | None, process: Process, follow: bool, since: int, raw: bool, as_json: bool) -> None:
    """Show the output of a process.

    Also of one that has ended; and nothing is taken from its agent. The beginning and the end of a long output are
    kept; what is not is marked where it was.

    \b
    Examples: outlive logs 4711 -f
              outlive logs build/4711 --raw > output.bin
    """
    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other")
    thread_id, process_id = key_of(process, thread)

    async def stream(host: Host) -> None:
        render = _raw if raw else _Json(thread_id, process_id) if as_json else _Text()
        with ends_with_reader():
            async for piece in thread_of(host, thread_id).follow(process_id, since):
                render(piece)

    async def once(host: Host) -> list[Output]:
        pieces, offset, end = [], since, None
        while end is None or offset < end:
            piece = await thread_of(host, thread_id).read_output(process_id, offset)
            pieces.append(piece)
            end = piece.written if end is None else end  # of a flood: what was there when we came
            if not (piece.pieces or piece.gaps):
                break
            offset = piece.next_offset
        return pieces

    if follow:
        with_host(stream)
        return
    pieces = with_host(once)
    if as_json:
        write_json(_log_object(thread_id, process_id, since, pieces))
        return
    render = _raw if raw else _Text()
    for piece in pieces:
        render(piece)
    if isinstance(render, _Text):
        render.end()


def _parts(piece: Output) -> list[tuple[int, bytes | int]]:
    """Return pieces (offset, bytes) and gaps (offset, end) in their order."""
    return sorted([*piece.pieces, *piece.gaps], key=lambda part: part[0])


def _raw(piece: Output) -> None:
    for offset, part in _parts(piece):
        if isinstance(part, bytes):
            write(part)
        else:
            message(f"gap: {part - offset} bytes, from offset {offset} to {part}, are not kept")


class _Text:
    """Writes output as text, each character whole, with gaps marked in their place."""

    def __init__(self) -> None:
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, piece: Output) -> None:
        for offset, part in _parts(piece):
            if isinstance(part, bytes):
                write_text(self._decoder.decode(part))
            else:
                self.end()
                write_line(f"\n[outlive: {part - offset} bytes, from offset {offset} to {part}, are not kept]")
        if piece.ended and piece.next_offset >= piece.written:
            self.end()

    def end(self) -> None:
        """Write what is left of a character that will not become whole."""
        write_text(self._decoder.decode(b"", final=True))


class _Json:
    """Writes output as objects, one a line: output, gaps, and last the outcome."""

    def __init__(self, thread: str, process_id: str) -> None:
        self._key = {"thread": thread, "process_id": process_id}
        self._at = 0
        self._held = b""

    def __call__(self, piece: Output) -> None:
        from ..common.response import whole_characters

        for offset, part in _parts(piece):
            if isinstance(part, bytes):
                if not self._held:
                    self._at = offset
                data = self._held + part
                self._write(data[: (whole := whole_characters(data))])
                self._held = data[whole:]
            else:
                self._write(self._held)
                self._held = b""
                write_json({**self._key, "gap": {"from": offset, "to": part}})
        if piece.ended and piece.next_offset >= piece.written:
            self._write(self._held)
            write_json({**self._key, "outcome": piece.outcome})

    def _write(self, data: bytes) -> None:
        if data:
            write_json({**self._key, "offset": self._at, "output": data.decode("utf-8", "replace")})
            self._at += len(data)


def _log_object(thread: str, process_id: str, since: int, pieces: Sequence[Output]) -> dict[str, Any]:
    output = b"".join(data for piece in pieces for _, data in sorted(piece.pieces))
    last = pieces[-1]
    return {
        "thread": thread,
        "process_id": process_id,
        "since": since,
        "output": output.decode("utf-8", "replace"),
        "gaps": [{"from": start, "to": end} for piece in pieces for start, end in piece.gaps],
        "next_offset": last.next_offset,
        "bytes_written": last.written,
        "ended": last.ended,
        "outcome": last.outcome if last.ended else None,
    }


@command()
@in_thread
@process_argument
def screen(thread: str | None, process: Process, as_json: bool) -> None:
    """Show what is on the terminal of a process, as text.

    For programs that fill the screen, such as editors, whose output makes no sense line by line. Also of a process
    that has ended; and nothing is taken from its agent, nor is its thread woken. --json adds the cursor, the size,
    and whether all of the output was there to draw the screen from.

    \b
    Example: outlive screen build/4711
    """
    from .screen import Screen, screen_of

    thread_id, process_id = key_of(process, thread)

    async def work(host: Host) -> Screen:
        return await screen_of(thread_of(host, thread_id), process_id)

    shown = with_host(work)
    if not shown.complete:
        message("part of the output is no longer kept; parts of this screen may be missing or out of date")
    show(shown, as_json, shown.text)


@command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens now, until the broker ends for good.")
@click.option("--deltas", is_flag=True, help="With -f: output too, piece by piece.")
def events(follow: bool, deltas: bool, as_json: bool) -> None:
    """Show what has happened lately.

    Processes that began, ended, were detached or reattached; wakes and what became of them; workers and brokers
    that came and went.

    \b
    Example: outlive events -f --json
    """
    from ..common.client import to_builtins

    if deltas and not follow:
        raise click.UsageError("--deltas needs -f: output is not remembered as events")

    def print_event(event: dict[str, Any]) -> None:
        plain = to_builtins(event)
        write_json(plain) if as_json else write_line(_event_line(plain))

    async def stream(host: Host) -> None:
        with ends_with_reader():
            async for event in host.events(deltas=deltas, recent=True):
                print_event(event)
        message("the broker has ended")

    if follow:
        with_host(stream)
        return
    for event in with_host(lambda host: host.recent_events()):
        print_event(event)


def _event_line(event: dict[str, Any]) -> str:
    import json

    about = "/".join(event[name] for name in ("thread", "process_id") if event[name])
    told = ("event", "seq", "thread", "process_id", "call_id", "at")
    rest = " ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in event.items()
        if name not in told and value is not None
    )
    return printable(f"{event['at']} {event['event']:<10} {about} {rest}".rstrip())
