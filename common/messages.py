"""Every request, notice and reply, as frozen types: what may be asked, by whom, and what comes back.

One frame is one msgpack map: a `Request` (with an `op` that names one of the bodies below), or a `Reply`.  A notice
is a request with `id` 0, which gets no reply.  Types grow only by addition; `Down` keeps its shape for ever, so
that any version can end any other.

    client → broker      everything in `CLIENT_OPS`
    broker → worker      everything in `WORKER_OPS`: some of the client's, and the handoff
    worker → broker      everything in `FROM_WORKER_OPS`: a `Register`, then notices

Not here
    Events for subscribers, which are plain maps: `broker.loop`.  Packets on the channel: `channel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal

import msgspec

from .names import RANDOM_IDS
from .outcome import Outcome
from .program import Program, Wake

# Raised only by a change that is no addition.  Two sides that differ speak the lower of their versions; one older
# than `OLDEST` is refused, and its processes go to a worker of today.
VERSION = 1
OLDEST = 1

# Bytes of input in one call.  More is typed in several calls.
CHARS_MAX = 1 << 20
# Bytes of a transcript in one reply.
READ_MAX = 1 << 20
# Beyond every transcript's end.
OFFSET_MAX = (1 << 62) - 1
# A subscription to a topic that starts with this is sent back, to it alone: it and those before it are in force.
READY_TOPIC = b"ready-"

Text = Annotated[str, msgspec.Meta(max_length=256)]
Name = Annotated[str, msgspec.Meta(max_length=100_000)]  # checked by `paths`, with an error of its own
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=86_400_000)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Cells = Annotated[int, msgspec.Meta(ge=1, le=65_535)]
Offset = Annotated[int, msgspec.Meta(ge=0, le=OFFSET_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
# The text of a wake rule, see `rules`.
RuleText = Annotated[str, msgspec.Meta(max_length=1100)]
SignalNumber = Annotated[int, msgspec.Meta(ge=1, le=64)]


class Body(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request carries; its `op` is the name of the class in snake case."""


# Frames.


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A frame that wants one reply (`id` > 0), or a notice (`id` 0).

    `token`: from the handshake.  `deadline`: on `CLOCK_BOOTTIME`, checked by the receiver.
    """

    v: int
    op: Text
    body: dict[str, Any]
    token: Text = ""
    id: Annotated[int, msgspec.Meta(ge=0)] = 0
    deadline: float | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error on the wire; `kind` is that of a class in `errors`."""

    kind: str
    message: str
    stage: str | None = None


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The one answer to a request: a result, or a failure."""

    v: int
    id: int
    result: Any = None
    error: Failure | None = None


# Bodies that a client sends.


class ExecCommand(Body, frozen=True, kw_only=True):
    """Start a command; `cmd` is a shell command line (text) or an argv (list).

    `environment` is the caller's, `overrides` what the call itself sets.  `call_id` makes it count once.
    `wake_on`: the rules whose coming true wakes the thread.
    """

    thread: Name
    cmd: str | list[bytes]
    workdir: bytes
    environment: dict[bytes, bytes]
    call_id: Text
    overrides: dict[bytes, bytes] = {}
    shell: bytes | None = None
    login: bool = True
    tty: bool = False
    columns: Cells = 80
    rows: Cells = 24
    yield_time_ms: Milliseconds = 10_000
    max_output_tokens: Tokens = 10_000
    wake_on: list[RuleText] = []


class WriteStdin(Body, frozen=True, kw_only=True):
    """Type into a process, or with empty `chars` just poll it.

    `resume`: start or wake the thread's worker for it; else a detached process is typed into by the broker.
    `write_id`: makes it count once: again, it types nothing more, and is answered with the output since it came
    first.  A process knows its last calls, see `inlet`.
    """

    thread: Name
    process_id: Name
    chars: Annotated[bytes, msgspec.Meta(max_length=CHARS_MAX)] = b""
    yield_time_ms: Milliseconds = 250
    max_output_tokens: Tokens = 10_000
    write_id: Text = ""
    resume: bool = True


class ReadOutput(Body, frozen=True, kw_only=True):
    """Read a transcript without delivering it; waits `wait_ms` for something after `offset`."""

    thread: Name
    process_id: Name
    offset: Offset = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=READ_MAX)] = READ_MAX
    wait_ms: Milliseconds = 0


class ListProcesses(Body, frozen=True, kw_only=True):
    """Processes of one thread or of all; `ended`: those of the journal too, at the end of the list.

    They may be more than an answer can hold: `at_most` so many of them are listed, and with `after`, a thread and a
    process id, only those that follow it in an earlier answer.
    """

    thread: Name | None = None
    ended: bool = False
    at_most: Annotated[int, msgspec.Meta(ge=1, le=OFFSET_MAX)] | None = None
    after: tuple[Name, Name] | None = None


class ListThreads(Body, frozen=True, kw_only=True):
    """All threads."""


class CreateThread(Body, frozen=True, kw_only=True):
    """Make a thread known; it gets a worker when it needs one."""

    thread: Name


class Watch(Body, frozen=True, kw_only=True):
    """Set rules on a process that has started, whose coming true wakes the thread.

    Of a rule that is open already, or with the same `watch_id` again, that one is meant.  Output counts from the
    beginning of what is kept, or where the same rule matched before.
    """

    thread: Name
    process_id: Name
    rules: Annotated[list[RuleText], msgspec.Meta(min_length=1)]
    watch_id: Text


class Wait(Body, frozen=True, kw_only=True):
    """Answer once one of the rules is true, or the process has ended and its output is in the transcript.

    No rules: `exit`.  `asked_at`: on `CLOCK_BOOTTIME`, from when deadline and silence count.  `since`: from which
    byte of the output a match counts.
    """

    thread: Name
    process_id: Name
    rules: list[RuleText] = []
    asked_at: Seconds | None = None
    since: Offset = 0


class NeverMind(Body, frozen=True, kw_only=True):
    """A notice: nobody waits any more for the answer to this request; one that only waits or reads is dropped."""

    request: int


class Kill(Body, frozen=True, kw_only=True):
    """Signal the tree of each process, or only its foreground group; KILL after `after_s` if it still lives."""

    thread: Name
    process_ids: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=10_000)]
    signal: SignalNumber = 15
    foreground: bool = False
    after_s: Seconds | None = None


class Resize(Body, frozen=True, kw_only=True):
    """Set the size of a process's terminal."""

    thread: Name
    process_id: Name
    columns: Cells
    rows: Cells


