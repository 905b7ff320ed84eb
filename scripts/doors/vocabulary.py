"""What the tools take and what they answer: the words of agents, in which a process is a session.

Each answer has its text, equal in content to its fields: agents get one or the other.

Always true
    What is not known is absent, never null.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ...common.messages import CHARS_MAX, OFFSET_MAX, outcome_from_wire
from ...common.response import Response

# Characters of a command line: the kernel takes at most 128 KiB as one argument.
CMD_MAX = 130_000
# Sessions that one call may wait for.
SESSIONS_MAX = 64

SessionId = Annotated[int, Meta(ge=1, le=9_999_999_999)]
OneSession = Annotated[
    SessionId, Meta(description="The session, as exec_command or list_sessions named it: a number such as 52328.")
]
Tokens = Annotated[
    int,
    Meta(
        ge=0,
        le=1_000_000,
        description="Shorten the output to about this many tokens of 4 bytes, keeping its beginning and its end.",
    ),
]


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tool takes."""


class ExecCommand(Arguments, frozen=True, kw_only=True):
    """Of `exec_command`."""

    cmd: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=CMD_MAX,
            description=f"A shell command line, of at most {CMD_MAX} characters; put more into a file.",
        ),
    ]
    workdir: Annotated[
        str | UnsetType, Meta(description="Folder to run in; default: that of the project. Relative to that.")
    ] = UNSET
    tty: Annotated[
        bool,
        Meta(
            description="Run on a terminal, which write_stdin can type into: for shells, REPLs, debuggers, "
            "anything that asks. Without one, stdin is closed."
        ),
    ] = False
    yield_time_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=86_400_000,
            description="Milliseconds to wait for the end before answering with what there is: 250 to 30000.",
        ),
    ] = 10_000
    max_output_tokens: Tokens = 10_000
    shell: Annotated[
        Annotated[str, Meta(min_length=1)] | UnsetType, Meta(description="Shell to run it; default: the user's.")
    ] = UNSET
    login: Annotated[bool, Meta(description="Run the shell as a login shell.")] = True


class WriteStdin(Arguments, frozen=True, kw_only=True):
    """Of `write_stdin`."""

    session_id: OneSession
    chars: Annotated[
        str,
        Meta(
            description="What to type, at most "
            f"{CHARS_MAX} bytes, with a line feed for Enter (a carriage return in full-screen programs; \\u0003 is "
            "Ctrl-C, \\u0004 Ctrl-D); empty: only wait for output."
        ),
    ] = ""
    yield_time_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=86_400_000,
            description="Milliseconds to wait for output: 250 to 30000; with empty chars 5000 to 300000. The "
            "session's end is answered at once.",
        ),
    ] = 250
    max_output_tokens: Tokens = 10_000


class ListSessions(Arguments, frozen=True, kw_only=True):
    """Of `list_sessions`."""

    all: Annotated[bool, Meta(description="Also those that have ended, the last 100; they are kept for a day.")] = (
        False
    )


class ReadOutput(Arguments, frozen=True, kw_only=True):
    """Of `read_output`."""

    session_id: OneSession
    cursor: Annotated[
        int,
        Meta(
            ge=0, le=OFFSET_MAX, description="Byte of the output to start at: 0, or the last answer's next_cursor."
        ),
    ] = 0
    tail: Annotated[
        Annotated[int, Meta(ge=1, le=100_000)] | UnsetType,
        Meta(description="Only the last so many lines, 1 to 100000; cursor is not looked at."),
    ] = UNSET
    max_output_tokens: Annotated[
        int, Meta(ge=1, le=250_000, description="Answer at most this many tokens of 4 bytes.")
    ] = 10_000


class Wait(Arguments, frozen=True, kw_only=True):
    """Of `wait`."""

    session_ids: Annotated[
        list[SessionId],
        Meta(
            min_length=1,
            max_length=SESSIONS_MAX,
            description=f"Sessions to wait for: a list of 1 to {SESSIONS_MAX} numbers.",
        ),
    ]
    match: Annotated[
        str | UnsetType,
        Meta(
            description="Until the output matches this regular expression (RE2: no look-around, no "
            "back-references). What was printed before counts, too, from cursor on."
        ),
    ] = UNSET
    cursor: Annotated[
        int,
        Meta(
            ge=0,
            le=OFFSET_MAX,
            description="Byte of the output from which a match counts: 0, or what read_output called next_cursor.",
        ),
    ] = 0
    silence: Annotated[
        float | UnsetType, Meta(description="Until nothing was printed for so many seconds, from now on.")
    ] = UNSET
    port: Annotated[
        int | UnsetType, Meta(description="Until something listens on this TCP port of this machine.")
    ] = UNSET
    any: Annotated[bool, Meta(description="Answer as soon as it is true of one session, not of all.")] = False
    timeout_ms: Annotated[
        int, Meta(ge=0, le=86_400_000, description="Milliseconds after which to answer anyway.")
    ] = 30_000


