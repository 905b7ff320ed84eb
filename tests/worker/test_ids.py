"""Which id is next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outlive.common.names import RANDOM_IDS
from outlive.worker.ids import Ids

ALL = [str(number) for number in RANDOM_IDS]


def test_ids_are_random_decimal_and_in_range() -> None:
    ids = Ids()
    given_out = [ids.next() for _ in range(100)]
    assert len(set(given_out)) == 100
    assert all(int(one) in RANDOM_IDS for one in given_out)
    assert given_out != sorted(given_out, key=int)


def test_a_seed_makes_them_predictable() -> None:
    first, second, other = ([ids.next() for _ in range(3)] for ids in (Ids(7), Ids(7), Ids(8)))
    assert first == second != other


def test_all_random_ones_are_given_out_and_then_counted_on() -> None:
    ids = Ids(7)
    assert sorted(ids.next() for _ in ALL) == sorted(ALL)
    assert [ids.next() for _ in range(3)] == ["100000", "100001", "100002"]


def test_counting_goes_on_after_the_highest_that_was_used() -> None:
    ids = Ids()
    ids.use([*ALL, "123456", "5"])
    assert ids.next() == "123457"


def test_one_that_was_used_elsewhere_meanwhile_is_passed_over() -> None:
    ids = Ids(7)
    ids.use(ALL[3:])
    first = ids.next()
    second, third = sorted({*ALL[:3]} - {first})
    ids.use([second])
    assert [ids.next(), ids.next()] == [third, "100000"]


@given(st.lists(st.integers(1, 200_000), max_size=30), st.integers(0, 2**32))
def test_what_was_used_is_not_given_out(used: list[int], seed: int) -> None:
    ids = Ids(seed)
    ids.use(map(str, used))
    given_out = [int(ids.next()) for _ in range(5)]
    assert not set(given_out) & set(used)
    assert len(set(given_out)) == 5
