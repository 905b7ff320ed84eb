"""Where things live, and what may become the name of a file."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outlive.common import paths as module
from outlive.common.errors import BadRequest
from outlive.common.names import SocketPath, check_process, check_thread
from outlive.common.paths import Paths, private_folder

from .conftest import in_a_child

BAD_NAMES = ["", ".", "..", "../x", "a/b", "/", "a\0b", "a\n", "-a", "_a", ".a", "ä", "a b", "a" * 65, "x" * 10_000]


# Names.


@pytest.mark.parametrize("name", ["a", "0", "build", "A.b_c-9", "a" * 64, "a..b"])
def test_a_plain_name_is_a_threads(name: str) -> None:
    assert check_thread(name) == name


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name[:10]))
def test_any_other_name_is_refused_with_a_clear_and_short_error(name: str) -> None:
    with pytest.raises(BadRequest, match="1 to 64 characters") as caught:
        check_thread(name)
    assert len(str(caught.value)) < 300
    assert "\0" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("process_id", ["1", "1000", "99999", "100000", "9999999999"])
def test_a_number_is_a_process_id(process_id: str) -> None:
    assert check_process(process_id) == process_id


@pytest.mark.parametrize("process_id", [*BAD_NAMES, "0", "007", "-1", "1.0", "١٢٣", "1" * 11, "9" * 10_000, "12\n"])
def test_anything_else_is_no_process_id(process_id: str) -> None:
    with pytest.raises(BadRequest, match="a process id is a number") as caught:
        check_process(process_id)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=70))
@example("con")
def test_a_name_that_is_accepted_is_one_part_of_a_path(name: str) -> None:
    try:
        check_thread(name)
    except BadRequest:
        return
    assert (Path("/x") / name).parts == ("/", "x", name)
    assert len(os.fsencode(name)) <= 64


# Places.


def test_outlive_home_holds_everything() -> None:
    paths = Paths.from_environment({"OUTLIVE_HOME": "/h", "XDG_RUNTIME_DIR": "/r", "HOME": "/u"})
    assert (paths.run, paths.state, paths.config) == (Path("/h/run"), Path("/h/state"), Path("/h/config.toml"))
    folders = (paths.lock, paths.control, paths.events, paths.channel, paths.workers)
    assert all(path.parent == paths.run for path in folders)
    assert all(path.parent == paths.state for path in (paths.log, paths.journal))


def test_a_relative_home_does_not_move_with_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Paths.from_environment({"OUTLIVE_HOME": "here"}).run == tmp_path / "here/run"


def test_without_it_the_users_folders_are_taken() -> None:
    paths = Paths.from_environment(
        {"XDG_RUNTIME_DIR": "/r", "XDG_STATE_HOME": "/s", "XDG_CONFIG_HOME": "/c", "HOME": "/u"}
    )
    assert (paths.run, paths.state) == (Path("/r/outlive"), Path("/s/outlive"))
    assert paths.config == Path("/c/outlive/config.toml")
    paths = Paths.from_environment(
        {"XDG_RUNTIME_DIR": "/r", "XDG_STATE_HOME": "s", "XDG_CONFIG_HOME": "c", "HOME": "/u", "OUTLIVE_HOME": ""}
    )
    assert paths.state == Path("/u/.local/state/outlive")
    assert paths.config == Path("/u/.config/outlive/config.toml")


def test_without_a_runtime_folder_it_is_one_that_is_ours() -> None:
    run = Paths.from_environment({"HOME": "/u"}).run
    assert run in (Path(f"/run/user/{os.getuid()}/outlive"), Path("/u/.local/state/outlive/run"))
    if run.parent.parent == Path("/run/user"):
        assert run.parent.stat().st_uid == os.getuid()


# Folders.


def test_every_folder_is_made_private(tmp_path: Path) -> None:
    paths = Paths.from_environment({"OUTLIVE_HOME": str(tmp_path / "home")})
    paths.prepare()
    paths.prepare()
    for folder in (paths.run, paths.state, paths.workers):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_others_could_enter_is_closed_to_them_if_it_is_empty_and_else_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    (folder / "file").touch()
    with pytest.raises(BadRequest, match=r"open to others \(mode 0755\) and not empty; `chmod 700`"):
        private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_link_is_refused_and_what_it_leads_to_left_as_it_is(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "run"
    target.mkdir()
    target.chmod(0o755)
    link.symlink_to(target)
    with pytest.raises(BadRequest, match="is a symbolic link"):
        private_folder(link)
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_a_state_folder_that_cannot_be_made_keeps_nobody_from_working(tmp_path: Path) -> None:
    paths = Paths.from_environment({"OUTLIVE_HOME": str(tmp_path)})
    paths.state.touch()
    paths.prepare()
    assert paths.workers.is_dir()
    log = paths.open_log()
    assert os.readlink(f"/proc/self/fd/{log}") == os.devnull
    os.close(log)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    with pytest.raises(BadRequest, match="belongs to user 65534, not to you"):
        private_folder(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    paths = Paths.from_environment({"OUTLIVE_HOME": os.fsdecode(os.fsencode(tmp_path) + b"/\xff")})
    with pytest.raises(
        BadRequest, match=r"folder b'.*/\\xff/run': its name is not UTF-8, or the locale is not; set"
    ):
        paths.prepare()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_with_a_hint() -> None:
    def act() -> None:
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(BadRequest, match="Permission denied; set OUTLIVE_HOME"):
            private_folder(Path("/etc/outlive"))

    in_a_child(act)


@pytest.mark.parametrize("name", ["file", "x" * 10_000, "/".join(["x"] * 5_000)], ids=["file", "long", "deep"])
def test_what_cannot_be_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadRequest, match="folder "):
        private_folder(tmp_path / name)


# Sockets.


@pytest.mark.parametrize("length", [107, 108, 1000])
def test_a_socket_is_bound_whatever_the_length_of_its_path(tmp_path: Path, length: int, no_leak: None) -> None:
    room = length - len(str(tmp_path)) - len("/s")
    folder = tmp_path
    while room > 0:
        part = min(room, 101)
        if room - part == 1:
            part -= 1
        folder /= "x" * (part - 1)
        room -= part
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "s"
    assert len(str(path)) == length
    listener = socket.socket(socket.AF_UNIX)
    with SocketPath(path) as address:
        assert len(address) <= 107
        listener.bind(address)
    assert path.is_socket()
    listener.close()


def test_a_socket_path_is_closed_once(tmp_path: Path, no_leak: None) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    path = SocketPath(folder / "s")
    path.close()
    path.close()


def test_a_log_that_has_grown_large_is_kept_and_another_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_MAX", 10)
    paths = Paths.from_environment({"OUTLIVE_HOME": str(tmp_path)})
    paths.prepare()
    for text in (b"eleven bytes", b"more", b" of it"):
        log = paths.open_log()
        os.write(log, text)
        os.close(log)
    assert paths.log.read_bytes() == b"more of it"
    assert Path(f"{paths.log}.1").read_bytes() == b"eleven bytes"
    assert stat.S_IMODE(paths.log.stat().st_mode) == 0o600
