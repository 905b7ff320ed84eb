"""The thread of a project folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlive.common.names import check_thread
from outlive.scripts.doors.project import thread_of_folder


@pytest.mark.parametrize(
    ("folder", "readable"),
    [
        ("/src/app", "app"),
        ("/src/My App (2)", "My-App-2-"),
        ("/src/.config", "config"),
        ("/", "project"),
        ("/src/日本", "project"),
        ("/src/" + "x" * 200, "x" * 40),
        ("/src/\udcff", "project"),
    ],
)
def test_a_folder_has_a_thread_whose_name_says_which_it_is(folder: str, readable: str) -> None:
    name = thread_of_folder(folder)
    assert check_thread(name).rpartition("-")[0] == readable


def test_two_folders_of_one_name_have_two_threads() -> None:
    assert thread_of_folder("/one/app") != thread_of_folder("/two/app")


def test_two_ways_to_a_folder_lead_to_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "link").symlink_to("app")
    monkeypatch.chdir(tmp_path)
    assert thread_of_folder("link") == thread_of_folder("app") == thread_of_folder(tmp_path / "app")
