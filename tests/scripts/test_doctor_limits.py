"""How many processes fit, from made-up facts; and the facts of this machine."""

from __future__ import annotations

import os
import resource
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.broker import loop
from outlive.common.config import Config
from outlive.scripts.doctor import limits
from outlive.scripts.doctor.limits import Facts, fitting
from outlive.worker import spawner

FREE = resource.RLIM_INFINITY
ROOMY = Facts(
    whose="the broker (pid 1)",
    privileged=False,
    files=(1024, 524288),
    file_size=(FREE, FREE),
    processes=(60000, 60000),
    tasks=100,
    settings={
        "pipe-user-pages-soft": "16384",
        "pipe-user-pages-hard": "0",
        "pipe-max-size": "1048576",
        "file-nr": "500\t0\t9223372036854775807",
        "pty-max": "4096",
        "pty-nr": "3",
        "memfd_noexec": "0",
        "shmem_enabled": "always within_size advise [never] deny force",
        "max_dgram_qlen": "512",
        "meminfo": "MemTotal:       16 kB\nSwapTotal:       2097148 kB\n",
    },
)


def setting(name: str, value: str, *, privileged: bool = False) -> Facts:
    return replace(ROOMY, settings={**ROOMY.settings, name: value}, privileged=privileged)


def test_a_roomy_machine_has_nothing_to_complain_about() -> None:
    assert [found for found in limits.examine(ROOMY) if found.severity != "ok"] == []


def test_settings_that_the_kernel_does_not_have_are_no_complaint() -> None:
    found = list(limits.examine(replace(ROOMY, settings={})))
    assert {finding.severity for finding in found} == {"ok"}


def test_numbers_that_belong_to_others_are_theirs() -> None:
    assert limits.RESERVE == loop.RESERVE
    assert limits._CONDUIT_SIZE == spawner.CONDUIT_SIZE


@pytest.mark.parametrize(
    ("hard", "count"),
    [(0, 0), (128, 0), (139, 0), (140, 1), (1024, 74), (20_000, 1656), (524_288, 1666), (FREE, 1666)],
)
def test_a_process_takes_six_descriptors_of_what_reserve_and_store_leave(hard: int, count: int) -> None:
    assert fitting(hard) == count


@given(st.integers(0, 1 << 40), st.integers(0, 1000))
def test_more_descriptors_never_make_it_worse(hard: int, more: int) -> None:
    order = ["error", "warning", "note", "ok"]
    first, second = (
        limits.check_files(replace(ROOMY, files=(0, number))).severity for number in (hard, hard + more)
    )
    assert order.index(first) <= order.index(second)


def test_few_descriptors_are_a_warning_and_none_an_error() -> None:
    assert limits.check_files(replace(ROOMY, files=(256, 1024))).severity == "warning"
    assert limits.check_files(replace(ROOMY, files=(64, 64))).severity == "error"
    assert "the broker (pid 1)" in limits.check_files(replace(ROOMY, files=(256, 1024))).found


def test_a_machine_without_files_left_is_a_warning() -> None:
    assert limits.check_all_files(setting("file-nr", "950 0 1000")).severity == "warning"
    assert limits.check_all_files(setting("file-nr", "nonsense")).severity == "ok"


def test_a_limit_on_file_sizes_stops_a_transcript_sooner_or_later() -> None:
    assert limits.check_file_size(replace(ROOMY, file_size=(100, FREE))).severity == "ok"
    assert limits.check_file_size(replace(ROOMY, file_size=(0, 1 << 30))).severity == "warning"
    assert limits.check_file_size(replace(ROOMY, file_size=(0, 4096))).severity == "error"


