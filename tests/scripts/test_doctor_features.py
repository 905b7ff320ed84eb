"""What the kernel can is tried for real, and what a trial's end means."""

from __future__ import annotations

import errno
import os
import pty

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common import kernel
from outlive.scripts.doctor import features
from outlive.scripts.doctor.features import FEATURES, Trial, attempt, check_feature, check_system


@pytest.mark.parametrize(
    ("release", "severity"),
    [
        ("6.18.44-fc", "ok"),
        ("5.11.0", "ok"),
        ("5.11-rc1", "ok"),
        ("5.10.0-8-amd64", "warning"),
        ("4.19", "warning"),
        ("10.0", "ok"),
    ],
)
def test_a_kernel_that_cannot_splice_terminals_is_told_by_its_number(release: str, severity: str) -> None:
    assert check_system("Linux", release).severity == severity


def test_anything_but_linux_is_an_error() -> None:
    assert check_system("Darwin", "25.0").severity == "error"


@given(st.text())
def test_any_release_is_answered(release: str) -> None:
    assert check_system("Linux", release).severity in ("ok", "warning")


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_missing_feature_says_what_that_means_and_what_to_do(feature: features.Feature) -> None:
    there, missing = check_feature(feature, Trial()), check_feature(feature, Trial("refused"))
    assert (there.severity, there.advice) == ("ok", "")
    assert missing.severity == feature.severity != "ok"
    assert missing.found == "refused"
    assert missing.meaning
    assert missing.advice


def test_a_feature_whose_trial_fails_is_missing() -> None:
    def refuse() -> bool:
        raise OSError(errno.EPERM, "not permitted")

    assert "not permitted" in attempt(refuse).wrong
    assert attempt(lambda: False).wrong
    assert attempt(lambda: True) == attempt(lambda: None) == Trial()


def test_features_that_cannot_be_missing_here_are_found_and_nothing_is_left_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    found = {finding.check: finding for finding in features.probe()}
    assert sorted(os.listdir("/proc/self/fd")) == before
    for name in ("proc", "pidfd", "memfd", "terminals", "subreaper"):
        assert found[name].severity == "ok", found[name]
    assert (found["splice from a terminal"].severity == "ok") == kernel.can_splice_terminals()


def test_the_trials_leave_no_child() -> None:
    before = psutil.Process().children()  # other tests may have left some in this process
    list(features.probe())
    assert psutil.Process().children() == before


def test_a_refused_terminal_is_one_finding_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[int, int]:
        raise OSError(errno.ENOENT, "out of pty devices")

    monkeypatch.setattr(os, "openpty", refuse)
    monkeypatch.setattr(pty, "openpty", refuse)
    found = {finding.check: finding.severity for finding in features.probe()}
    assert (found["terminals"], found["splice from a terminal"]) == ("error", "warning")
    assert found["MFD_NOEXEC_SEAL"]
