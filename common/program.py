"""A thread's program, and what it is woken with: the types on the wire, in the journal and in an agent's hands.

A program is a function that a worker loads, or a command that is run.  A wake is one run of it.
"""

from __future__ import annotations

import os
import shlex
from typing import Annotated, Any, Literal

import msgspec

# Characters of a program in one line.
LABEL_MAX = 200


class Program(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a thread runs when it is woken: a `function`, or a command with this `argv`.

    `function`: `MODULE:NAME` or `FILE.py:NAME`, found from `workdir`, in which it runs, as the command does.
    `path`: the PATH of whoever gave it.  `even_read`: it also wants wakes about what the agent has read by itself.
    """

    function: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    argv: Annotated[list[bytes], msgspec.Meta(max_length=10_000)] = []
    workdir: bytes = b"/"
    path: bytes = b""
    even_read: bool = False

    @property
    def label(self) -> str:
        """The program in one line, for people: at most `LABEL_MAX` characters, and `…` where it was cut."""
        label = self.function or shlex.join(os.fsdecode(word) for word in self.argv)
        return label if len(label) <= LABEL_MAX else f"{label[:LABEL_MAX]}…"


class WakeMatch(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that came true: of which process, which rule, and what there is to say about it.

    `outcome`: of one that has ended.  `text`, `offset`: what matched in its output, and where.  `read`: the agent
    had learned it by itself.
    """

    number: int
    process_id: str
    rule: str
    at: str
    outcome: dict[str, Any] | None = None
    text: str | None = None
    offset: int | None = None
    read: bool = False


class ProcessSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a woken agent finds of one of its processes.

    `unread`: bytes of output that it has not had.  `output`: of one that has ended, these as text, a long one
    without its middle; they do not count as read by that.
    """

    process_id: str
    call_id: str
    command: list[str]
    state: Literal["alive", "ended", "lost"]
    outcome: dict[str, Any] | None
    unread: int
    output: str


class Wake(msgspec.Struct, frozen=True, kw_only=True):
    """What a program is run with: all that came true since its last run, and what is there.

    `reason`: `start` for the first run of a program, else `wake`.  `number`: of its first match; the same again
    when the program failed, which `attempt` counts, or its worker died.  `run`: another one for each, except that a
    run whose worker died is the same again.
    """

    thread: str
    reason: Literal["start", "wake"]
    number: int
    run: int
    attempt: int
    matches: list[WakeMatch]
    processes: list[ProcessSummary]


class WakeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `wakes`: which process (`None`: the thread was started), which rule, what has become of it."""

    number: int
    thread: str
    process_id: str | None
    rule: str
    state: Literal["new", "pending", "delivered", "done", "read", "dead", "dropped"]
    failures: int
    failure: str | None
    at: str
    outcome: dict[str, Any] | None
    text: str | None
    offset: int | None