class TerminateSession(Arguments, frozen=True, kw_only=True):
    """Of `terminate_session`."""

    session_id: OneSession
    grace_s: Annotated[
        float,
        Meta(
            ge=0, le=30, description="Seconds between the request to end (SIGTERM) and the end by force (SIGKILL)."
        ),
    ] = 5.0


class Screen(Arguments, frozen=True, kw_only=True):
    """Of `screen`."""

    session_id: OneSession


# Answers.

Ended = Annotated[
    dict[str, Any] | UnsetType,
    Meta(
        description="How it ended: kind is exited (with code), signaled (with signal) or lost (with reason); by: "
        "who ended it, where that was not the program itself. Absent while it runs."
    ),
]
ExitCode = Annotated[
    int | UnsetType, Meta(description="Once it has ended: its code, or 128 + N for signal N; absent for lost.")
]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool answers."""

    def text(self) -> str:
        """Return the answer as text, equal in content."""
        raise NotImplementedError

    def structured(self) -> dict[str, Any]:
        """Return the answer as plain data, what is absent left out."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


class Reply(Answer, frozen=True, kw_only=True):
    """Of `exec_command` and `write_stdin`."""

    chunk_id: str
    wall_time_seconds: float
    exit_code: ExitCode = UNSET
    session_id: Annotated[int | UnsetType, Meta(description="Only while it runs.")] = UNSET
    original_token_count: Annotated[int, Meta(description="Of the output before it was shortened.")]
    output: str
    outcome: Ended = UNSET
    warnings: list[str] | UnsetType = UNSET

    @classmethod
    def of(cls, response: Response, max_output_tokens: int) -> Reply:
        """Return what agents get of a response, and where the rest is of one that was shortened."""
        warnings = list(response.warnings)
        if response.original_token_count > max_output_tokens:
            warnings.append(f"the output is shortened; read_output of session {response.process_id} has more of it")
        return cls(
            chunk_id=response.chunk_id,
            wall_time_seconds=round(response.wall_time_seconds, 4),
            exit_code=UNSET if response.exit_code is None else response.exit_code,
            session_id=UNSET if response.session_id is None else response.session_id,
            original_token_count=response.original_token_count,
            output=response.output,
            outcome=response.outcome or UNSET,
            warnings=warnings or UNSET,
        )

    def text(self) -> str:
        return Response(
            thread="",
            process_id="",
            chunk_id=self.chunk_id,
            wall_time_seconds=self.wall_time_seconds,
            exit_code=None,
            session_id=self.session_id or None,
            original_token_count=self.original_token_count,
            output=self.output,
            outcome=None,
            output_end=0,
            warnings=self.warnings or [],
            sentence=ending(self.outcome),
        ).text()


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One session in a list."""

    session_id: int
    state: Literal["running", "ended"]
    command: str
    workdir: str
    tty: bool
    started_at: str
    bytes_written: int
    bytes_unread: Annotated[int, Meta(description="What no answer of exec_command or write_stdin has brought yet.")]
    exit_code: ExitCode = UNSET
    outcome: Ended = UNSET

    def line(self) -> str:
        """Return it as text."""
        return (
            f"Session {self.session_id}: {ending(self.outcome) or 'running'}; {'tty' if self.tty else 'no tty'}; "
            f"started {self.started_at} in {self.workdir}; {self.bytes_written} bytes of output, "
            f"{self.bytes_unread} unread\n  $ {self.command}"
        )


class Sessions(Answer, frozen=True, kw_only=True):
    """Of `list_sessions`."""

    sessions: list[SessionRow]
    earlier: Annotated[
        int | UnsetType, Meta(description="How many more ended before those that are listed, and are kept.")
    ] = UNSET

    def text(self) -> str:
        first = f"Sessions: {len(self.sessions)}"
        if self.earlier is not UNSET:
            first += f"; {self.earlier} more have ended before these"
        return "\n".join([first, *(row.line() for row in self.sessions)])


class Gap(msgspec.Struct, frozen=True, rename={"start": "from", "end": "to"}):
    """Bytes of an output that are not kept."""

    start: int
    end: int


class Piece(Answer, frozen=True, kw_only=True):
    """Of `read_output`."""

    session_id: int
    state: Literal["running", "ended"]
    exit_code: ExitCode = UNSET
    outcome: Ended = UNSET
    cursor: Annotated[int, Meta(description="Byte of the output that this begins at.")]
    next_cursor: Annotated[int, Meta(description="Where to go on reading.")]
    bytes_written: Annotated[
        int, Meta(description="Of the output so far; next_cursor equals it when all was read.")
    ]
    gaps: list[Gap]
    output: str

    def text(self) -> str:
        return "\n".join(
            [
                f"Session {self.session_id}: {ending(self.outcome) or 'running'}",
                f"Bytes {self.cursor} to {self.next_cursor} of {self.bytes_written}",
                *(f"Gap: bytes {gap.start} to {gap.end} are not kept" for gap in self.gaps),
                "Output:",
                self.output,
            ]
        )


class Awaited(msgspec.Struct, frozen=True, kw_only=True):
    """What a wait came to for one session."""

    session_id: int
    came_true: Annotated[
        Literal["exit", "match", "silence", "port"] | UnsetType,
        Meta(description="What was waited for; else absent."),
    ] = UNSET
    matched: Annotated[str | UnsetType, Meta(description="What of the output matched.")] = UNSET
    offset: Annotated[int | UnsetType, Meta(description="At which byte of the output.")] = UNSET
    exit_code: ExitCode = UNSET
    outcome: Ended = UNSET

    def line(self) -> str:
        """Return it as text."""
        said = ending(self.outcome)
        if self.came_true == "match":
            said = f"match at byte {self.offset}: {self.matched}"
        elif self.came_true in ("silence", "port"):
            said = f"{self.came_true} came true"
        elif said and not self.came_true:
            said += ", before what was waited for came true"
        return f"Session {self.session_id}: {said or 'running; not yet'}"


class Waited(Answer, frozen=True, kw_only=True):
    """Of `wait`."""

    sessions: list[Awaited]
    timed_out: Annotated[
        bool, Meta(description="Not everything that was waited for came true; wait again to go on.")
    ]

    def text(self) -> str:
        again = ["Timed out; call wait again to go on waiting."] if self.timed_out else []
        return "\n".join([*(row.line() for row in self.sessions), *again])


class Terminated(Answer, frozen=True, kw_only=True):
    """Of `terminate_session`."""

    session_id: int
    state: Literal["running", "ended"]
    exit_code: ExitCode = UNSET
    outcome: Ended = UNSET

    def text(self) -> str:
        return f"Session {self.session_id}: {ending(self.outcome) or 'running; it has not ended yet, wait for it'}"


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """Where a terminal's cursor is, counted from 0."""

    row: int
    column: int
    visible: bool


class ScreenAnswer(Answer, frozen=True, kw_only=True):
    """Of `screen`."""

    session_id: int
    columns: int
    rows: int
    cursor: Cursor
    complete: Annotated[bool, Meta(description="False where output is not kept that may still be on the screen.")]
    lines: list[str]

    def text(self) -> str:
        cursor = self.cursor
        return "\n".join(
            [
                f"Session {self.session_id}: {self.columns} columns, {self.rows} rows; "
                f"{'' if cursor.visible else 'hidden '}cursor at row {cursor.row}, column {cursor.column}"
                + ("" if self.complete else "; not complete: some output is not kept"),
                *self.lines,
            ]
        )


def ending(outcome: dict[str, Any] | UnsetType) -> str:
    """Return how a session ended, in the sentence of its process; empty while it runs."""
    known = outcome_from_wire(outcome) if outcome else None
    return known.sentence() if known else ""


def of_outcome(outcome: dict[str, Any] | None) -> dict[str, Any]:
    """Return the fields `exit_code` and `outcome` of an answer."""
    known = outcome_from_wire(outcome)
    code = known.exit_code if known else None
    return {"exit_code": UNSET if code is None else code, "outcome": outcome or UNSET}
