"""The rule: never one of the 8 most recently used; ended ones first; then the least recently used."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outlive.worker.pruning import PROTECTED, Candidate, choose


def crowd(count: int, *ended: int) -> list[Candidate]:
    """Return candidates 0, 1, … of which 0 was used least recently, and those numbered have ended."""
    return [Candidate(str(number), float(number), number in ended) for number in range(count)]


def test_the_least_recently_used_goes_when_none_has_ended() -> None:
    assert choose(reversed(crowd(64))) == "0"


def test_an_ended_one_goes_before_an_older_live_one() -> None:
    assert choose(crowd(64, 40, 50)) == "40"


def test_an_ended_one_among_the_eight_most_recent_is_spared() -> None:
    assert choose(crowd(64, 56)) == "0"
    assert choose(crowd(64, 55)) == "55"


def test_eight_or_fewer_are_all_spared() -> None:
    assert choose(crowd(8, *range(8))) is None
    assert choose([]) is None
    assert choose(crowd(9)) == "0"


def test_refusing_spares_live_ones_and_still_drops_an_ended_one() -> None:
    assert choose(crowd(64), spare_live=True) is None
    assert choose(crowd(64, 40), spare_live=True) == "40"
    assert choose(crowd(64, 60), spare_live=True) is None


@given(
    st.lists(st.builds(Candidate, st.uuids().map(str), st.floats(0, 100), st.booleans()), max_size=30),
    st.booleans(),
)
def test_any_crowd_loses_the_one_that_the_rule_names(crowd: list[Candidate], spare_live: bool) -> None:
    chosen = choose(crowd, spare_live=spare_live)
    by_id = {candidate.process_id: candidate for candidate in crowd}
    if chosen is None:
        free = sorted(crowd, key=lambda one: one.last_used)[: max(0, len(crowd) - PROTECTED)]
        assert not free or (spare_live and not any(one.ended for one in free))
        return
    victim = by_id[chosen]
    others = [one for one in crowd if one is not victim]
    assert sum(one.last_used >= victim.last_used for one in others) >= PROTECTED
    assert victim.ended or not spare_live
    for other in others:
        protected = sum(one.last_used >= other.last_used for one in crowd if one is not other) < PROTECTED
        if other.last_used < victim.last_used and not protected:
            # Older and free, and yet it stays: only because the victim had ended and it has not.
            assert victim.ended
            assert not other.ended
