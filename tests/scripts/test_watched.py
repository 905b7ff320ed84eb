"""What a chaotic run takes for a wake that came twice."""

from __future__ import annotations

import pytest

from outlive.scripts.mayhem.watched import _given_twice


@pytest.mark.parametrize(
    ("deliveries", "complaints"),
    [
        (["1 0 7 1000 exit 3"], 0),
        (["1 0 7 1000 exit 3", "1 0 8 1001 exit 4", "2 0 9 1000 output=a b a b"], 0),
        (["1 0 7 1000 exit 3", "1 0 7 1000 exit 3"], 0),  # its worker died: the same run
        (["1 0 7 1000 exit 3", "2 0 7 1000 exit 3"], 1),
        (["1 0 7 1000 exit 3", "1 1 7 1000 exit 3"], 1),  # it failed, which it never does
    ],
)
def test_a_wake_that_was_part_of_a_second_run_came_twice(deliveries: list[str], complaints: int) -> None:
    assert len(list(_given_twice([line.split(" ", 5) for line in deliveries]))) == complaints
