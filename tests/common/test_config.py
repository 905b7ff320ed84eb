"""The configuration file: missing is fine, wrong is an error that names the field."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outlive.common.config import Config, load
from outlive.common.errors import BadRequest


def test_a_missing_file_means_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "config.toml") == Config()
    (tmp_path / "file").touch()
    assert load(tmp_path / "file" / "config.toml") == Config()
    assert (Config().max_processes, Config().warn_at, Config().when_full) == (64, 60, "prune")
    assert (Config().ended_keep_hours, Config().ended_keep_count) == (24, 1000)


def test_what_the_file_says_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('max_processes = 3\nwhen_full = "refuse"\nended_keep_hours = 1\nseed = 7\npump = "copied"\n')
    assert load(path) == Config(max_processes=3, when_full="refuse", ended_keep_hours=1.0, seed=7, pump="copied")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max_processes = 0", "max_processes is 0; expected `int` >= 1"),
        ('max_processes = "64"', "max_processes is '64'; expected `int`, got `str`"),
        ('when_full = "explode"', "when_full is 'explode'; invalid enum value"),
        ("ended_keep_hours = nan", "ended_keep_hours is nan; expected `float` >= 0"),
        ("max_proceses = 3", "unknown field `max_proceses`; there are max_processes, warn_at"),
        ("max_processes = ", "Invalid value"),
        ("x = " + "[" * 5000, "recursion|nest"),
        ("max_processes = " + "9" * 5000, "4300 digits"),
        ('"" = 1', "unknown field ``; there are max_processes"),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_field(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(BadRequest, match=complaint) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadRequest, match="utf-8"):
        load(path)
    with pytest.raises(BadRequest, match="it is no file"):
        load(tmp_path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(BadRequest, match="it is no file"):
            load(path)


@pytest.mark.parametrize("text", ["ended_keep_hours = inf", "ended_keep_hours = 1e300", "idle_sleep_s = nan"])
def test_a_time_has_an_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(BadRequest, match=text.split()[0]):
        load(tmp_path / "config.toml")
