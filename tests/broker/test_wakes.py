"""A wake is handed over once it is written, until its program has returned; five failures make a dead letter."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.broker.wakes import (
    COURSES,
    FAILURES_MAX,
    FATES,
    IMPOSSIBLE_COURSES,
    IMPOSSIBLE_FATES,
    Course,
    Effect,
    Event,
    Fate,
    Happening,
    Phase,
    State,
    after,
    step,
)


@pytest.mark.parametrize(("state", "event"), [*product(State, Event)])
def test_every_state_of_a_wake_decides_every_event(state: State, event: Event) -> None:
    assert (event in FATES[state]) != ((state, event) in IMPOSSIBLE_FATES)
    assert IMPOSSIBLE_FATES.get((state, event), "a reason")


@pytest.mark.parametrize(("phase", "happening"), [*product(Phase, Happening)])
def test_every_phase_of_a_thread_decides_every_happening(phase: Phase, happening: Happening) -> None:
    assert (happening in COURSES[phase]) != ((phase, happening) in IMPOSSIBLE_COURSES)
    assert IMPOSSIBLE_COURSES.get((phase, happening), "a reason")


@pytest.mark.parametrize(("state", "event"), IMPOSSIBLE_FATES)
def test_an_impossible_event_of_a_wake_is_refused(state: State, event: Event) -> None:
    with pytest.raises(KeyError):
        after(Fate(state), event)


@pytest.mark.parametrize(("phase", "happening"), IMPOSSIBLE_COURSES)
def test_an_impossible_happening_is_refused(phase: Phase, happening: Happening) -> None:
    with pytest.raises(KeyError):
        step(Course(phase), happening, due=True)


def fate(*events: Event) -> Fate:
    """Return what has become of a new wake after these events."""
    found = Fate()
    for event in events:
        found = after(found, event)
    return found


RUN = (Event.COMMITTED, Event.DELIVERED)


def test_a_wake_is_due_only_from_its_commit_to_the_return_of_its_program() -> None:
    assert not fate().is_due
    assert fate(Event.COMMITTED).is_due
    assert fate(*RUN).is_due
    assert fate(*RUN, Event.ACKNOWLEDGED) == Fate(State.DONE)


def test_five_failures_make_a_dead_letter_and_a_retry_gives_it_all_its_tries_again() -> None:
    failure = (Event.FAILED, Event.DELIVERED)
    four = fate(*RUN, *failure * (FAILURES_MAX - 1))
    assert four == Fate(State.DELIVERED, 4)
    dead = after(four, Event.FAILED)
    assert dead == Fate(State.DEAD, 5)
    assert after(dead, Event.RETRIED) == Fate(State.PENDING, 0)


def test_a_worker_that_was_killed_a_hundred_times_is_no_failure_of_its_program() -> None:
    assert fate(*RUN, *[Event.WORKER_DIED] * 100) == Fate(State.DELIVERED)


def test_what_the_agent_has_read_is_not_delivered_unless_somebody_wants_that() -> None:
    assert not fate(Event.READ, Event.COMMITTED).is_due
    assert not fate(Event.COMMITTED, Event.READ).is_due
    assert fate(Event.COMMITTED, Event.READ, Event.RETRIED).is_due


def test_reading_what_one_was_woken_for_leaves_the_run_as_it_is() -> None:
    assert fate(*RUN, Event.READ) == Fate(State.DELIVERED)


def test_a_wake_that_is_dropped_during_its_run_is_dropped_however_that_ends() -> None:
    for end in (Event.ACKNOWLEDGED, Event.FAILED, Event.WORKER_DIED):
        assert fate(*RUN, Event.DROPPED, end) == Fate(State.DROPPED)


def course(*happenings: Happening, due: bool = True) -> tuple[Course, list[Effect]]:
    """Return a thread's course after all of these, something being due, and the effects of the last."""
    found, effects = Course(), ()
    for happening in happenings:
        found, effects = step(found, happening, due=due)
    return found, list(effects)


RUNNING = (Happening.STARTED, Happening.WORKER_UP)


def test_a_wake_for_a_busy_thread_waits_and_is_the_next_run() -> None:
    assert course(*RUNNING, Happening.POSTED) == (Course(Phase.RUNNING), [])
    assert course(*RUNNING, Happening.POSTED, Happening.RETURNED) == (Course(Phase.RUNNING), [Effect.RUN])


def test_a_thread_goes_to_bed_when_its_program_returned_and_nothing_is_due() -> None:
    running, _ = course(*RUNNING)
    assert step(running, Happening.RETURNED, due=False) == (Course(Phase.RESTING), (Effect.SLEEP,))


@pytest.mark.parametrize("trouble", [Happening.FAILED, Happening.WORKER_DIED])
def test_pauses_start_at_a_tenth_of_a_second_double_and_end_at_thirty_seconds(trouble: Happening) -> None:
    found, pauses = course(*RUNNING)[0], []
    for _ in range(11):
        found, effects = step(found, trouble, due=True)
        assert effects == (Effect.PAUSE,)
        pauses.append(found.pause)
        for happening in (Happening.PAUSE_OVER, Happening.WORKER_UP):
            found, _ = step(found, happening, due=True)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert Course(troubles=10**9).pause == 30.0


def test_one_return_forgives_the_failures_before() -> None:
    found, _ = course(*RUNNING, Happening.FAILED, Happening.PAUSE_OVER, Happening.WORKER_UP, Happening.RETURNED)
    assert found.troubles == 0


def test_a_thread_whose_worker_does_not_come_up_is_tried_again_for_ever() -> None:
    found, effects = course(Happening.STARTED, *[Happening.UNREACHABLE, Happening.PAUSE_OVER] * 50)
    assert (found.phase, effects) == (Phase.WAKING, [Effect.WANT_WORKER])


def test_a_stopped_program_is_cancelled_only_while_it_runs() -> None:
    assert course(*RUNNING, Happening.STOPPED) == (Course(Phase.UNMANNED), [Effect.CANCEL])
    assert course(Happening.STARTED, Happening.STOPPED) == (Course(Phase.UNMANNED), [])


@given(st.lists(st.tuples(st.sampled_from(Happening), st.booleans()), max_size=60))
def test_in_any_order_of_happenings_something_due_is_never_left_to_nobody(
    happenings: list[tuple[Happening, bool]],
) -> None:
    found = Course()
    for happening, due in happenings:
        if happening not in COURSES[found.phase]:
            continue
        found, effects = step(found, happening, due=due)
        if due and found.phase is not Phase.UNMANNED:
            assert found.phase is not Phase.RESTING
        assert (found.phase is Phase.PAUSING) or Effect.PAUSE not in effects
        assert Effect.RUN not in effects or found.phase is Phase.RUNNING
