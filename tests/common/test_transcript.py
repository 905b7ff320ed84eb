"""A transcript's header byte by byte, and what it keeps: true bytes or gaps, never zeros."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outlive.common import kernel
from outlive.common.errors import PeerError
from outlive.common.outcome import BYS, KINDS, Outcome
from outlive.common.transcript import PAGE, Facts, Found, Gap, Lease, Limits, Transcript, mark_started, wanted_holes

from .conftest import DEAD, DEFAULT, Children, await_end, eventually, facts_of, in_a_child


def stream(start: int, end: int) -> bytes:
    """Return bytes of a stream without zeros, in which every offset up to some millions can be told."""
    first = start // 4
    words = b"".join(struct.pack("<I", word | 0x80808080) for word in range(first, end // 4 + 1))
    return words[start - first * 4 : end - first * 4]


@contextmanager
def a_transcript(limits: Limits = DEFAULT) -> Iterator[Transcript]:
    fd = Transcript.create(facts_of(limits=limits), DEAD)
    try:
        yield Transcript(fd)
    finally:
        os.close(fd)


@contextmanager
def a_sealed_file(content: bytes) -> Iterator[int]:
    fd = kernel.memfd("test")
    try:
        os.pwrite(fd, content, 0)
        kernel.seal(fd)
        yield fd
    finally:
        os.close(fd)


def header_of(facts: Facts) -> bytes:
    fd = Transcript.create(facts, DEAD)
    try:
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def holes_of(transcript: Transcript) -> tuple[Gap, ...]:
    return transcript.live().holes


# The format.

STATIC = bytes.fromhex(
    "8b"
    "a6746872656164a174"
    "a770726f63657373a431303031"
    "a463616c6ca163"
    "a46d61726ba16d"
    "a46172677691c402c3ff"
    "a3637764c4012f"
    "a3747479c3"
    "a473697a65925018"
    "aa737461727465645f617401"
    "a4626f6f74a162"
    "a66c696d69747394ce00080000ce00080000ce00040000ce00040000"
)
SPOKEN = Facts("t", "1001", "c", "m", (b"\xc3\xff",), b"/", True, 80, 24, 1, "b")


def test_a_new_header_is_these_bytes() -> None:
    raw = header_of(SPOKEN)
    assert raw[:20] == b"OUTLIVE\0" + bytes.fromhex("0100 0000 00100000") + len(STATIC).to_bytes(4, "little")
    assert raw[64:72] == bytes(8)  # no pid, not started
    assert raw[72:96] == bytes.fromhex("0100000000000000 01004000 07000000 01000000 00000000")  # DEAD's
    assert raw[96:512] == bytes(416)
    assert raw[512 : 512 + len(STATIC)] == STATIC
    assert len(raw) == PAGE


def test_a_written_header_is_these_bytes(children: Children) -> None:
    transcript = children.transcript()
    mark_started(transcript.fd, 0x01020304)
    transcript.take_lease(Lease(pid=5, start_time=0x0102030405060708, epoch=9))
    transcript.record_told()
    transcript.deliver(0x1112131415161718)
    transcript.ask(b"12345678", 8)
    transcript.record_by("cleaned")
    transcript.record_outcome(Outcome("signaled", signal=9))
    raw = os.pread(transcript.fd, 512, 0)
    assert raw[64:72] == bytes.fromhex("04030201 01000000")
    assert raw[72:96] == bytes.fromhex("0807060504030201 05000000 09000000 01000000 01000000")
    assert raw[96:104] == bytes.fromhex("1817161514131211")
    assert raw[136:152] == b"12345678" + bytes.fromhex("0800000000000000")
    assert raw[152:156] == bytes.fromhex("03000000")  # the third of BYS
    assert raw[160:168] == bytes.fromhex("01000000 09000000")
    assert raw[176:180] == bytes.fromhex("01000000")
    assert BYS[2] == "cleaned"
    assert KINDS[1] == "signaled"


def test_what_was_found_for_output_rules_is_these_bytes(children: Children) -> None:
    transcript = children.transcript()
    os.write(transcript.fd, b"x" * 0x300)
    transcript.count_scanned(0x0102030405060708)
    transcript.record_match(1, Found(number=4, start=0x100, end=0x203))
    raw = os.pread(transcript.fd, 512, 0)
    assert raw[320:328] == bytes.fromhex("0807060504030201")
    assert raw[328:352] == bytes(24)
    assert raw[352:368] == bytes.fromhex("05000000 03010000 0001000000000000")
    assert raw[368:] == bytes(144)
    assert transcript.matches() == [Found(4, 0x100, 0x203)]
    transcript.record_output()
    assert int.from_bytes(os.pread(transcript.fd, 8, 328), "little") == transcript.output_at > 0


def test_a_match_beyond_the_output_is_refused(children: Children) -> None:
    transcript = children.transcript()
    transcript.record_match(0, Found(number=0, start=0, end=1))
    with pytest.raises(PeerError, match="beyond"):
        transcript.matches()


def test_wake_rules_are_in_the_static_part_only_where_there_are_some() -> None:
    facts = SPOKEN._replace(wake_on=("exit", "output=x"))
    raw = facts.to_bytes()
    assert raw == b"\x8c" + STATIC[1:] + b"\xa7wake_on\x92\xa4exit\xa8output=x"
    assert Facts.from_bytes(raw) == facts


def test_a_header_of_these_bytes_is_understood() -> None:
    raw = bytearray(PAGE + 3)
    raw[:20] = b"OUTLIVE\0" + bytes.fromhex("0100 0000 00100000") + len(STATIC).to_bytes(4, "little")
    raw[64:72] = bytes.fromhex("04030201 01000000")
    raw[72:96] = bytes.fromhex("0200000000000000 05000000 09000000 01000000 01000000")
    raw[96:104] = bytes.fromhex("0700000000000000")
    raw[104:136] = struct.pack("<QQQQ", 10, 20, 30, 40)
    raw[136:152] = struct.pack("<8sQ", b"abcdefgh", 6)
    raw[152:156] = bytes.fromhex("01000000")
    raw[160:180] = bytes.fromhex("02000000 00000000 0900000000000000 01000000")
    raw[184:190] = b"reason"
    raw[512 : 512 + len(STATIC)] = STATIC
    with a_sealed_file(bytes(raw)) as fd:
        transcript = Transcript(fd)
        live = transcript.live()
        assert transcript.asked() == (b"abcdefgh", 6)
        assert transcript.facts == SPOKEN
        assert transcript.written == 3
    assert (live.pid, live.started, live.lease) == (0x01020304, True, Lease(5, 2, 9))
    assert (live.told, live.delivered) == (True, 7)
    assert live.holes == (Gap(10, 20), Gap(30, 40))
    assert live.outcome == Outcome("lost", reason="reason", by="caller")
    assert live.ended_at_ns == 9


def test_a_long_command_line_moves_the_stream_to_a_later_page() -> None:
    facts = Facts("t", "1001", "c", "m", (b"x" * 100_000,), b"/", False, 80, 24, 1, "b")
    fd = Transcript.create(facts, DEAD)
    try:
        os.write(fd, b"hello")
        transcript = Transcript(fd)
        assert transcript.base > 100_000
        assert transcript.base % PAGE == 0
        assert transcript.facts == facts
        assert list(transcript.read(0, 9)) == [(0, b"hello")]
    finally:
        os.close(fd)


def test_a_command_line_beyond_what_linux_runs_is_refused() -> None:
    facts = Facts("t", "1001", "c", "m", (b"x" * (2 << 20),), b"/", False, 80, 24, 1, "b")
    with pytest.raises(ValueError, match="at most 2097152"):
        Transcript.create(facts, DEAD)


# What is not ours, or damaged.


def use_all(fd: int) -> None:
    """Use a header as everybody does."""
    transcript = Transcript(fd)
    transcript.live()
    list(transcript.read(0, 100))
    transcript.trim(50, exact=True)
    transcript.record_by("caller")
    transcript.record_outcome(Outcome("exited", code=1))
    outcome = transcript.live().outcome
    assert outcome is not None
    outcome.sentence()
    int(transcript.facts.process_id)


def understood_or_refused(content: bytes) -> None:
    with a_sealed_file(content) as fd:
        try:
            use_all(fd)
        except PeerError as error:
            assert "transcript" in str(error)  # noqa: PT017 — which of the two happens is the input's business


@given(st.binary(max_size=2 * PAGE))
def test_any_bytes_are_a_header_or_a_peer_error(content: bytes) -> None:
    understood_or_refused(content)


@given(st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4))
@example([(176, b"\x01"), (164, b"\xff\xff\xff\xff")])  # exit code -1
@example([(176, b"\x01"), (160, b"\x03")])  # a kind there is not
@example([(104, struct.pack("<QQQQ", 20, 10, 0, 0))])
@example([(104, struct.pack("<QQQQ", 30, 40, 10, 20))])
@example([(104, struct.pack("<QQQQ", 0, 2**64 - 1, 0, 2**64 - 1))])
@example([(152, b"\x06")])
def test_any_damage_to_a_header_is_understood_or_a_peer_error(damage: list[tuple[int, bytes]]) -> None:
    raw = bytearray(header_of(SPOKEN) + stream(0, 80))
    for at, data in damage:
        raw[at : at + len(data)] = data
    understood_or_refused(bytes(raw))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.floats(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
FIELDS: dict[str, object] = msgpack.unpackb(STATIC)


@given(st.sampled_from(sorted(FIELDS)), anything)
@example("limits", ["a", "b", "c", "d"])
@example("limits", [1, 1, 1, 0])
@example("limits", [1, 1, 1, -5])
@example("limits", [True, 1, 1, 4096])
@example("process", "9" * 5000)  # int() refuses that many digits
@example("process", "../1")
@example("process", "0")
@example("thread", "../../etc")
@example("thread", "a/b")
@example("tty", 1)
@example("size", [80, -1])
@example("argv", "sh")
def test_any_value_of_a_static_field_is_understood_or_a_peer_error(name: str, value: object) -> None:
    static = msgpack.packb({**FIELDS, name: value})
    try:
        facts = Facts.from_bytes(static)
    except PeerError as error:
        assert "transcript header" in str(error)  # noqa: PT017
    else:
        assert "/" not in facts.thread_id
        assert len(facts.process_id) <= 10
        assert all(isinstance(word, bytes) for word in facts.argv)
        assert min(facts.limits.head, facts.limits.tail, facts.limits.unread) >= 0
        assert facts.limits.slack >= PAGE


@pytest.mark.parametrize("field", ["cwd", "thread", "tty"])
def test_deep_nesting_is_a_peer_error(field: str) -> None:
    key = msgpack.packb(field)
    deep = STATIC.replace(key, key + b"\x91" * 1000, 1)
    with pytest.raises(PeerError):
        Facts.from_bytes(deep)


@pytest.mark.parametrize(
    ("at", "raw", "complaint"),
    [
        (0, b"outlive\0", "magic"),
        (8, b"\x02\0", "version 2"),
        (12, b"\0\x20\0\0", "base 8192"),
        (16, b"\xff\xff\xff\x7f", "static part of 2147483647"),
        (512, b"\xc1", "static part is damaged"),
    ],
)
def test_a_wrong_header_is_refused_by_name(at: int, raw: bytes, complaint: str) -> None:
    header = bytearray(header_of(SPOKEN))
    header[at : at + len(raw)] = raw
    with a_sealed_file(bytes(header)) as fd, pytest.raises(PeerError, match=complaint):
        Transcript(fd)


def test_anything_but_a_sealed_memfd_is_refused(tmp_path: os.PathLike[str]) -> None:
    header = header_of(SPOKEN)
    plain = os.open(os.path.join(tmp_path, "file"), os.O_RDWR | os.O_CREAT)
    unsealed = kernel.memfd("unsealed")
    stopped = kernel.memfd("sealed against writing too")
    read_end, write_end = os.pipe()
    try:
        for fd in (plain, unsealed, stopped):
            os.pwrite(fd, header, 0)
        fcntl.fcntl(stopped, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        for fd in (plain, unsealed, stopped, read_end):
            with pytest.raises(PeerError, match="not a memfd sealed"):
                Transcript(fd)
    finally:
        for fd in (plain, unsealed, stopped, read_end, write_end):
            os.close(fd)


# Seals.


def test_a_transcript_cannot_be_shrunk_nor_sealed_further(children: Children) -> None:
    transcript = children.transcript(b"hello")
    for length in (0, transcript.base, transcript.base + 4):
        with pytest.raises(PermissionError):
            os.ftruncate(transcript.fd, length)
    for more in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_GROW):
        with pytest.raises(PermissionError):
            fcntl.fcntl(transcript.fd, fcntl.F_ADD_SEALS, more)
    os.write(transcript.fd, b", world")
    assert list(transcript.read(0, 99)) == [(0, b"hello, world")]


def test_a_transcript_is_private_not_executable_and_not_inherited(children: Children) -> None:
    fd = children.transcript().fd
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    assert not os.get_inheritable(fd)


# What is kept.


def kept(transcript: Transcript) -> list[tuple[int, int]]:
    """Return the kept ranges; fails on a byte that was never printed."""
    ranges = []
    at = 0
    for part in transcript.read(0, transcript.written):
        if isinstance(part, Gap):
            assert (part.start, part.end > part.start) == (at, True)
            at = part.end
        else:
            offset, data = part
            assert offset == at
            assert data == stream(offset, offset + len(data))
            ranges.append((offset, offset + len(data)))
            at = offset + len(data)
    assert at == transcript.written
    return ranges


@pytest.mark.parametrize(
    "limits",
    [
        DEFAULT,
        Limits(head=1, tail=1, unread=1, slack=PAGE),
        Limits(10_001, 4_099, 777, PAGE),
        Limits(0, 0, 0, PAGE),
    ],
    ids=str,
)
def test_head_unread_and_tail_are_kept_to_the_byte(children: Children, limits: Limits) -> None:
    total = limits.head + limits.tail + limits.unread + 50_001
    transcript = children.transcript(stream(0, total), limits=limits)
    delivered = limits.head + 20_003
    transcript.deliver(delivered)
    transcript.trim(total, exact=True)
    assert holes_of(transcript) == (
        Gap(limits.head, delivered),
        *([Gap(delivered + limits.unread, total - limits.tail)] if limits.unread else []),
    ) or holes_of(transcript) == (Gap(limits.head, total - limits.tail),)
    ranges = [(0, limits.head), (delivered, delivered + limits.unread), (total - limits.tail, total)]
    assert kept(transcript) == [(start, end) for start, end in ranges if end > start]


@pytest.mark.parametrize("more", [0, 1])
def test_exactly_head_and_tail_are_kept_whole_and_one_byte_more_makes_a_gap_of_one(
    children: Children, more: int
) -> None:
    limits = Limits(head=5000, tail=6000, unread=0, slack=PAGE)
    total = 11_000 + more
    transcript = children.transcript(stream(0, total), limits=limits)
    transcript.deliver(total)
    transcript.trim(total, exact=True)
    assert [part for part in transcript.read(0, total) if isinstance(part, Gap)] == [Gap(5000, 5001)] * more
    assert kept(transcript) == ([(0, 5000), (5001, 11_001)] if more else [(0, 11_000)])


def test_what_is_not_kept_gives_its_memory_back(children: Children) -> None:
    limits = Limits(head=PAGE, tail=PAGE, unread=0, slack=PAGE)
    transcript = children.transcript(limits=limits)
    for start in range(0, 4 << 20, 10_007):
        os.write(transcript.fd, stream(start, start + 10_007))
        transcript.deliver(start + 10_007)
        transcript.trim(start + 10_007)
    # Header, head and tail, the pages that the ends of holes share, and the slack.
    assert os.fstat(transcript.fd).st_blocks * 512 <= 10 * PAGE


def test_a_trim_waits_for_the_slack_unless_it_is_exact(children: Children) -> None:
    limits = Limits(head=10, tail=10, unread=0, slack=2 * PAGE)
    transcript = children.transcript(stream(0, 2 * PAGE - 1), limits=limits)
    transcript.deliver(2 * PAGE - 1)
    transcript.trim(2 * PAGE - 1)
    assert holes_of(transcript) == ()
    transcript.trim(2 * PAGE - 1, exact=True)
    assert holes_of(transcript) == (Gap(10, 2 * PAGE - 11),)


writes = st.tuples(st.just("write"), st.integers(1, 30_000))
deliveries = st.tuples(st.just("deliver"), st.floats(0, 1))
trims = st.tuples(st.sampled_from(["trim", "exact"]), st.none())
small = st.builds(
    Limits, st.integers(0, 20_000), st.integers(0, 20_000), st.integers(0, 20_000), st.integers(PAGE, 3 * PAGE)
)


@settings(max_examples=200)
@given(small, st.lists(writes | deliveries | trims, max_size=25))
@example(
    # A third hole would be needed: rather keep than lose.
    Limits(10, 10, 10_000, PAGE),
    [
        ("write", 30_000),
        ("deliver", 0.4),
        ("exact", None),
        ("deliver", 0.6),
        ("exact", None),
        ("write", 30_000),
        ("exact", None),
    ],
)
def test_reading_yields_true_bytes_or_gaps_and_what_must_be_kept(
    limits: Limits, acts: list[tuple[str, int | float | None]]
) -> None:
    with a_transcript(limits) as transcript:
        written = delivered = 0
        for act, value in acts:
            if act == "write":
                assert isinstance(value, int)
                os.write(transcript.fd, stream(written, written + value))
                written += value
                continue
            if act == "deliver":
                assert isinstance(value, int | float)
                delivered = max(delivered, int(written * value))
                transcript.deliver(delivered)
                continue
            earlier = kept(transcript)
            transcript.trim(written, exact=act == "exact")
            had = kept(transcript)
            assert len(holes_of(transcript)) <= 2
            must = [
                (0, min(limits.head, written)),
                (delivered, min(delivered + limits.unread, written)),
                (max(0, written - limits.tail), written),
            ]
            for start, end in must:
                # What an earlier trim took is gone; what there was, and must be kept, is still there.
                assert within(start, end, earlier) == within(start, end, had)
        kept(transcript)


def within(start: int, end: int, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    cut = [(max(start, a), min(end, b)) for a, b in ranges]
    merged: list[tuple[int, int]] = []
    for a, b in cut:
        if b > a:
            if merged and merged[-1][1] == a:
                merged[-1] = (merged[-1][0], b)
            else:
                merged.append((a, b))
    return merged


@given(small, st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_wanted_holes_spare_head_unread_and_tail(limits: Limits, written: int, part: int) -> None:
    delivered = min(written, part)
    holes = wanted_holes(limits, written, delivered)
    assert len(holes) <= 2
    for hole in holes:
        assert limits.head <= hole.start < hole.end <= written - limits.tail
        assert hole.end <= delivered or hole.start >= delivered + limits.unread


def test_a_flood_that_an_agent_reads_in_pieces_stays_bounded(children: Children) -> None:
    limits = Limits(head=PAGE, tail=4 * PAGE, unread=8 * PAGE, slack=PAGE)
    transcript = children.transcript(limits=limits)
    delivered = 0
    for turn, start in enumerate(range(0, 2 << 20, 10_007)):
        os.write(transcript.fd, stream(start, start + 10_007))
        if turn % 7 == 0:
            delivered += 5_003
            transcript.deliver(delivered)
        transcript.trim(start + 10_007)
        assert len(kept(transcript)) <= 3
    assert os.fstat(transcript.fd).st_blocks * 512 <= 32 * PAGE


def test_a_reader_that_races_a_puncher_never_sees_zeros(children: Children) -> None:
    limits = Limits(head=PAGE, tail=2 * PAGE, unread=PAGE, slack=PAGE)
    transcript = children.transcript(limits=limits)

    def punch() -> None:
        for start in range(0, 24 << 20, 3 * PAGE):
            os.write(transcript.fd, stream(start, start + 3 * PAGE))
            if start % (15 * PAGE) == 0:
                transcript.deliver(start)
            transcript.trim(start + 3 * PAGE)

    pidfd = os.pidfd_open(children.fork(punch))
    try:
        rounds = 0
        while rounds < 50 or transcript.written < 24 << 20:
            # From the middle: the head never changes, and the race is at the tail.
            start = max(0, transcript.written - 8 * PAGE)
            for part in transcript.read(start, start + 16 * PAGE):
                if not isinstance(part, Gap):
                    assert part[1] == stream(part[0], part[0] + len(part[1]))
            rounds += 1
        await_end(pidfd)
    finally:
        os.close(pidfd)


# The lease.


def test_a_lease_is_taken_and_released(children: Children, me: Lease) -> None:
    transcript = children.transcript()
    assert transcript.live().lease == DEAD
    transcript.take_lease(me)
    assert transcript.live().lease == me
    transcript.release_lease()
    assert transcript.live().lease is None
    transcript.take_lease(me)
    assert transcript.live().lease == me


def test_a_holder_is_dead_only_when_the_kernel_says_so(children: Children) -> None:
    pid = children.fork(lambda: signal.pause())
    lease = Lease(pid, kernel.start_time(pid) or 0, 1)
    assert not lease.holder_is_dead()
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    assert not lease.holder_is_dead()  # stopped is not gone
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert lease.holder_is_dead()  # a zombie writes nothing any more
    os.waitpid(pid, 0)
    assert lease.holder_is_dead()


def test_a_recycled_pid_is_not_the_holder(me: Lease) -> None:
    assert not me.holder_is_dead()
    assert Lease(me.pid, me.start_time - 1, me.epoch).holder_is_dead()
    assert Lease(me.pid, me.start_time + 1, me.epoch).holder_is_dead()


# The outcome, and input.


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome("exited", code=0),
        Outcome("exited", code=255, by="caller"),
        Outcome("signaled", signal=64, by="network"),
        Outcome.lost("nobody knows"),
    ],
)
def test_an_outcome_is_recorded_once(children: Children, outcome: Outcome) -> None:
    transcript = children.transcript()
    assert transcript.live().outcome is None
    transcript.record_outcome(outcome)
    transcript.record_outcome(Outcome("exited", code=77))
    assert transcript.live().outcome == outcome
    assert transcript.live().ended_at_ns > 1_700_000_000 * 10**9


def test_who_ended_it_is_whoever_said_so_first(children: Children) -> None:
    transcript = children.transcript()
    transcript.record_by("pruned")
    transcript.record_by("caller")
    transcript.record_outcome(Outcome("signaled", signal=9, by="shutdown"))
    assert transcript.live().outcome == Outcome("signaled", signal=9, by="pruned")


@given(st.text(max_size=200))
@example("ä" * 64)  # 128 bytes: cut in the middle of a character
@example("\udcff")
def test_a_long_reason_is_cut_at_a_character(reason: str) -> None:
    with a_transcript() as transcript:
        transcript.record_outcome(Outcome.lost(reason))
        outcome = transcript.live().outcome
    assert outcome is not None
    assert outcome.reason is not None
    whole = reason.encode("utf-8", "replace").decode().rstrip("\0")
    assert whole.startswith(outcome.reason)
    assert outcome.reason == whole or len(outcome.reason.encode()) > 123


def test_a_child_says_that_it_started_and_everybody_sees_it(children: Children) -> None:
    transcript = children.transcript()
    assert not transcript.live().started
    pid = children.fork(lambda: mark_started(transcript.fd, os.getpid()))
    eventually(lambda: transcript.live().started)
    assert transcript.live().pid == pid


def test_reading_leaves_the_position_where_the_next_byte_goes(children: Children) -> None:
    transcript = children.transcript(stream(0, 100_000), limits=Limits(10, 10, 10, PAGE))
    transcript.deliver(50_000)
    transcript.trim(100_000, exact=True)
    in_a_child(lambda: use_all(transcript.fd))
    os.write(transcript.fd, stream(100_000, 100_005))
    assert list(transcript.read(100_000, 200_000)) == [(100_000, stream(100_000, 100_005))]
