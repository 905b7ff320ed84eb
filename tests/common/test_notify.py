"""The keeper's words: literal bytes, what is no datagram of ours, and what a started broker inherits."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common import notify

words = st.text(st.characters(exclude_characters="\n=", exclude_categories=["Cs"]), max_size=20)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    yield ours, theirs
    ours.close()
    theirs.close()


def closed(notifier: notify.Notifier) -> None:
    """Close what lives as long as its process."""
    if notifier._socket:
        notifier._socket.close()


def test_what_is_stored_and_removed_is_said_in_systemds_words() -> None:
    mark = "0123456789abcdef"
    assert notify.encode(notify.stored(mark)) == b"FDSTORE=1\nFDNAME=0123456789ab\nFDPOLL=0"
    assert notify.encode(notify.removed(mark)) == b"FDSTOREREMOVE=1\nFDNAME=0123456789ab"


@given(st.dictionaries(words, words, max_size=5))
def test_what_was_said_is_what_is_understood(fields: dict[str, str]) -> None:
    assert notify.decode(notify.encode(fields)) == fields


@given(st.binary(max_size=2000))
def test_any_bytes_are_understood_or_left_out(raw: bytes) -> None:
    assert all("\n" not in name + value for name, value in notify.decode(raw).items())


def test_descriptors_come_with_the_kernels_word_on_who_sent_them(
    ends: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    notify.send(ends[0], {"FDSTORE": "1"}, pipe)
    received = notify.receive(ends[1])
    assert received is not None
    fields, fds, user = received
    assert (fields, user) == ({"FDSTORE": "1"}, os.getuid())
    assert [os.path.sameopenfile(*both) for both in zip(fds, pipe, strict=True)] == [True, True]
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)


def test_a_datagram_that_was_cut_says_nothing_and_what_came_with_it_can_be_closed(
    ends: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    raw = b"STOPPING=1\n" + b"x" * notify.DATAGRAM_MAX
    rights = array.array("i", pipe)
    ends[0].sendmsg([raw], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    received = notify.receive(ends[1])
    assert received is not None
    assert (received[0], len(received[1])) == ({}, 2)
    for fd in received[1]:
        os.close(fd)


def test_the_end_of_a_connection_is_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].close()
    assert notify.receive(ends[1]) is None


def test_all_names_of_a_full_store_fit_into_one_variable() -> None:
    names = ":".join([notify.name_of("x" * 32)] * notify.STORE_MAX)
    assert len(f"LISTEN_FDNAMES=keeper:{names}") < 128 << 10


def test_what_is_inherited_is_known_by_name_and_passed_on_to_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = 900  # far from what others may have open
    folder = os.open(tmp_path, os.O_RDONLY)
    fds = [os.dup2(folder, first + number) for number in range(3)]
    os.close(folder)
    monkeypatch.setenv("LISTEN_FDS", "3")
    monkeypatch.setenv("LISTEN_FDNAMES", "a:b")
    assert notify.inherited(first) == {"a": [first], "b": [first + 1], "unknown": [first + 2]}
    assert not any(os.get_inheritable(fd) for fd in fds)
    assert not any(name.startswith("LISTEN_") for name in os.environ)
    for fd in fds:
        os.close(fd)


def test_what_is_meant_for_another_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert notify.inherited(1) == {}


def test_without_a_keeper_nothing_is_told_and_nobody_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(notify.ADDRESS, raising=False)
    assert not notify.Notifier().tell({"READY": "1"})
    monkeypatch.setenv(notify.ADDRESS, str(tmp_path / "nobody"))
    notifier = notify.Notifier()
    assert not notifier.store("mark", [0])
    closed(notifier)


def test_whoever_listens_anew_takes_the_place_of_a_stale_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(notify.ADDRESS, str(tmp_path / "keeper"))
    notifier = notify.Notifier()
    for _ in range(2):
        with notify.listen(tmp_path / "keeper") as listener:
            assert (tmp_path / "keeper").stat().st_mode & 0o777 == 0o600
            assert notifier.tell({"READY": "1"})
            assert notify.receive(listener) == ({"READY": "1"}, [], os.getuid())
    closed(notifier)
