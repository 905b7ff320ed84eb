"""The message types that do something; how they travel is in test_wire."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outlive.common.messages import DetachedProcessSummary, ReattachSummary, Welcome, outcome_from_wire
from outlive.common.outcome import Outcome
from outlive.common.program import Program
from outlive.worker.ids import Ids


@given(st.sets(st.integers(1, 99_999) | st.integers(100_000, 9_999_999_999), max_size=50))
def test_the_ids_a_thread_has_used_arrive_and_of_counted_ones_the_highest(numbers: set[int]) -> None:
    ids = Ids()
    ids.use(Welcome.of(map(str, numbers), deltas=True).ids())
    assert all(str(number) in ids for number in numbers)
    assert int(ids.next()) not in numbers


def test_a_welcome_has_room_for_whatever_a_thread_has_used() -> None:
    assert len(Welcome.of(map(str, range(1000, 1_000_000)), deltas=True).used) <= 5 * 100_000


def test_summaries_sort_their_ids_as_strings() -> None:
    assert DetachedProcessSummary.of(["9", "100000", "1000"]) == DetachedProcessSummary(3, ["1000", "100000", "9"])
    assert ReattachSummary.of(2, ["9", "10"]) == ReattachSummary(2, 2, ["10", "9"])


def test_an_outcome_comes_back_from_a_reply() -> None:
    outcome = Outcome("signaled", signal=9, by="pruned")
    assert outcome_from_wire(outcome.to_wire()) == outcome
    assert outcome_from_wire(None) is None


def test_a_program_is_shown_in_one_line_of_a_reasonable_length() -> None:
    assert Program(function="agent:main").label == "agent:main"
    assert Program(argv=[b"sh", b"-c", b"exit 1"]).label == "sh -c 'exit 1'"
    label = Program(argv=[b"x" * 1000] * 100).label
    assert label == "x" * 200 + "…"
