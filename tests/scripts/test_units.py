"""The text of a systemd unit: what must be in it, what depends on the machine; no value becomes a setting."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.broker.keeper import NEEDED
from outlive.common.errors import BadRequest
from outlive.common.paths import Paths
from outlive.common.unit import SERVES, installed, user_unit
from outlive.scripts.installation import KEEPER, Caller, install
from outlive.scripts.units import Service, render

RUN = Path("/tmp/h/run")


def settings(text: str) -> dict[tuple[str, str], list[str]]:
    """Return a unit's values by section and key, in their order."""
    found: dict[tuple[str, str], list[str]] = {}
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line[1:-1]
        elif line:
            key, _, value = line.partition("=")
            found.setdefault((section, key), []).append(value)
    return found


def test_what_keeps_processes_alive_is_in_every_unit() -> None:
    for uid in (None, 1000):
        found = settings(render(Service(["/bin/true"], RUN, uid=uid)))
        for key, value in {
            "Type": "notify",
            "NotifyAccess": "main",
            "FileDescriptorStoreMax": "10000",
            "KillMode": "process",
            "OOMPolicy": "continue",
            "Restart": "always",
            "RestartPreventExitStatus": "0",
            "SuccessExitStatus": str(NEEDED),
            "TasksMax": "infinity",
            "Delegate": "yes",
            "LimitNOFILE": "1024:infinity",
        }.items():
            assert found["Service", key] == [value]
        assert found["Unit", "StartLimitIntervalSec"] == ["0"]
        assert not [key for _, key in found if "Watchdog" in key]


def test_the_store_outlives_a_stop_only_where_systemd_can_do_that() -> None:
    for version, there in ((252, False), (253, False), (254, True), (257, True)):
        found = settings(render(Service(["/bin/true"], RUN, systemd=version)))
        assert (("Service", "FileDescriptorStorePreserve") in found) == there


def test_a_system_unit_runs_as_its_user_with_that_users_runtime_folder() -> None:
    found = settings(render(Service(["/bin/true"], Path("/run/user/1000/outlive"), uid=1000)))
    assert found["Service", "User"] == ["1000"]
    assert found["Install", "WantedBy"] == ["multi-user.target"]
    assert found["Unit", "Wants"] == found["Unit", "After"] == ["user-runtime-dir@1000.service"]
    assert ("Unit", "Wants") not in settings(render(Service(["/bin/true"], RUN, uid=1000)))


def test_a_user_unit_names_no_user_and_starts_with_the_users_manager() -> None:
    found = settings(render(Service(["/bin/true"], RUN)))
    assert ("Service", "User") not in found
    assert found["Install", "WantedBy"] == ["default.target"]


@given(st.text(st.characters(codec="utf-8")))
def test_any_value_is_one_word_of_one_line_or_refused(value: str) -> None:
    try:
        text = render(Service(["/bin/x", value], RUN, {"NAME": value}))
    except BadRequest:
        assert not value.isprintable()
        return
    found = settings(text)
    assert len(text.splitlines()) == len(render(Service(["/bin/x"], RUN, {"NAME": ""})).splitlines())
    (environment,), (command,) = found["Service", "Environment"], found["Service", "ExecStart"]
    assert shlex.split(environment.replace("%%", "%")) == [f"NAME={value}"]
    assert shlex.split(command.replace("%%", "%").replace("$$", "$")) == ["/bin/x", value]


def test_a_folder_that_fits_on_no_line_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match=r"a\\nb"):
        render(Service(["/bin/true"], Path("/tmp/a\nb/run")))


def test_the_environment_that_places_the_folders_is_in_the_unit_and_nothing_else(tmp_path: Path) -> None:
    environment = {"OUTLIVE_HOME": str(tmp_path), "HOME": "/home/x", "XDG_STATE_HOME": "/x", "SECRET": "1"}
    for system in (True, False):
        found = settings(Caller.of(environment, system=system).text(system=system, systemd=252))
        assert f'"OUTLIVE_HOME={tmp_path}"' in found["Service", "Environment"]
        assert '"OUTLIVE_ROLE=broker.keeper"' in found["Service", "Environment"]
        assert len(found["Service", "Environment"]) == (3 if system else 2)
        assert found["Service", "ExecStart"][0].endswith(f'"-P" "-m" "{KEEPER}"')
    del environment["OUTLIVE_HOME"]
    found = settings(Caller.of(environment, system=False).text(system=False, systemd=252))
    assert '"XDG_STATE_HOME=/x"' in found["Service", "Environment"]


def test_a_unit_is_found_by_the_broker_it_serves_and_by_no_other(tmp_path: Path) -> None:
    environment = {"OUTLIVE_HOME": str(tmp_path / "one"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    unit = user_unit(environment)
    paths = Paths.from_environment(environment)
    assert installed(paths.run, environment) is None
    unit.path.parent.mkdir(parents=True)
    unit.path.write_text(Caller.of(environment, system=False).text(system=False, systemd=252))
    assert installed(paths.run, environment) == unit
    assert installed(tmp_path / "two/run", environment) is None
    unit.path.write_text(f"[Service]\nExecStart=/bin/true # {SERVES}\n")
    assert installed(paths.run, environment) is None


def test_a_system_unit_needs_root_and_the_refusal_says_how_to_be_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("OUTLIVE_HOME", str(tmp_path))
    with pytest.raises(
        BadRequest, match=f"sudo OUTLIVE_HOME={tmp_path} .* broker install --system`, or use --user"
    ):
        install(system=True, say=print)


def test_under_sudo_a_system_unit_is_for_the_user_who_called_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    environment = {"SUDO_UID": str(os.getuid()), "HOME": "/somebody", "XDG_STATE_HOME": "/somebody/state"}
    caller = Caller.of(environment, system=True)
    assert (caller.uid, caller.environment["HOME"]) == (os.getuid(), os.path.expanduser("~"))
    assert "XDG_STATE_HOME" not in caller.environment
    assert Caller.of(environment, system=False).environment["HOME"] == "/somebody"