class Detach(Body, frozen=True, kw_only=True):
    """Hand a thread's processes to the broker and send its worker to bed, unless `keep_worker`."""

    thread: Name
    keep_worker: bool = False


class Resume(Body, frozen=True, kw_only=True):
    """Start the thread's next worker, which takes its processes back."""

    thread: Name


class Reattach(Body, frozen=True, kw_only=True):
    """Give what is still detached to the worker that is up."""

    thread: Name


class Clean(Body, frozen=True, kw_only=True):
    """End a thread's detached processes."""

    thread: Name


class Shutdown(Body, frozen=True, kw_only=True):
    """End a thread's worker and attached processes, with `all` its detached ones too; no thread: every one."""

    thread: Name | None = None
    all: bool = False


class Start(Body, frozen=True, kw_only=True):
    """Give a thread a program and wake it; the same `call_id` again does that once."""

    thread: Name
    program: Program
    call_id: Text


class Stop(Body, frozen=True, kw_only=True):
    """Take a thread's program away, and what it would have been woken for; its processes run on."""

    thread: Name


class ListWakes(Body, frozen=True, kw_only=True):
    """What threads are to be woken for, and dead letters; `all`: what is over too.

    They may be more than an answer can hold: `at_most` so many are listed, of those with numbers above `after`.
    """

    thread: Name | None = None
    all: bool = False
    at_most: Annotated[int, msgspec.Meta(ge=1, le=OFFSET_MAX)] | None = None
    after: Offset = 0


class Inventory(Body, frozen=True, kw_only=True):
    """What a thread has: processes that live, that ended and were not read to their end, or are lost."""

    thread: Name


class RetryWake(Body, frozen=True, kw_only=True):
    """Deliver a dead letter once more, or what was not delivered since the agent had read it."""

    number: Annotated[int, msgspec.Meta(ge=1)]


class DropWake(Body, frozen=True, kw_only=True):
    """Do not deliver this."""

    number: Annotated[int, msgspec.Meta(ge=1)]


class Status(Body, frozen=True, kw_only=True):
    """The broker about itself."""


class RecentEvents(Body, frozen=True, kw_only=True):
    """The last events, deltas left out."""


class Upgrade(Body, frozen=True, kw_only=True):
    """Have the installed program take over from the broker; answered only when it does not come up."""


