"""The table decides every pair, and no order of events makes two parties pump or leaks a descriptor."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.broker.custody import IMPOSSIBLE, MOVES, Custody, Effect, Event, Holder, State, step


@pytest.mark.parametrize(("state", "event"), [*product(State, Event)])
def test_every_state_decides_every_event(state: State, event: Event) -> None:
    assert (event in MOVES[state]) != ((state, event) in IMPOSSIBLE)  # each hole has its reason
    assert IMPOSSIBLE.get((state, event), "a reason")


@pytest.mark.parametrize(("state", "event"), IMPOSSIBLE)
def test_an_impossible_pair_is_refused(state: State, event: Event) -> None:
    with pytest.raises(KeyError):
        step(Custody(state), event)


class Witness:
    """Does what the effects say, as the world would, and notices when two do it at once."""

    def __init__(self) -> None:
        self.custody = Custody()
        self.worker_pumps = False
        self.broker_pumps = False
        self.closed = 0
        self.archived = 0

    def can_happen(self, event: Event) -> bool:
        """Whether the world, and `threads`, let this event through."""
        if event not in MOVES[self.custody.state]:
            return False
        if event in (Event.DETACHED, Event.SKIPPED):
            return self.custody.holder is Holder.WORKER
        if event is Event.WORKER_LOST:
            return self.custody.holder is not Holder.BROKER
        if event is Event.REATTACHED:
            return self.custody.holder is Holder.BROKER
        return True

    def happen(self, event: Event) -> None:
        # What the worker has done before the event is told.
        if event is Event.STARTED:
            self.worker_pumps = True
        elif event in (Event.DETACHED, Event.SKIPPED, Event.WORKER_LOST, Event.COLLECTED):
            self.worker_pumps = False
        self.custody, effects = step(self.custody, event)
        for effect in effects:
            assert not self.closed, f"{effect} after the descriptors were closed"
            self.do(effect)

    def do(self, effect: Effect) -> None:
        if effect is Effect.START_PUMP:
            assert not self.worker_pumps
            assert not self.broker_pumps
            self.broker_pumps = True
        elif effect is Effect.STOP_PUMP:
            self.broker_pumps = False
        elif effect is Effect.SEND_HANDLES:
            assert not self.broker_pumps
            self.worker_pumps = True
        elif effect is Effect.FORGET_AT_WORKER:
            self.worker_pumps = False
        elif effect is Effect.ARCHIVE:
            assert not self.broker_pumps, "the output may still grow"
            self.archived += 1
        elif effect is Effect.CLOSE_HANDLES:
            assert not self.broker_pumps
            assert not self.worker_pumps
            self.closed += 1


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_any_order_of_events_has_one_pumper_and_closes_once(events: list[Event]) -> None:
    witness = Witness()
    for event in events:
        if not witness.can_happen(event):
            continue
        witness.happen(event)
        state, holder = witness.custody.state, witness.custody.holder
        assert witness.broker_pumps == (holder is Holder.BROKER)
        assert not witness.worker_pumps or holder is Holder.WORKER
        assert (holder is not Holder.NOBODY) == (state in (State.ATTACHED, State.DETACHED, State.ENDED))
        assert witness.closed == (state is State.GONE)
        assert witness.archived <= 1


def test_only_what_never_ran_goes_without_an_archive() -> None:
    for moves in MOVES.values():
        for event, move in moves.items():
            if move.state is State.GONE:
                assert (Effect.ARCHIVE in move.effects) == (event is not Event.NEVER_RAN)


def test_a_detached_process_ends_without_an_event_and_announces_after_its_reattachment() -> None:
    custody = Custody(State.DETACHED, Holder.BROKER)
    custody, effects = step(custody, Event.ENDED)
    assert effects == ()
    custody, effects = step(custody, Event.REATTACHED)
    assert effects == (Effect.STOP_PUMP, Effect.SEND_HANDLES)
    custody, effects = step(custody, Event.ENDED)
    assert effects == (Effect.ANNOUNCE,)
    assert custody == Custody(State.ENDED, Holder.WORKER)


def test_a_process_is_taken_back_from_a_worker_that_dies_before_it_has_imported_it() -> None:
    custody, _ = step(Custody(State.DETACHED, Holder.BROKER), Event.REATTACHED)
    custody, effects = step(custody, Event.WORKER_LOST)
    assert custody == Custody(State.DETACHED, Holder.BROKER)
    assert effects == (Effect.START_PUMP,)


def test_a_worker_lost_during_a_start_decides_nothing_until_its_spawner_has_spoken() -> None:
    custody, effects = step(Custody(), Event.WORKER_LOST)
    assert (custody, effects) == (Custody(), ())
    custody, effects = step(custody, Event.STARTED_ALONE)
    assert (custody, effects) == (Custody(State.DETACHED, Holder.BROKER), (Effect.START_PUMP,))


def test_a_start_that_left_nothing_but_its_mark_is_lost_and_not_run_again() -> None:
    custody, effects = step(Custody(), Event.VANISHED)
    assert custody.state is State.ENDED
    assert effects[0] is Effect.RECORD_LOST
