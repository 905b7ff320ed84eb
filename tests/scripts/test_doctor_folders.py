"""Folders that will do and folders that will not, made up and real."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common.paths import Paths
from outlive.scripts.doctor import folders
from outlive.scripts.doctor.folders import Facts, check_folder, look

GOOD = Facts(Path("/home/me/run"), owner=1000, user=1000, free=1 << 30, free_files=10_000, kind="ext4")


def test_a_folder_of_ours_alone_will_do() -> None:
    assert check_folder("f", GOOD).severity == "ok"


@pytest.mark.parametrize(
    ("wrong", "severity", "word"),
    [
        ({"owner": 0}, "error", "belongs to user 0"),
        ({"is_folder": False}, "error", "not a folder"),
        ({"writable": False}, "error", "not writable"),
        ({"read_only": True}, "error", "read-only"),
        ({"trouble": "Permission denied"}, "error", "Permission denied"),
        ({"links": (Path("/tmp/link"),)}, "error", "/tmp/link"),
        ({"free": 4096}, "error", "full"),
        ({"free": 8 << 20}, "warning", "nearly full"),
        ({"free_files": 3}, "warning", "inodes"),
        ({"kind": "nfs4"}, "warning", "nfs4"),
        ({"mode": 0o755}, "warning", "others may look"),
        ({"exists": False, "parent": (Path("/home"), False)}, "error", "cannot be made"),
        ({"exists": False, "parent": (Path("/home/me"), True)}, "ok", "does not exist yet"),
        ({"free": None, "free_files": None}, "ok", "yours"),
        ({"path": Path(os.fsdecode(b"/home/\xff"))}, "error", "not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told(wrong: dict[str, object], severity: str, word: str) -> None:
    found = check_folder("f", replace(GOOD, **wrong))  # type: ignore[arg-type]
    assert (found.severity, word in found.meaning) == (severity, True), found
    assert bool(found.advice) == (severity != "ok")


@given(st.builds(Facts, st.just(Path("/x")), mode=st.integers(0, 0o7777), owner=st.integers(0, 2), user=st.just(1)))
def test_a_folder_that_others_may_enter_or_own_is_never_ok(facts: Facts) -> None:
    closed = facts.owner == facts.user and not facts.mode & 0o077
    if not facts.exists or facts.trouble or facts.links:
        return
    assert (check_folder("f", facts).severity == "ok") <= closed


def test_a_configuration_that_others_can_change_is_a_warning() -> None:
    path = GOOD.path
    assert folders.check_configuration(path, "", replace(GOOD, mode=0o644)).severity == "ok"
    assert folders.check_configuration(path, "", replace(GOOD, mode=0o664)).severity == "warning"
    assert folders.check_configuration(path, "", replace(GOOD, owner=7, mode=0o644)).severity == "warning"
    assert folders.check_configuration(path, "field x", replace(GOOD, exists=False)).severity == "error"
    assert folders.check_configuration_folder(replace(GOOD, mode=0o777)).severity == "warning"
    assert folders.check_configuration_folder(replace(GOOD, mode=0o1777, owner=0)).severity == "ok"
    assert folders.check_configuration_folder(replace(GOOD, owner=7)).severity == "warning"


def test_a_path_that_is_too_long_for_a_socket_is_a_note() -> None:
    assert folders.check_path(Path("/" + "x" * 107)).severity == "note"
    assert folders.check_path(Path("/" + "x" * 106)).severity == "ok"


def test_mounts_are_found_by_the_longest_path_and_names_with_blanks_too(tmp_path: Path) -> None:
    text = (
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "23 22 0:30 / /tmp rw shared:5 - tmpfs tmpfs rw\n"
        "24 22 0:31 / /a\\040b rw - nfs4 server:/ rw\n"
        "nonsense\n"
    )
    mounts = folders.parse_mounts(text)
    assert mounts == {"/": "ext4", "/tmp": "tmpfs", "/a b": "nfs4"}
    assert folders.kind_of(Path("/a b/c"), mounts) == "nfs4"
    assert folders.kind_of(Path("/a"), mounts) == "ext4"
    assert folders.kind_of(Path("/a"), {}) == ""


@given(st.text())
def test_any_text_of_mounts_is_survived(text: str) -> None:
    folders.parse_mounts(text)


def test_real_folders_are_looked_at_as_they_are(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert check_folder("f", look(tmp_path, {})).severity in ("ok", "warning")  # the disk may be full
    assert look(tmp_path, {}).owner == os.getuid()
    missing = look(tmp_path / "a" / "b", {})
    assert (missing.exists, missing.parent) == (False, (tmp_path, True))
    assert not (tmp_path / "a").exists()
    made_up = look(tmp_path / "a", {str(tmp_path): "proc"})
    assert "cannot be made" in check_folder("f", made_up).meaning
    (tmp_path / "file").write_text("")
    assert check_folder("f", look(tmp_path / "file", {})).severity == "error"
    assert check_folder("f", look(tmp_path / "file" / "under", {})).severity == "error"
    os.symlink("nowhere", tmp_path / "link")
    assert check_folder("f", look(tmp_path / "link", {})).severity == "error"
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "not writable" in check_folder("f", look(tmp_path / "closed", {})).meaning
    os.symlink("link", tmp_path / "link2")
    os.symlink("loop", tmp_path / "loop")
    assert check_folder("f", look(tmp_path / "loop", {})).severity == "error"


def test_a_link_of_our_own_on_the_way_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    os.symlink("real", tmp_path / "link")
    assert look(tmp_path / "link", {}).links == ()


def test_a_broken_configuration_is_named_with_its_field(tmp_path: Path) -> None:
    paths = Paths.from_environment({"OUTLIVE_HOME": str(tmp_path)})
    paths.config.write_text("max_processes = 'many'\n")
    found = {finding.check: finding for finding in folders.probe(paths)}
    assert found["configuration"].severity == "error"
    assert "max_processes" in found["configuration"].found
    assert list(tmp_path.iterdir()) == [paths.config]
