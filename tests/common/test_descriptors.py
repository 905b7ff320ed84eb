"""Descriptors are closed exactly once, whatever happens to them in between."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common.descriptors import ROLES, Handles

from .conftest import descriptors

roles = st.sampled_from(ROLES)


def opened(*names: str) -> Handles:
    return Handles({role: os.open(os.devnull, os.O_RDONLY) for role in names})


def test_what_is_not_there_is_minus_one() -> None:
    handles = Handles()
    assert [getattr(handles, role) for role in ROLES] == [-1] * len(ROLES)
    assert len(handles) == 0
    handles.close()


def test_held_is_in_the_order_of_the_roles(no_leak: None) -> None:
    handles = opened("pidfd", "transcript", "inlet")
    assert list(handles.held()) == ["transcript", "inlet", "pidfd"]
    handles.close()


def test_adopting_takes_what_is_lacking_and_closes_the_rest(no_leak: None) -> None:
    ours, theirs = opened("transcript"), opened("transcript", "pidfd")
    mine, pidfd = ours.transcript, theirs.pidfd
    ours.adopt(theirs)
    assert ours.held() == {"transcript": mine, "pidfd": pidfd}
    assert theirs.held() == {}
    os.fstat(mine)
    ours.close()


def test_a_closed_number_that_was_handed_out_again_is_not_closed(no_leak: None) -> None:
    handles = opened("pidfd")
    number = handles.pidfd
    handles.close()
    again = os.open(os.devnull, os.O_RDONLY)
    assert again == number
    handles.close()
    handles.close_role("pidfd")
    os.fstat(again)
    os.close(again)


def test_a_forgotten_set_warns_and_closes(no_leak: None) -> None:
    sets = [opened("pidfd")]
    with pytest.warns(ResourceWarning, match="descriptors never closed: .*pidfd"):
        sets.clear()


acts = st.one_of(
    st.tuples(st.just("open"), st.integers(0, 2), roles),
    st.tuples(st.just("close_role"), st.integers(0, 2), roles),
    st.tuples(st.just("close"), st.integers(0, 2), st.just("")),
    st.tuples(st.just("adopt"), st.integers(0, 2), st.integers(0, 2)),
)


@given(st.lists(acts, max_size=30))
def test_any_order_of_acts_closes_each_descriptor_exactly_once(plan: list[tuple[str, int, str | int]]) -> None:
    before = descriptors()
    closed: list[int] = []
    close: Callable[[int], None] = os.close
    sets = [Handles() for _ in range(3)]

    def counted(fd: int) -> None:
        closed.append(fd)
        close(fd)  # raises EBADF on the second time

    count = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("outlive.common.descriptors.os.close", counted)
        for act, at, what in plan:
            if act == "open" and isinstance(what, str) and getattr(sets[at], what) < 0:
                setattr(sets[at], what, os.open(os.devnull, os.O_RDONLY))
                count += 1
            elif act == "close_role" and isinstance(what, str):
                sets[at].close_role(what)
            elif act == "close":
                sets[at].close()
            elif act == "adopt" and isinstance(what, int) and what != at:
                sets[at].adopt(sets[what])
            numbers = [fd for handles in sets for fd in handles.held().values()]
            assert len(numbers) == len(set(numbers)) == count - len(closed)
        for handles in sets:
            handles.close()
    assert len(closed) == count
    assert descriptors() == before
