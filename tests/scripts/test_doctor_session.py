"""Whether a logout takes the broker along, from made-up logins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common.paths import Paths
from outlive.scripts.doctor import session
from outlive.scripts.doctor.session import Facts, Logind, parse_logind, place_of

LOGIN = "/user.slice/user-1000.slice/session-3.scope"
MANAGER = "/user.slice/user-1000.slice/user@1000.service"
AT_HOME = Facts(
    user="me",
    cgroup=LOGIN,
    whose="the broker (pid 1)",
    booted=True,
    linger=False,
    runtime=True,
    logind=Logind(),
)


@pytest.mark.parametrize(
    ("cgroup", "place"),
    [
        (LOGIN, "login"),
        ("/user.slice/user-1000.slice/session-c1.scope", "login"),
        (f"{MANAGER}/app.slice/outlive.service", "user manager"),
        (f"{MANAGER}/app.slice/app-gnome-terminal-7.scope", "user manager"),
        ("/system.slice/ssh.service", "service"),
        ("/system.slice/outlive@me.service", "service"),
        ("/docker/0123abcd", "container"),
        ("/system.slice/docker-0123.scope", "container"),
        ("/kubepods.slice/kubepods-burstable.slice/cri-containerd-1.scope", "container"),
        ("/", "machine"),
        ("/init.scope", "machine"),
        ("", "machine"),
    ],
)
def test_what_a_cgroup_depends_on_is_read_from_its_path(cgroup: str, place: str) -> None:
    assert place_of(cgroup) == place


@pytest.mark.parametrize(
    ("facts", "severity"),
    [
        (AT_HOME, "ok"),
        (replace(AT_HOME, logind=Logind(kill=True)), "warning"),
        (replace(AT_HOME, logind=Logind(kill=True), linger=True), "warning"),
        (replace(AT_HOME, logind=Logind(kill=True), user="root"), "ok"),
        (replace(AT_HOME, logind=Logind(kill=True, only=("you",))), "ok"),
        (replace(AT_HOME, cgroup=f"{MANAGER}/app.slice/app-x.scope"), "warning"),
        (replace(AT_HOME, cgroup=f"{MANAGER}/app.slice/outlive.service"), "warning"),
        (replace(AT_HOME, cgroup=f"{MANAGER}/app.slice/outlive.service", linger=True), "ok"),
        (replace(AT_HOME, cgroup="/system.slice/cron.service"), "warning"),
        (replace(AT_HOME, cgroup="/system.slice/outlive@me.service"), "ok"),
        (replace(AT_HOME, cgroup="/docker/0123"), "note"),
        (replace(AT_HOME, cgroup=""), "note"),
        (replace(AT_HOME, cgroup="/", contained=True), "note"),
        (replace(AT_HOME, contained=True, logind=Logind(kill=True)), "warning"),
        (replace(AT_HOME, cgroup="/", booted=False), "ok"),
    ],
)
def test_a_cgroup_that_ends_with_the_login_is_a_warning(facts: Facts, severity: str) -> None:
    found = session.check_cgroup(facts)
    assert found.severity == severity, found
    assert bool(found.advice) == (severity == "warning")


def test_lingering_matters_for_sockets_in_the_login_s_folder() -> None:
    assert session.check_linger(AT_HOME).severity == "warning"
    assert session.check_linger(replace(AT_HOME, linger=True)).severity == "ok"
    assert session.check_linger(replace(AT_HOME, runtime=False)).severity == "ok"
    assert session.check_linger(replace(AT_HOME, linger=None)).severity == "note"
    assert session.check_linger(replace(AT_HOME, booted=False, linger=None)).severity == "ok"


def test_killing_is_told_for_this_user() -> None:
    assert session.check_killing(AT_HOME).severity == "ok"
    assert session.check_killing(replace(AT_HOME, logind=Logind(kill=True))).severity == "note"
    assert session.check_killing(replace(AT_HOME, booted=False)).severity == "ok"


def test_logind_s_built_in_default_stands_in_its_file_as_a_comment() -> None:
    assert not parse_logind("[Login]\n#KillUserProcesses=no\n", []).kill
    assert parse_logind("[Login]\n#KillUserProcesses=yes\n", []).kill
    assert not parse_logind("[Login]\n#KillUserProcesses=yes\nKillUserProcesses=off\n", []).kill


def test_later_drop_ins_win_and_other_sections_do_not_count() -> None:
    found = parse_logind(
        "[Login]\nKillUserProcesses=yes\nKillExcludeUsers=root me\n",
        ["[Other]\nKillUserProcesses=no\n", "[Login]\nKillOnlyUsers = a b\n; KillUserProcesses=no\n"],
    )
    assert found == Logind(True, ("a", "b"), ("root", "me"))
    assert not parse_logind("[Login]\nKillUserProcesses=yes\n", ["[Login]\nKillUserProcesses=no"]).kill


def test_a_drop_in_hides_one_of_the_same_name_in_a_lesser_folder(tmp_path: Path) -> None:
    for folder, value in (("etc", "no"), ("usr", "yes")):
        (tmp_path / folder / "logind.conf.d").mkdir(parents=True)
        (tmp_path / folder / "logind.conf.d" / "50-x.conf").write_text(f"[Login]\nKillUserProcesses={value}\n")
    (tmp_path / "usr" / "logind.conf").write_text("[Login]\nKillOnlyUsers=me\n")
    found = session.read_logind([str(tmp_path / "etc"), str(tmp_path / "usr")])
    assert found == Logind(False, ("me",), ("root",))
    (tmp_path / "usr" / "logind.conf.d" / "60-y.conf").write_text("[Login]\nKillUserProcesses=yes\n")
    assert session.read_logind([str(tmp_path / "etc"), str(tmp_path / "usr")]).kill


@given(st.text(), st.lists(st.text()))
def test_any_configuration_of_logind_is_survived(main: str, drop_ins: list[str]) -> None:
    parse_logind(main, drop_ins)


@given(st.text())
def test_any_cgroup_has_its_place(cgroup: str) -> None:
    assert place_of(cgroup) in ("login", "user manager", "service", "container", "machine")


def test_the_facts_of_this_machine_are_found(tmp_path: Path) -> None:
    facts = session.probe(Paths.from_environment({"OUTLIVE_HOME": str(tmp_path)}), None)
    assert facts.user
    assert "this shell" in facts.whose
    assert not facts.runtime
    assert len(list(session.examine(facts))) == 3
