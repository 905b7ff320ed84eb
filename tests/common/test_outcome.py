"""How a process ended, in a wait status, in words, and on the wire."""

from __future__ import annotations

import os
import signal
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common.outcome import BYS, KINDS, By, Kind, Outcome, signal_name, signal_number


@pytest.mark.parametrize("code", [0, 1, 127, 255])
def test_an_exit_code_is_what_a_real_child_gave(code: int) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    outcome = Outcome.from_status(status)
    assert outcome == Outcome("exited", code=code)
    assert outcome.exit_code == code
    assert outcome.sentence() == f"Process exited with code {code}"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGRTMIN + 3])
def test_a_signal_is_what_a_real_child_died_of(number: int) -> None:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pause()
        os._exit(1)
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    outcome = Outcome.from_status(status, by="caller")
    assert outcome == Outcome("signaled", signal=number, by="caller")
    assert outcome.exit_code == 128 + number


def test_a_core_dump_is_no_other_signal() -> None:
    assert Outcome.from_status(signal.SIGSEGV | 0x80) == Outcome("signaled", signal=11)


def test_sentences_are_those_of_the_design() -> None:
    assert Outcome("signaled", signal=9).sentence() == "Process ended by signal 9 (SIGKILL)"
    assert Outcome("signaled", signal=9, by="pruned").sentence() == "Process ended by signal 9 (SIGKILL) (pruned)"
    assert Outcome.lost("rebooted").sentence() == "Process lost: rebooted"
    assert Outcome.lost("rebooted").exit_code is None


def test_absent_fields_do_not_travel() -> None:
    assert Outcome("exited", code=0).to_wire() == {"kind": "exited", "code": 0}
    assert Outcome.lost("x", by="cleaned").to_wire() == {"kind": "lost", "reason": "x", "by": "cleaned"}


def test_the_order_of_kinds_and_bys_is_that_of_the_header_for_ever() -> None:
    assert KINDS == ("exited", "signaled", "lost") == get_args(Kind)
    assert BYS == ("caller", "pruned", "cleaned", "shutdown", "network") == get_args(By)


@pytest.mark.parametrize("text", ["TERM", "SIGTERM", "sigterm", "15", " term "])
def test_a_signal_may_be_written_as_people_do(text: str) -> None:
    assert signal_number(text) == 15


@pytest.mark.parametrize("text", ["", "0", "65", "9" * 11, "-9", "KILLER", "SIG", "²", "SIG_IGN", "1.5", "9\0"])
def test_what_is_no_signal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="signal"):
        signal_number(text)


@given(st.text(max_size=10))
def test_any_text_is_a_signal_or_a_value_error(text: str) -> None:
    try:
        assert signal_number(text) in signal.valid_signals()
    except ValueError as error:
        assert str(error).startswith("signal ")  # noqa: PT017


@given(st.sampled_from(sorted(signal.valid_signals())))
def test_a_signals_name_leads_back_to_it_or_says_its_number(number: int) -> None:
    name = signal_name(number)
    assert name == f"SIG{int(number)}" or signal_number(name) == number
