"""What is expected of a flooding child's transcript, and that what is wrong with one is seen."""

from __future__ import annotations

from outlive.scripts import flood
from outlive.scripts.mayhem.tally import Tally


def test_any_piece_is_known_by_its_offset() -> None:
    whole = flood.lines(7, 0, 100)
    for start, stop in ((0, 1600), (5, 90), (16, 32), (31, 33)):
        assert flood.printed(7, start, stop) == whole[start:stop]
        assert flood.misplaced(7, start, whole[start:stop]) == 0


def test_a_loss_a_repetition_and_another_childs_line_are_out_of_place() -> None:
    whole = flood.lines(7, 0, 100)
    for wrong in (whole[:320] + whole[323:], whole[:320] + whole[160:], flood.lines(8, 0, 100)):
        assert flood.misplaced(7, 0, wrong[: len(whole)]) > 0


def test_what_is_missing_is_told_by_its_numbers() -> None:
    whole = flood.lines(7, 0, 100)
    assert flood.lost_until(7, 160, whole[160:]) == 0
    assert flood.lost_until(7, 160, whole[173:]) == 13
    assert flood.lost_until(7, 160, whole[160:800] + whole[805:]) == 5


def test_the_tally_counts_what_must_be_zero() -> None:
    tally = Tally()
    tally.check_output("a child", 1600, 1600)
    tally.check_piece("a child", 7, 16, flood.lines(7, 1, 9))
    assert tally.clean
    tally.check_output("a child", 1600, 1597)
    tally.check_output("a child", 1600, 1616)
    tally.check_piece("a child", 7, 16, flood.lines(7, 2, 9) + flood.lines(7, 1, 2))
    assert (tally.lost, tally.repeated, tally.out_of_order) == (3, 16, 16)
    assert not tally.clean
