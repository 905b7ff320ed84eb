"""What comes true of watched processes: each rule once, on a clock of ours."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence

import pytest

from outlive.broker.watches import PORT_PAUSE, Armed, Match, Watches
from outlive.common.errors import LimitReached
from outlive.common.outcome import Outcome
from outlive.common.rules import Deadline, Exit, Output, Rule, Silence
from outlive.common.transcript import Found, Transcript, mark_started

from .conftest import DEAD, facts_of

Key = tuple[str, str]
SECOND = 1_000_000_000
KEY = ("t", "1000")
WELL = Outcome("exited", code=0)


class Scene:
    """Watches with a clock and a network of ours."""

    def __init__(self) -> None:
        self.now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self.ports: set[int] = set()
        self.told: list[tuple[Key, Rule, Match]] = []
        self.alarm: int | None = None
        self.looks = 0
        self.fired: set[tuple[Key, Rule, int]] = set()
        self._fds: list[int] = []
        self.restart()

    def restart(self) -> None:
        """Another broker comes up."""
        self.alarm = None
        self.watches = Watches(
            lambda *match: self.told.append(match),
            set_alarm=self._set,
            listening=self._listening,
            fired=lambda *what: what in self.fired,
            now=lambda: self.now,
        )

    def _set(self, instant: int | None) -> None:
        self.alarm = instant

    def _listening(self) -> set[int]:
        self.looks += 1
        return self.ports

    def transcript(self, *rules: str) -> Transcript:
        """Return the transcript of a process that starts now."""
        fd = Transcript.create(facts_of("1000")._replace(wake_on=rules), DEAD)
        self._fds.append(fd)
        mark_started(fd, 1)
        os.pwrite(fd, struct.pack("<Q", self.now), 312)
        return Transcript(fd)

    def until(self, seconds: float, start: int) -> None:
        """Let the clock run, with its alarms, up to so many seconds after `start`."""
        end = start + round(seconds * SECOND)
        while self.alarm is not None and self.alarm <= end:
            self.now = max(self.now, self.alarm)
            self.alarm = None
            self.watches.alarm()
        self.now = end

    @property
    def rules(self) -> Sequence[str]:
        """What came true, in its order."""
        return [str(rule) for _, rule, _ in self.told]

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.close()


def test_an_end_is_told_once_with_its_outcome(scene: Scene) -> None:
    scene.watches.arm(KEY, scene.transcript("exit"))
    scene.watches.ended(KEY, WELL)
    scene.watches.ended(KEY, WELL)
    assert scene.told == [(KEY, Exit(), Match(outcome=WELL))]


def test_what_is_not_watched_is_told_to_nobody_and_costs_nothing(scene: Scene) -> None:
    scene.watches.arm(KEY, scene.transcript())
    scene.watches.ended(KEY, WELL)
    assert KEY not in scene.watches
    assert (scene.told, scene.alarm) == ([], None)


def test_the_end_is_told_to_whoever_waits_for_what_cannot_come_any_more(scene: Scene) -> None:
    scene.watches.arm(KEY, scene.transcript("output=ready", "port=80"))
    scene.watches.ended(KEY, WELL)
    assert scene.told == [(KEY, Exit(), Match(outcome=WELL))]
    assert scene.alarm is None


def test_the_end_is_not_told_when_all_that_was_asked_for_has_come(scene: Scene) -> None:
    scene.watches.arm(KEY, scene.transcript("deadline=5"))
    scene.until(5, scene.now)
    scene.watches.ended(KEY, WELL)
    assert scene.rules == ["deadline=5"]


def test_a_match_in_the_header_is_told_with_its_offset_and_text(scene: Scene) -> None:
    transcript = scene.transcript("exit", "output=o+")
    scene.watches.arm(KEY, transcript)
    os.write(transcript.fd, b"foo bar")
    transcript.record_match(0, Found(1, 1, 3))
    scene.watches.look(KEY)
    scene.watches.look(KEY)
    assert scene.told == [(KEY, Output("o+"), Match(offset=1, text=b"oo"))]


def test_a_match_and_an_end_in_the_same_breath_are_both_told_the_match_first(scene: Scene) -> None:
    transcript = scene.transcript("exit", "output=o+")
    scene.watches.arm(KEY, transcript)
    os.write(transcript.fd, b"foo bar")
    transcript.record_match(0, Found(1, 1, 3))
    scene.watches.ended(KEY, WELL)
    assert scene.rules == ["output=o+", "exit"]


def test_a_broker_that_comes_up_reads_what_was_found_meanwhile_from_the_header(scene: Scene) -> None:
    transcript = scene.transcript("output=o+")
    os.write(transcript.fd, b"foo bar")
    transcript.record_match(0, Found(0, 1, 3))
    scene.watches.arm(KEY, transcript)
    assert scene.rules == ["output=o+"]


def test_a_damaged_table_of_matches_tells_nothing_and_harms_nothing(scene: Scene) -> None:
    transcript = scene.transcript("output=o+")
    transcript.record_match(0, Found(0, 1, 3))
    scene.watches.arm(KEY, transcript)
    scene.watches.ended(KEY, WELL)
    assert scene.rules == ["exit"]


def test_silence_counts_from_the_last_output(scene: Scene) -> None:
    start, transcript = scene.now, scene.transcript("silence=30")
    scene.watches.arm(KEY, transcript)
    scene.until(29, start)
    os.pwrite(transcript.fd, struct.pack("<Q", scene.now), 328)
    scene.until(58, start)
    assert scene.told == []
    scene.until(59, start)
    assert scene.told == [(KEY, Silence(30), Match())]
    assert scene.alarm is None


def test_clock_rules_go_on_over_a_restart_of_the_broker_and_over_a_suspend(scene: Scene) -> None:
    start, transcript = scene.now, scene.transcript("deadline=100", "silence=300")
    scene.watches.arm(KEY, transcript)
    scene.until(60, start)
    scene.restart()
    scene.watches.arm(KEY, transcript)
    assert scene.alarm == start + 100 * SECOND
    scene.now = start + 1000 * SECOND  # suspended beyond both
    scene.watches.alarm()
    assert scene.rules == ["deadline=100", "silence=300"]


def test_a_port_is_looked_for_only_while_somebody_waits_for_it(scene: Scene) -> None:
    start = scene.now
    scene.watches.arm(KEY, scene.transcript("port=8000", "exit"))
    scene.until(3 * PORT_PAUSE / SECOND, start)
    assert scene.looks == 4
    scene.ports = {8000}
    scene.until(4 * PORT_PAUSE / SECOND, start)
    assert scene.rules == ["port=8000"]
    assert scene.alarm is None


def test_no_alarm_is_set_while_no_clock_rule_is_open(scene: Scene) -> None:
    scene.watches.arm(KEY, scene.transcript("exit", "output=x"))
    assert scene.alarm is None
    other = ("t", "1001")
    scene.watches.arm(other, scene.transcript("deadline=5"))
    assert scene.alarm is not None
    scene.watches.drop(other)
    assert scene.alarm is None


def test_a_rule_that_was_told_before_a_restart_and_is_known_is_not_told_again(scene: Scene) -> None:
    transcript = scene.transcript("deadline=5", "exit")
    scene.fired = {(KEY, Deadline(5), 0)}
    scene.watches.arm(KEY, transcript)
    assert scene.alarm is None
    scene.watches.ended(KEY, WELL)
    assert scene.rules == ["exit"]


def test_of_what_starts_now_nobody_looks_whether_it_was_told_before(scene: Scene) -> None:
    scene.watches.fired = lambda *what: pytest.fail("looked")
    scene.now += 1
    scene.watches.arm(KEY, scene.transcript("exit"))
    scene.watches.ended(KEY, WELL)
    assert scene.rules == ["exit"]


def test_a_rule_that_was_added_counts_from_when_it_was_set(scene: Scene) -> None:
    start, transcript = scene.now, scene.transcript()
    scene.watches.arm(KEY, transcript, [Armed(Deadline(5), 100, start + 7 * SECOND, generation=2)])
    scene.until(11, start)
    assert scene.told == []
    scene.until(12, start)
    assert scene.told == [(KEY, Deadline(5), Match(generation=2))]


# Rules that are added.


def add(scene: Scene, transcript: Transcript, rule: Rule, generation: int = 1) -> Armed:
    armed = scene.watches.add(KEY, transcript, rule, set_at=scene.now, generation=generation)
    armed.told = True
    return armed


def find(scene: Scene, transcript: Transcript, armed: Armed, start: int, end: int) -> None:
    """Find something, as a holder does."""
    transcript.record_match(armed.slot, Found(armed.number, start, end))
    scene.watches.look(KEY)


def test_a_rule_that_is_open_is_not_set_twice_and_one_that_came_true_is_set_anew_from_there(scene: Scene) -> None:
    transcript = scene.transcript("output=x")
    os.write(transcript.fd, b"axbx")
    scene.watches.arm(KEY, transcript)
    first = add(scene, transcript, Output("x"))
    assert (first.number, first.generation) == (0, 0)
    find(scene, transcript, first, 1, 2)
    second = add(scene, transcript, Output("x"), 7)
    assert (second.since, second.slot) == (2, 1)
    assert add(scene, transcript, Output("x"), 7) is add(scene, transcript, Output("x"), 8) is second
    find(scene, transcript, second, 3, 4)
    assert add(scene, transcript, Output("x"), 7) is second  # asked again
    assert [(match.generation, match.offset) for _, _, match in scene.told] == [(0, 1), (7, 3)]
    assert scene.watches.to_look_for(KEY) == []


def test_a_rule_that_is_set_again_each_time_it_came_true_takes_the_place_of_the_former(scene: Scene) -> None:
    transcript = scene.transcript()
    os.write(transcript.fd, b"x" * 100)
    numbers = []
    for generation in range(100):
        armed = add(scene, transcript, Output("x"), generation)
        scene.watches.retire(KEY)
        numbers.append(armed.number)
        find(scene, transcript, armed, generation, generation + 1)
        scene.fired.add((KEY, Output("x"), generation))
    for generation in range(100):  # asked again
        assert not add(scene, transcript, Output("x"), generation).open
    assert scene.watches._watches[KEY].armed == [armed]
    assert [match.offset for *_, match in scene.told] == list(range(100))
    assert len(set(numbers)) == 100  # what the header says of a former one is not taken for the next


def test_the_slots_of_rules_that_came_true_are_used_again_those_of_the_first_rules_never(scene: Scene) -> None:
    transcript = scene.transcript("output=1", "exit", "output=2")
    os.write(transcript.fd, b"x" * 100)
    scene.watches.arm(KEY, transcript)
    added = [add(scene, transcript, Output(f"a{n}")) for n in range(6)]
    assert [armed.slot for armed in added] == [2, 3, 4, 5, 6, 7]
    with pytest.raises(LimitReached, match="8 wake rules are about its output"):
        add(scene, transcript, Output("b"))
    find(scene, transcript, added[4], 0, 1)
    find(scene, transcript, added[1], 0, 1)
    assert [add(scene, transcript, Output(f"b{n}")).slot for n in range(2)] == [3, 6]
    assert len({armed.number for armed in scene.watches._watches[KEY].armed}) == 11
    assert len(scene.watches.to_look_for(KEY)) == 6


def test_an_end_is_told_for_a_rule_that_was_added_after_an_end_was_told(scene: Scene) -> None:
    transcript = scene.transcript("exit")
    scene.watches.arm(KEY, transcript)
    scene.watches.ended(KEY, WELL)
    add(scene, transcript, Output("x"), 5)
    scene.watches.ended(KEY, WELL)
    assert [(str(rule), match.generation) for _, rule, match in scene.told] == [("exit", 0), ("exit", 5)]


def test_output_of_before_the_end_may_be_found_after_it(scene: Scene) -> None:
    transcript = scene.transcript()
    os.write(transcript.fd, b"x")
    armed = add(scene, transcript, Output("x"))
    scene.watches.ended(KEY, WELL)
    assert [rule.rule for rule in scene.watches.to_look_for(KEY)] == ["output=x"]
    find(scene, transcript, armed, 0, 1)
    assert scene.rules == ["exit", "output=x"]


def test_a_listeners_rule_is_its_own_and_goes_with_it(scene: Scene) -> None:
    transcript, heard = scene.transcript("output=x"), []
    os.write(transcript.fd, b"x")
    scene.watches.arm(KEY, transcript)
    start = scene.now
    mine = [
        scene.watches.add(KEY, transcript, rule, set_at=scene.now, heard=heard.append)
        for rule in (Output("x"), Deadline(5))
    ]
    find(scene, transcript, mine[0], 0, 1)
    assert heard == [Match(offset=0, text=b"x")]
    assert scene.alarm == start + 5 * SECOND
    for armed in mine:
        scene.watches.remove(KEY, armed)
    assert (scene.alarm, scene.told) == (None, [])
    scene.watches.ended(KEY, WELL)
    assert scene.rules == ["exit"]


def test_a_rule_whose_slot_was_used_again_is_after_a_restart_set_anew_from_what_was_scanned(scene: Scene) -> None:
    transcript = scene.transcript()
    os.write(transcript.fd, b"xxxx")
    transcript.count_scanned(4)
    scene.fired = {(KEY, Output("x"), 3)}
    scene.watches.arm(KEY, transcript, [Armed(Output("x"), 1000, 0, 3, told=True)])
    assert add(scene, transcript, Output("x"), 4).since == 4
