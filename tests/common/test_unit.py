"""How a client has a unit started, and what it makes of systemd's answers; systemctl is played by a script."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from outlive.common.unit import Unit, system_unit, user_unit

Answers = Callable[[str], None]


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Lets the only program there is answer so: the script sees the words of systemctl."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def answer(script: str) -> None:
        program = tmp_path / "systemctl"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return answer


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    return user_unit({"XDG_CONFIG_HOME": str(tmp_path)})


def test_a_started_unit_is_nothing_to_tell(systemctl: Answers, unit: Unit) -> None:
    systemctl('[ "$*" = "--user --no-ask-password start outlive.service" ]')
    assert unit.start(30) == ""


def test_a_failed_try_is_nothing_to_tell_while_systemd_goes_on_trying(systemctl: Answers, unit: Unit) -> None:
    systemctl('[ "$3" = is-active ] && echo activating; echo no >&2; exit 1')
    assert unit.start(30) == ""


def test_what_systemd_says_of_a_unit_that_it_cannot_start_is_told_on_one_line(
    systemctl: Answers, unit: Unit
) -> None:
    systemctl('[ "$3" = is-active ] && echo failed; printf "Job failed.\\nSee status.\\n" >&2; exit 1')
    assert unit.start(30) == "Job failed. See status."


def test_somebody_without_the_right_to_start_a_system_unit_waits(
    systemctl: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemctl('[ "$3" = is-active ] && echo inactive; echo Access denied >&2; exit 4')
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert system_unit(1000).start(30) == ""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert system_unit(1000).start(30) == "Access denied"


def test_a_machine_without_systemctl_is_told(unit: Unit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unit.start(30) == "there is no systemctl"