@pytest.mark.parametrize(
    ("used", "limit", "severity"), [(10, 1000, "ok"), (980, 1000, "warning"), (1000, 1000, "error")]
)
def test_tasks_are_counted_against_the_user_s_and_the_cgroup_s_limit(used: int, limit: int, severity: str) -> None:
    assert limits.check_tasks(replace(ROOMY, tasks=used, processes=(limit, limit))).severity == severity
    assert limits.check_pids(replace(ROOMY, pids=(used, limit))).severity == severity


def test_limits_that_do_not_bind_root_do_not_alarm_root() -> None:
    root = replace(ROOMY, privileged=True, tasks=1000, processes=(10, 10))
    assert limits.check_tasks(root).severity == "ok"
    assert limits.check_pipe_pages(setting("pipe-user-pages-hard", "20", privileged=True)).severity == "ok"


def test_pages_of_pipes_slow_down_when_soft_and_stop_when_hard() -> None:
    assert limits.check_pipe_pages(setting("pipe-user-pages-soft", "0")).severity == "ok"
    assert limits.check_pipe_pages(setting("pipe-user-pages-soft", "200")).severity == "warning"
    assert limits.check_pipe_pages(setting("pipe-user-pages-hard", "200")).severity == "warning"
    assert limits.check_pipe_pages(setting("pipe-user-pages-hard", "3")).severity == "error"
    assert limits.check_pipe_size(setting("pipe-max-size", "4096")).severity == "note"


def test_terminals_and_the_keepers_queue_can_be_short() -> None:
    assert limits.check_terminals(setting("pty-nr", "4090")).severity == "warning"
    assert limits.check_terminals(setting("pty-nr", "4096")).severity == "error"
    assert limits.check_queue(setting("max_dgram_qlen", "10")).severity == "note"


def test_huge_pages_for_memory_files_are_a_warning() -> None:
    assert limits.check_huge_pages(setting("shmem_enabled", "[always] never")).severity == "warning"
    assert limits.check_huge_pages(setting("shmem_enabled", "always [advise]")).severity == "ok"


@pytest.mark.parametrize("value", ["0", "1", "2", "7"])
def test_memory_files_that_must_not_be_executable_do_not_matter(value: str) -> None:
    assert limits.check_noexec(setting("memfd_noexec", value)).severity == "ok"


def test_a_small_cgroup_holds_few_transcripts_and_swap_is_named() -> None:
    assert limits.check_memory(replace(ROOMY, memory=64 << 20)).severity == "warning"
    assert limits.check_memory(replace(ROOMY, memory=4 << 30)).severity == "ok"
    without = replace(setting("meminfo", "SwapTotal: 0 kB"), memory=64 << 20)
    assert "no swap" in limits.check_memory(without).meaning


@given(st.dictionaries(st.sampled_from(sorted(limits._SETTINGS)), st.text()))
def test_whatever_a_setting_says_is_survived(settings: dict[str, str]) -> None:
    assert len(list(limits.examine(replace(ROOMY, settings=settings)))) == 12


def test_both_versions_of_cgroups_are_understood() -> None:
    text = "9:name=systemd:/user.slice\n3:cpu,cpuacct:/a:b\n0::/user.slice/x.scope (deleted)\nnonsense\n"
    assert limits.cgroups(text) == {
        "systemd": "/user.slice",
        "cpu": "/a:b",
        "cpuacct": "/a:b",
        "": "/user.slice/x.scope",
    }


@given(st.text())
def test_any_text_of_cgroups_is_survived(text: str) -> None:
    limits.cgroups(text)


def test_the_facts_of_this_machine_are_found_for_ourselves_and_for_a_process() -> None:
    ours = limits.probe(None, 5, Config())
    assert ours.whose == "this shell"
    assert ours.files[1] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert "max_dgram_qlen" in ours.settings
    parents = limits.probe(os.getppid(), 5, Config())
    assert parents.whose == f"the broker (pid {os.getppid()})"
    assert list(limits.examine(parents))


def test_a_process_that_has_gone_is_not_asked_for_its_limits() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert limits.probe(pid, 5, Config()).whose == "this shell"
