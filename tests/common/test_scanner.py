"""Output rules, with real children: found before anything is punched out, told when it is in the header."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common import rules
from outlive.common.descriptors import Handles
from outlive.common.held import Held
from outlive.common.messages import AddedRule
from outlive.common.pump import Pump, Pumps
from outlive.common.scanner import Scanner
from outlive.common.transcript import Found, Lease, Limits, Transcript

from .conftest import DEAD, PATIENCE, RAW, Children, facts_of, until

Hold = Callable[..., Held]


class Told:
    """What the holder told, with what the header said at that moment."""

    def __init__(self) -> None:
        self.story: list[tuple[str, list[str]]] = []

    def found(self, held: Held) -> None:
        self.story.append(("found", texts(held.transcript)))

    def ended(self, held: Held) -> None:
        self.story.append(("ended", texts(held.transcript)))


def texts(transcript: Transcript) -> list[str]:
    """Return what was found: rule number and text."""
    return [
        f"{match.number}:{os.pread(transcript.fd, match.end - match.start, transcript.base + match.start).decode()}"
        for match in transcript.matches()
    ]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def hold(pumps: Pumps, me: Lease, told: Told) -> Iterator[Hold]:
    helds: list[Held] = []

    def hold(handles: Handles, added: list[AddedRule] | None = None) -> Held:
        held = Held(handles, pumps, Pump, on_ended=told.ended, on_found=told.found)
        held.begin(me, added or [])
        helds.append(held)
        return held

    yield hold
    for held in helds:
        held.close()


def soon() -> float:
    return time.monotonic() + PATIENCE


async def test_a_match_is_in_the_header_before_it_is_told_and_told_before_the_end(
    children: Children, hold: Hold, told: Told
) -> None:
    held = hold(children.start("/bin/sh", "-c", "printf 'all well'", tty=False, wake_on=("exit", "output=a[a-z]l")))
    assert await held.until_ended(soon())
    assert told.story == [("found", ["1:all"]), ("ended", ["1:all"])]


async def test_what_only_the_end_decides_is_found_at_the_end(children: Children, hold: Hold, told: Told) -> None:
    held = hold(children.start("/bin/sh", "-c", "printf done", tty=False, wake_on=("output=done$",)))
    assert await held.until_ended(soon())
    assert told.story == [("found", ["0:done"]), ("ended", ["0:done"])]


async def test_a_match_across_the_pieces_that_are_printed_is_found(
    children: Children, hold: Hold, told: Told
) -> None:
    held = hold(children.python(RAW + "\nwhile c := os.read(0, 1): os.write(1, c)", wake_on=("output=^ready!",)))
    await until(lambda: held.pump.written == 3)
    for number, character in enumerate(b"\nready!"):
        assert told.story == []
        await held.type(bytes([character]), soon())
        await until(lambda number=number: held.pump.written == 4 + number)
    assert told.story == [("found", ["0:ready!"])]


async def test_it_is_found_in_what_is_not_kept(children: Children, hold: Hold, told: Told) -> None:
    limits = Limits(head=4096, tail=4096, unread=0, slack=4096)
    flood = "import os\nfor n in range(3000): os.write(1, (b'needle' if n == 1000 else b'hay') * 100 + b'\\n')"
    held = hold(children.python(flood, tty=False, limits=limits, wake_on=("output=edlene",)))
    assert await held.until_ended(soon())
    assert [kind for kind, _ in told.story] == ["found", "ended"]
    (match,) = held.transcript.matches()
    assert match.start == 1000 * 301 + 2
    assert any(gap.start <= match.start < gap.end for gap in held.transcript.live().holes)


async def test_what_a_dead_holder_had_not_scanned_the_next_one_looks_at(
    children: Children, hold: Hold, told: Told
) -> None:
    handles = children.start("/bin/cat", wake_on=("output=found me",))
    os.write(handles.transcript, b"found me")  # as a pumper that was killed before it could look
    hold(handles)
    assert told.story == [("found", ["0:found me"])]


async def test_what_was_found_is_not_looked_for_again(children: Children, hold: Hold, told: Told) -> None:
    handles = children.start("/bin/cat", wake_on=("output=found me",))
    os.write(handles.transcript, b"found me")
    handles = hold(handles).release()
    os.write(handles.transcript, b"found me")
    hold(handles)
    assert len(told.story) == 1


async def test_a_rule_that_is_added_is_looked_for_in_what_is_kept_and_in_what_comes(
    children: Children, hold: Hold, told: Told
) -> None:
    held = hold(children.python(RAW + "\nwhile c := os.read(0, 1): os.write(1, c)"))
    await until(lambda: held.pump.written == 3)
    late = [AddedRule(number=70, slot=0, rule="output=raw"), AddedRule(number=71, slot=1, rule="output=cooked")]
    held.look_for(late)
    assert told.story == [("found", ["70:raw"])]
    await held.type(b"cooked", soon())
    await until(lambda: len(told.story) == 2)
    assert told.story[1] == ("found", ["70:raw", "71:cooked"])
    again = [AddedRule(number=72, slot=0, rule="output=raw", since=3)]
    held.look_for(again)
    await held.type(b", raw", soon())
    await until(lambda: len(told.story) == 3)
    assert held.transcript.matches()[0] == Found(72, 11, 14)


async def test_the_next_holder_is_told_what_was_added_and_looks_in_all_that_is_kept(
    children: Children, hold: Hold, told: Told
) -> None:
    handles = children.start("/bin/cat")
    os.write(handles.transcript, b"early bird")
    hold(handles, [AddedRule(number=70, slot=3, rule="output=early")])
    assert told.story == [("found", ["70:early"])]


async def test_a_rule_set_on_an_ended_process_is_looked_for_as_at_its_end(
    children: Children, hold: Hold, told: Told
) -> None:
    held = hold(children.start("/bin/sh", "-c", "printf done", tty=False))
    assert await held.until_ended(soon())
    held.look_for([AddedRule(number=70, slot=0, rule="output=done$")])
    assert told.story[-1] == ("found", ["70:done"])


async def test_when_it_printed_last_is_noted_only_for_a_silence_rule(children: Children, hold: Hold) -> None:
    noted = hold(children.start("/bin/sh", "-c", "echo", tty=False, wake_on=("silence=60",)))
    other = hold(children.start("/bin/sh", "-c", "echo", tty=False, wake_on=("output=x", "exit")))
    assert await noted.until_ended(soon())
    assert await other.until_ended(soon())
    assert noted.transcript.output_at > noted.transcript.marked_at()
    assert other.transcript.output_at == 0


def test_a_rule_of_a_newer_program_is_left_alone_and_the_others_keep_their_numbers(children: Children) -> None:
    handles = children.handles(wake_on=("moon=full", "output=b"))
    transcript = Transcript(handles.transcript)
    os.write(handles.transcript, b"abc")
    assert Scanner(transcript).scan(3)
    assert transcript.matches() == [Found(1, 1, 2)]


@given(
    st.sampled_from(["ab+c", "^a", "b$", r"\bab\b", "a|bc$", "é+b", "(a+)+$"]),
    st.lists(st.tuples(st.text("abc \nxé", max_size=8).map(str.encode), st.booleans(), st.booleans()), max_size=6),
)
def test_whoever_dies_between_the_pieces_a_match_is_found_once_as_in_the_whole(
    pattern: str, pieces: list[tuple[bytes, bool, bool]]
) -> None:
    fd = Transcript.create(facts_of(wake_on=("exit", f"output={pattern}")), DEAD)
    try:
        transcript = Transcript(fd)
        scanner = Scanner(transcript)
        found = 0
        for piece, scanned, dies in pieces:
            os.write(fd, piece)
            if scanned:
                found += scanner.scan(transcript.written)
            if dies:
                scanner = Scanner(transcript)
        found += scanner.scan(transcript.written, final=True)
        whole = b"".join(piece for piece, _, _ in pieces)
        assert found == len(transcript.matches()) == (rules.compiled(pattern).search(whole) is not None)
    finally:
        os.close(fd)


def test_a_damaged_table_of_matches_does_not_keep_a_process_from_being_held(children: Children) -> None:
    handles = children.handles(wake_on=("output=b",))
    transcript = Transcript(handles.transcript)
    transcript.record_match(3, Found(9, 0, 1 << 20))
    os.write(handles.transcript, b"abc")
    assert Scanner(transcript).scan(3)
