"""Errors on the wire, and the text they are made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common import errors
from outlive.common.errors import BY_KIND, OutliveError, SpawnError, from_wire, shown


def subclasses(base: type[OutliveError]) -> set[type[OutliveError]]:
    return {base}.union(*map(subclasses, base.__subclasses__()))


def test_every_error_of_ours_has_a_kind_of_its_own_that_leads_back_to_it() -> None:
    ours = {error for error in subclasses(OutliveError) if error.__module__ == errors.__name__}
    assert set(BY_KIND.values()) == ours
    assert len(BY_KIND) == len(ours)


@pytest.mark.parametrize("kind", BY_KIND)
def test_an_error_comes_back_from_the_wire(kind: str) -> None:
    error = from_wire(kind, "what was wrong")
    assert type(error) is BY_KIND[kind]
    assert str(error) == "what was wrong"


def test_a_spawn_error_keeps_its_stage() -> None:
    error = from_wire("spawn", "no such file", "exec")
    assert isinstance(error, SpawnError)
    assert error.stage == "exec"


def test_an_error_of_a_newer_peer_is_a_plain_one() -> None:
    assert type(from_wire("from_the_future", "x")) is OutliveError


@given(st.text() | st.binary() | st.integers(-(2**63), 2**64) | st.floats() | st.none() | st.lists(st.integers()))
def test_a_shown_value_is_short(value: object) -> None:
    assert len(shown(value)) <= 240


def test_a_shown_container_is_its_type() -> None:
    deep: list[object] = []
    for _ in range(1000):
        deep = [deep]
    assert shown(deep) == "a list"
