"""A worker that had come up is replaced at once; one that does not come up is tried again, and given up."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.broker.lifecycle import GIVE_UP_AFTER, IMPOSSIBLE, MOVES, Effect, Event, Life, Phase, step


@pytest.mark.parametrize(("phase", "event"), [*product(Phase, Event)])
def test_every_phase_decides_every_event(phase: Phase, event: Event) -> None:
    assert (event in MOVES[phase]) != ((phase, event) in IMPOSSIBLE)
    assert IMPOSSIBLE.get((phase, event), "a reason")


@pytest.mark.parametrize(("phase", "event"), IMPOSSIBLE)
def test_an_impossible_pair_is_refused(phase: Phase, event: Event) -> None:
    with pytest.raises(KeyError):
        step(Life(phase), event)


def play(life: Life, *events: Event) -> tuple[Life, list[Effect]]:
    """Return the life after all events, and the effects of the last."""
    effects: tuple[Effect, ...] = ()
    for event in events:
        life, effects = step(life, event)
    return life, list(effects)


def test_a_worker_that_had_come_up_is_replaced_at_once_however_often_it_dies() -> None:
    life, _ = play(Life(), Event.WANTED)
    for _ in range(100):
        life, effects = play(life, Event.REGISTERED, Event.DIED)
        assert effects == [Effect.START_WORKER]
        assert life == Life(Phase.STARTING, failures=0)


def test_pauses_start_at_a_tenth_of_a_second_and_double() -> None:
    life, _ = play(Life(), Event.WANTED)
    pauses = []
    for _ in range(GIVE_UP_AFTER - 1):
        life, effects = play(life, Event.DIED)
        assert effects == [Effect.PAUSE]
        pauses.append(life.pause)
        life, effects = play(life, Event.PAUSE_OVER)
        assert effects == [Effect.START_WORKER]
    assert pauses == [0.1, 0.2, 0.4, 0.8]


def test_no_pause_is_longer_than_thirty_seconds() -> None:
    assert [Life(Phase.PAUSING, failures).pause for failures in (8, 9, 10, 1000)] == [12.8, 25.6, 30.0, 30.0]


def failed() -> Life:
    """Return the life of a thread whose worker never came up."""
    life, _ = play(Life(), Event.WANTED)
    for _ in range(4):
        life, _ = play(life, Event.DIED, Event.PAUSE_OVER)
    life, effects = play(life, Event.DIED)
    assert life.phase is Phase.FAILED
    assert effects == []
    return life


def test_five_deaths_in_a_row_before_it_came_up_fail_the_thread_and_its_calls() -> None:
    assert failed().phase is Phase.FAILED


def test_a_failed_thread_that_is_wanted_again_has_all_its_tries_again() -> None:
    life, effects = play(failed(), Event.WANTED)
    assert (life, effects) == (Life(Phase.STARTING, failures=0), [Effect.START_WORKER])
    life, _ = play(life, Event.DIED)
    assert (life.phase, life.pause) == (Phase.PAUSING, 0.1)


def test_coming_up_once_forgives_the_deaths_before() -> None:
    life, _ = play(Life(), Event.WANTED, *(Event.DIED, Event.PAUSE_OVER) * 4, Event.REGISTERED, Event.DIED)
    assert life == Life(Phase.STARTING, failures=0)


def test_a_worker_that_is_wanted_on_its_way_to_bed_is_followed_by_another() -> None:
    life, effects = play(Life(Phase.AWAKE), Event.DISMISSED, Event.WANTED, Event.DIED)
    assert life.phase is Phase.STARTING
    assert effects == [Effect.START_WORKER]


def test_a_worker_that_dies_on_its_way_to_bed_is_not_replaced() -> None:
    life, effects = play(Life(Phase.AWAKE), Event.DISMISSED, Event.DIED)
    assert (life.phase, effects) == (Phase.ASLEEP, [])


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_any_order_of_events_has_at_most_one_worker(events: list[Event]) -> None:
    life = Life()
    exists = pausing = False
    for event in events:
        possible = event in MOVES[life.phase]
        if event is Event.DIED:
            possible = possible and exists
        elif event is Event.REGISTERED and not exists:
            # One that survived its broker; there is none while a pause is on, or the pause would start a second.
            possible = possible and life.phase is Phase.ASLEEP
        elif event is Event.PAUSE_OVER:
            possible = possible and pausing
        if not possible:
            continue
        if event is Event.DIED:
            exists = False
        elif event is Event.REGISTERED:
            exists = True
        life, effects = step(life, event)
        if Effect.START_WORKER in effects:
            assert not exists
            exists = True
        pausing = life.phase is Phase.PAUSING
        assert (Effect.PAUSE in effects) == (pausing and event is Event.DIED)
        assert exists == (life.phase in (Phase.STARTING, Phase.AWAKE, Phase.LEAVING, Phase.RETURNING))
        assert 0 <= life.failures <= GIVE_UP_AFTER
