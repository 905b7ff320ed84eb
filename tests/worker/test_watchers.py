"""Deltas on character boundaries and one end event, from real transcripts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common.messages import Delta, Ended
from outlive.common.transcript import Limits, Transcript
from outlive.worker.watchers import AGGREGATE_MAX, DELTA_MAX, DELTAS_PER_CALL, Watch, split

Make = Callable[..., Transcript]


@pytest.fixture
def make(transcript_of: Callable[..., int]) -> Iterator[Make]:
    fds = []

    def make(output: bytes = b"", limits: Limits | None = None) -> Transcript:
        fds.append(transcript_of(limits))
        os.write(fds[-1], output)
        transcript = Transcript(fds[-1])
        transcript.trim(len(output), exact=True)
        return transcript

    yield make
    for fd in fds:
        os.close(fd)


class Said(list[Delta | Ended]):
    """What a watch has said."""

    @property
    def deltas(self) -> list[Delta]:
        return [one for one in self if isinstance(one, Delta)]

    @property
    def ends(self) -> list[Ended]:
        return [one for one in self if isinstance(one, Ended)]

    @property
    def text(self) -> bytes:
        return b"".join(delta.chunk for delta in self.deltas)


@given(st.text(max_size=50), st.integers(1, 400))
def test_split_never_splits_a_character(text: str, times: int) -> None:
    data = (text * times).encode()
    pieces = list(split(data, final=True))
    assert b"".join(pieces) == data
    for piece in pieces:
        assert 0 < len(piece) <= DELTA_MAX
        piece.decode()


@given(st.binary(max_size=40), st.integers(1, 500))
def test_split_keeps_binary_byte_for_byte(some: bytes, times: int) -> None:
    data = some * times
    pieces = list(split(data, final=True))
    assert b"".join(pieces) == data
    assert all(len(piece) <= DELTA_MAX for piece in pieces)
    held_back = data[len(b"".join(split(data, final=False))) :]
    assert len(held_back) <= 3


@given(st.text(min_size=1, max_size=30), st.data())
def test_a_character_that_is_cut_by_now_is_sent_whole_later(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cut = data.draw(st.integers(0, len(raw)))
    now = b"".join(split(raw[:cut], final=False))
    now.decode()
    assert cut - len(now) <= 3


def test_output_that_arrives_in_pieces_is_sent_once_and_in_order(make: Make) -> None:
    said = Said()
    transcript = make()
    watch = Watch(transcript, said.append, offset=0)
    text = "eins 💡 zwei ü drei €\n" * 700
    raw = text.encode()
    for at in range(0, len(raw), 997):
        os.write(transcript.fd, raw[at : at + 997])
        watch.output(transcript.written)
    watch.ended(transcript.written)
    for delta in said.deltas:
        delta.chunk.decode()
    assert said.text == raw
    assert [delta.seq for delta in said.deltas] == list(range(len(said.deltas)))
    offset = 0
    for delta in said.deltas:
        assert delta.offset == offset
        offset += len(delta.chunk)


def test_nobody_listens_and_nothing_is_said_until_the_end(make: Make) -> None:
    said = Said()
    watch = Watch(make(b"hello"), said.append)
    watch.output(5)
    assert said == []
    watch.ended(5)
    assert said == [Ended(process_id="1234", call_id="call", output=b"hello")]


def test_listening_starts_where_the_listener_came(make: Make) -> None:
    said = Said()
    watch = Watch(make(b"before, after"), said.append, seq=3, offset=8)
    watch.output(13)
    assert said == [Delta(process_id="1234", call_id="call", seq=3, offset=8, chunk=b"after")]


def test_a_gap_is_passed_over(make: Make) -> None:
    output = os.urandom(100_000)
    said = Said()
    limits = Limits(head=8192, tail=8192, unread=0, slack=4096)
    watch = Watch(make(output, limits), said.append, offset=0)
    watch.ended(len(output))
    assert said.text == output[:8192] + output[91_808:]
    assert said.deltas[-1].offset + len(said.deltas[-1].chunk) == len(output)
    assert 91_808 in [delta.offset for delta in said.deltas]


def test_no_more_than_ten_thousand_deltas_a_call_and_the_end_is_still_told(make: Make) -> None:
    said = Said()
    watch = Watch(make(b"x" * 3 * DELTA_MAX), said.append, seq=DELTAS_PER_CALL - 2, offset=0)
    watch.output(3 * DELTA_MAX)
    assert [delta.seq for delta in said] == [9998, 9999]  # type: ignore[union-attr]
    watch.output(3 * DELTA_MAX)
    watch.ended(3 * DELTA_MAX)
    assert len(said.deltas) == 2
    assert said.ends[0].output == b"x" * 3 * DELTA_MAX


def test_an_aborted_watch_says_only_that_it_has_ended(make: Make) -> None:
    said = Said()
    watch = Watch(make(b"secret"), said.append, offset=0)
    watch.abort()
    watch.output(6)
    assert said == []
    watch.ended(6)
    assert said == [Ended(process_id="1234", call_id="call", announce=False)]


def test_the_end_event_carries_head_and_tail_of_a_long_output(make: Make) -> None:
    half = AGGREGATE_MAX // 2
    output = b"h" * half + b"lost in between" + b"t" * half
    said = Said()
    Watch(make(output, Limits(head=2 << 20, tail=2 << 20)), said.append).ended(len(output))
    assert said.ends[0].output == b"h" * half + b"t" * half


def test_an_unfinished_character_at_the_end_is_sent_with_the_end(make: Make) -> None:
    said = Said()
    watch = Watch(make("ü".encode()[:1]), said.append, offset=0)
    watch.output(1)
    assert said == []
    watch.ended(1)
    assert said.text == b"\xc3"
