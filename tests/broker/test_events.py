"""What is kept of events, and how much of it an answer is given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.broker import events as module
from outlive.broker.entries import brief
from outlive.broker.events import Events


def test_of_recent_events_an_answer_has_the_latest_that_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(lambda wanted: None)
    for number in range(100):
        events.publish("wake", "t", "1000", number=number, failure="x" * 1000)
    assert [event["number"] for event in events.recent()] == [*range(100)]
    monkeypatch.setattr(module, "RECENT_SIZE", 20_000)
    latest = [event["number"] for event in events.recent()]
    assert 10 < len(latest) < 20
    assert latest == [*range(100)][-len(latest) :]


def test_output_is_told_and_not_kept() -> None:
    events = Events(lambda wanted: None)
    events.publish("begin", "t", "1000", pid=1, command=["true"])
    events.publish("delta", "t", "1000", n=0, offset=0, chunk=b"x")
    events.publish("end", "t", "1000", outcome=None, output=b"x")
    (begin, end) = events.recent()
    assert (begin["event"], end["event"], end["seq"]) == ("begin", "end", 3)
    assert "output" not in end


@given(st.lists(st.text(max_size=20), max_size=20), st.integers(min_value=1, max_value=100))
def test_a_command_line_is_cut_where_it_is_too_long_and_says_so(command: list[str], most: int) -> None:
    cut = brief(command, most)
    if cut == command:
        assert sum(map(len, command)) <= most
        return
    *whole, last = cut
    assert last.endswith("…")
    assert sum(map(len, cut)) <= most + 1
    assert whole == command[: len(whole)]
    assert command[len(whole)].startswith(last[:-1])
