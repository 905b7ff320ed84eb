"""Who carries our mark and is held by nobody: made-up processes, and real descriptors."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common import kernel
from outlive.common.transcript import Facts, Lease, Transcript
from outlive.scripts.doctor import processes
from outlive.scripts.doctor.processes import Held, Seen, check_orphans, role_of

RUN = Path("/home/me/run")


def child(pid: int = 4711, *, run: Path = RUN, process: str = "default/12345") -> Seen:
    return Seen(pid, 1, "S", "", run, f"mark{pid}", process, "sleep 1")


def a_transcript(process_id: str, mark: str) -> int:
    facts = Facts("default", process_id, "c", mark, (b"x",), b"/", False, 80, 24, 0, kernel.boot_id())
    return Transcript.create(facts, Lease.mine(0))


@pytest.fixture
def marked() -> Iterator[subprocess.Popen[bytes]]:
    """A process that carries a mark."""
    mark = uuid.uuid4().hex
    environment = {"OUTLIVE_MARK": mark, "OUTLIVE_THREAD": "t", "OUTLIVE_PROCESS": "54321", "OUTLIVE_HOME": "/x"}
    command = [sys.executable, "-I", "-S", "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()  # it has executed its program
        yield process
        process.kill()


def found_of(pid: int) -> Seen:
    (found,) = (found for found in processes.seen() if found.pid == pid)
    return found


def test_a_marked_process_is_seen_with_its_names_and_home(marked: subprocess.Popen[bytes]) -> None:
    found = found_of(marked.pid)
    assert (found.process, found.run, found.role) == ("t/54321", Path("/x/run"), "")
    assert found.started == kernel.start_time(marked.pid)
    assert found.tasks == 1
    assert not found.stopped


def test_a_marked_process_whose_transcript_somebody_of_ours_has_open_is_no_orphan(
    marked: subprocess.Popen[bytes],
) -> None:
    found = found_of(marked.pid)
    transcript = a_transcript("54321", found.mark)
    position = os.lseek(transcript, 0, os.SEEK_CUR)
    us = Seen(os.getpid(), kernel.start_time(os.getpid()) or 0, "S", "broker", RUN, "", "", "broker")
    left, held = processes.orphans([found, us])
    assert left == []
    assert found.mark in held.marks
    assert os.lseek(transcript, 0, os.SEEK_CUR) == position
    os.close(transcript)
    assert processes.orphans([found, us])[0] == [found]


def test_a_transcript_of_the_same_id_with_another_mark_holds_nobody(marked: subprocess.Popen[bytes]) -> None:
    found = found_of(marked.pid)
    transcript = a_transcript("54321", "0" * 32)
    us = Seen(os.getpid(), 0, "S", "broker", RUN, "", "", "broker")
    assert processes.orphans([found, us])[0] == [found]
    os.close(transcript)


def test_a_memory_file_that_only_looks_like_a_transcript_is_passed_over() -> None:
    fd = kernel.memfd("outlive-54321")
    assert processes.held_by([os.getpid()], {"54321"}) == Held()
    os.close(fd)


def test_a_process_that_ends_while_we_look_is_no_orphan(marked: subprocess.Popen[bytes]) -> None:
    found = found_of(marked.pid)
    marked.kill()
    marked.wait()
    assert processes.orphans([found])[0] == []


def test_a_holder_that_has_gone_or_hides_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    assert processes.held_by([1 << 30], {"1"}) == Held()
    monkeypatch.setattr(os, "listdir", refuse)
    assert processes.held_by([os.getpid()], {"1"}) == Held(unseen=(os.getpid(),))
    assert processes.seen() == []


def test_a_lost_process_is_a_warning_with_its_pid() -> None:
    (found,) = check_orphans([child()], Held(), (), RUN)
    assert (found.severity, found.pids) == ("warning", (4711,))
    assert "default/12345" in found.found


def test_an_orphan_that_a_hidden_holder_may_have_is_a_maybe() -> None:
    (found,) = check_orphans([child()], Held(unseen=(99,)), (), RUN)
    assert found.severity == "note"
    assert "99" in found.meaning


def test_what_an_ended_process_left_running_is_a_note() -> None:
    (found,) = check_orphans([child()], Held(), {"default/12345"}, RUN)
    assert found.severity == "note"


def test_orphans_of_other_homes_are_told_apart() -> None:
    other = child(4712, run=Path("/other/run"))
    mine, theirs = check_orphans([other, child()], Held(), {"default/12345"}, RUN)
    assert (mine.pids, theirs.pids, theirs.severity) == ((4711,), (4712,), "note")
    assert "/other/run" in theirs.meaning


def test_without_orphans_there_is_one_good_finding() -> None:
    assert [found.severity for found in check_orphans([], Held(), (), RUN)] == ["ok"]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_every_orphan_is_in_exactly_one_finding(kinds: list[tuple[bool, bool]]) -> None:
    marked = [
        child(pid, run=RUN if here else Path("/other"), process=f"t/{1000 + ended}")
        for pid, (here, ended) in enumerate(kinds, 2)
    ]
    told = [pid for found in check_orphans(marked, Held(), {"t/1001"}, RUN) for pid in found.pids]
    assert sorted(told) == [found.pid for found in marked]


def test_our_own_processes_are_known_by_role_or_by_what_a_service_manager_starts() -> None:
    assert role_of({b"OUTLIVE_ROLE": b"worker.spawner"}, [b"python"]) == "worker.spawner"
    assert role_of({}, [b"/usr/bin/python3", b"-P", b"-m", b"outlive.broker.keeper"]) == "broker.keeper"
    assert role_of({}, [b"python", b"-m", b"pytest", b"outlive.broker"]) == ""
    assert role_of({b"OUTLIVE_MARK": b"m"}, [b"python", b"-m", b"outlive.broker"]) == ""
    assert role_of({}, []) == ""


def test_a_stat_line_with_brackets_and_blanks_in_the_name_is_understood() -> None:
    rest = b" ".join(str(number).encode() for number in range(4, 53))
    assert processes.parse_stat(b"7 (a) b) T " + rest) == ("T", 20, 22)
    for wrong in (b"", b"7 (a) S 1"):
        with pytest.raises(ValueError):
            processes.parse_stat(wrong)


@given(st.binary())
def test_any_environment_is_survived(raw: bytes) -> None:
    processes.parse_environment(raw)


def test_of_a_name_given_twice_the_first_counts() -> None:
    assert processes.parse_environment(b"A=1\0A=2\0nonsense\0B=\0") == {b"A": b"1", b"B": b""}