class Down(Body, frozen=True, kw_only=True):
    """End the broker; refused while processes live, unless `force`.  Keeps its shape for ever."""

    force: bool = False


# Bodies that only the broker sends to a worker.


class AddedRule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule that was set after its process had started, as whoever pumps that needs it.

    `number`: of the rule, in the header.  `slot`: for what is found.  `since`: the offset to look from.
    """

    number: Annotated[int, msgspec.Meta(ge=0, lt=(1 << 32) - 1)]
    slot: Annotated[int, msgspec.Meta(ge=0, lt=8)]
    rule: RuleText
    since: Offset = 0


class LookFor(Body, frozen=True, kw_only=True):
    """The rules that were added to a process, all of them: look for these."""

    process_id: Name
    rules: list[AddedRule]


class Import(Body, frozen=True, kw_only=True):
    """Take over the processes in these parcels, which were sent before on the channel.

    `streams`: process id → (next delta's number, offset), where a stream of deltas goes on.  `rules`: process id →
    what was added to those it was started with.
    """

    tickets: list[Text]
    streams: dict[str, tuple[int, int]] = {}
    rules: dict[str, list[AddedRule]] = {}


class Export(Body, frozen=True, kw_only=True):
    """Stop pumping everything and give it to the broker, which has the descriptors."""


class TerminateAll(Body, frozen=True, kw_only=True):
    """End every process; no end events are sent."""


class Forget(Body, frozen=True, kw_only=True):
    """These were ended or replaced by the broker: drop them without a word."""

    process_ids: list[Text]


class Deltas(Body, frozen=True, kw_only=True):
    """Whether anybody listens to output deltas."""

    wanted: bool


class Load(Body, frozen=True, kw_only=True):
    """Load this program, and say what is wrong with it."""

    program: Program


class Run(Body, frozen=True, kw_only=True):
    """Run this program with this wake, and answer when it has returned, with its failure, or nothing.

    Asked again for a run that is under way, or was the last, the answer is that one's: a new broker asks again.
    """

    program: Program
    wake: Wake


class CancelRun(Body, frozen=True, kw_only=True):
    """End the run that is under way."""


class Bye(Body, frozen=True, kw_only=True):
    """Go to bed."""


# Bodies that a worker sends.


class Register(Body, frozen=True, kw_only=True):
    """I am up, and hold these processes, and am starting those (none at a first start)."""

    processes: list[Text] = []
    starting: list[Text] = []


class Welcome(Body, frozen=True, kw_only=True):
    """The answer to `Register`: ids the thread has used, as little-endian numbers of 5 bytes each.

    Those after the random ones were counted: of them the highest is enough.
    """

    used: bytes = b""
    deltas: bool = False

    @classmethod
    def of(cls, ids: Iterable[str], *, deltas: bool) -> Welcome:
        """Return the welcome for a thread that has used these ids."""
        numbers = {int(id) for id in ids}
        told = {number for number in numbers if number < RANDOM_IDS.stop} | {max(numbers, default=1)}
        return cls(used=b"".join(number.to_bytes(5, "little") for number in told), deltas=deltas)

    def ids(self) -> set[str]:
        """Return them."""
        return {str(int.from_bytes(self.used[at : at + 5], "little")) for at in range(0, len(self.used), 5)}


class Delta(Body, frozen=True, kw_only=True):
    """A piece of output, at most 8 KiB, whole UTF-8 characters; `seq` counts per call."""

    process_id: Text
    call_id: Text
    seq: int
    offset: int
    chunk: bytes


class Ended(Body, frozen=True, kw_only=True):
    """A process has ended, and its output is in the transcript; `output` is its aggregate (head and tail).

    `announce`: whether subscribers are told; they are not of what was pruned or terminated.
    """

    process_id: Text
    call_id: Text
    output: bytes = b""
    announce: bool = True


class Matched(Body, frozen=True, kw_only=True):
    """Something was found in a process's output; what, is in its header."""

    process_id: Text


class Orphaned(Body, frozen=True, kw_only=True):
    """The spawner died while it was starting this process; what became of it is in the deposit."""

    process_id: Text


class Collected(Body, frozen=True, kw_only=True):
    """The worker has let this process go: its end and all output were in replies already sent, or we ended it."""

    process_id: Text


CLIENT_BODIES: tuple[type[Body], ...] = (
    ExecCommand,
    WriteStdin,
    ReadOutput,
    ListProcesses,
    ListThreads,
    CreateThread,
    Watch,
    Wait,
    NeverMind,
    Kill,
    Resize,
    Detach,
    Resume,
    Reattach,
    Clean,
    Shutdown,
    Start,
    Stop,
    ListWakes,
    Inventory,
    RetryWake,
    DropWake,
    Status,
    RecentEvents,
    Upgrade,
    Down,
)
WORKER_BODIES: tuple[type[Body], ...] = (
    ExecCommand,
    WriteStdin,
    ReadOutput,
    LookFor,
    Import,
    Export,
    TerminateAll,
    Forget,
    Deltas,
    Load,
    Run,
    CancelRun,
    Bye,
)
FROM_WORKER_BODIES: tuple[type[Body], ...] = (Register, Delta, Matched, Ended, Collected, Orphaned)


@cache
def op_of(body: type[Body]) -> str:
    """Return the name on the wire: `ExecCommand` → `exec_command`."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in body.__name__).lstrip("_")


Ops = Mapping[str, type[Body]]
CLIENT_OPS: Ops = {op_of(body): body for body in CLIENT_BODIES}
WORKER_OPS: Ops = {op_of(body): body for body in WORKER_BODIES}
FROM_WORKER_OPS: Ops = {op_of(body): body for body in FROM_WORKER_BODIES}


# What comes back, and what `--json` prints.

ProcessState = Literal["starting", "attached", "detached", "ended"]
ThreadState = Literal["awake", "asleep", "failed"]


class ProcessRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `ps`.  Times are RFC 3339 UTC; byte counts are of the output stream.

    `command`: the argv.  It, `cwd` and `wake_on` are cut, with `…` at their ends, where all of a list are too much
    for one answer.
    `wake_on`: the texts of the wake rules that it was started with.  `columns`, `rows`: the size of its terminal,
    the last one if it has ended; `None` without a terminal, and where an older broker told nothing.
    """

    thread: str
    process_id: str
    call_id: str
    pid: int | None
    state: ProcessState
    worker_pid: int | None
    command: list[str]
    cwd: str
    tty: bool
    started_at: str
    bytes_written: int
    bytes_delivered: int
    outcome: dict[str, Any] | None
    wake_on: list[str] = []
    columns: int | None = None
    rows: int | None = None


class ThreadRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `threads`; `failed` says that its worker does not come up, its processes being safe.

    `program`: as it was given, for people.  `running`: it runs at this moment.  `wakes`: how many are due.
    """

    thread: str
    state: ThreadState
    worker_pid: int | None
    epoch: int
    attached: int
    detached: int
    ended: int
    program: str | None = None
    running: bool = False
    wakes: int = 0


class DetachedProcessSummary(msgspec.Struct, frozen=True):
    """Which processes were detached or cleaned; ids sorted as strings."""

    process_count: int
    process_ids: list[str]

    @classmethod
    def of(cls, process_ids: list[str]) -> DetachedProcessSummary:
        """Return the summary of these processes."""
        return cls(len(process_ids), sorted(process_ids))


class ReattachSummary(msgspec.Struct, frozen=True):
    """How many processes a worker took back, and which it could not; ids sorted as strings."""

    reattached_count: int
    skipped_count: int
    skipped_process_ids: list[str]

    @classmethod
    def of(cls, reattached: int, skipped: list[str]) -> ReattachSummary:
        """Return the summary for this many taken and these refused."""
        return cls(reattached, len(skipped), sorted(skipped))


class RuleRow(msgspec.Struct, frozen=True, kw_only=True):
    """A rule that was set, and whether it is still to come true."""

    thread: str
    process_id: str
    rule: str
    open: bool


class WaitRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a wait came to: the rule that came true; `None` when the process ended first, and none can any more.

    `outcome`: of one that has ended.  `offset`, `text`: where in the output it matched, and what.
    """

    thread: str
    process_id: str
    rule: str | None
    outcome: dict[str, Any] | None
    offset: int | None
    text: bytes | None


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a transcript: (offset, bytes) pieces and gaps [from, to] in order, and where to go on.

    `written`: bytes printed so far.  `ended`: nothing more will come.
    """

    pieces: list[tuple[int, bytes]]
    gaps: list[tuple[int, int]]
    next_offset: int
    written: int
    ended: bool
    outcome: dict[str, Any] | None


def outcome_from_wire(table: dict[str, Any] | None) -> Outcome | None:
    """Return the outcome that a reply carries."""
    return None if table is None else Outcome(**table)
