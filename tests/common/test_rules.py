"""Wake rules: every way to write one, errors that say what to write, and matches whatever the pieces."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outlive.common import rules
from outlive.common.errors import BadRequest
from outlive.common.rules import MATCH_MAX, Deadline, Exit, Output, Port, Rule, Silence, parse, rule_of

WRITTEN: list[tuple[object, str, Rule]] = [
    ("exit", "exit", Exit()),
    ({"output": "a=b|c"}, "output=a=b|c", Output("a=b|c")),
    ({"output": "schön"}, "output=schön", Output("schön")),
    ({"silence": 30}, "silence=30", Silence(30)),
    ({"silence": 0.5}, "silence=0.5", Silence(0.5)),
    ({"port": 8000}, "port=8000", Port(8000)),
    ({"deadline": 3600}, "deadline=3600", Deadline(3600)),
]


@pytest.mark.parametrize(("wire", "text", "rule"), WRITTEN, ids=[text for _, text, _ in WRITTEN])
def test_a_rule_can_be_written_in_two_ways_and_is_the_same(wire: object, text: str, rule: Rule) -> None:
    assert rule_of(wire) == parse(text) == rule_of(rule) == rule
    assert str(rule) == text
    assert rule.to_wire() == wire


@given(st.floats(rules.SECONDS_MIN, rules.SECONDS_MAX))
def test_a_clock_rules_text_is_understood_as_the_same_rule(seconds: float) -> None:
    for rule in (Silence(seconds), Deadline(seconds)):
        assert parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        ("ended", 'use "exit", or one of'),
        ({}, 'use "exit"'),
        ({"exit": 1}, "'exit': there is none of this name"),
        ({"output": 5}, "output: 5 is no expression"),
        ({"output": ""}, "0 bytes; use 1 to 1000"),
        ({"output": "x" * 1001}, "1001 bytes; use 1 to 1000"),
        ({"output": "("}, "'\\('.*missing \\)"),
        ({"output": "a)b(c"}, "unexpected \\)"),
        ({"output": "(?=x)"}, "no look-around"),
        ({"output": "x*"}, "matches nothing at all"),
        ({"output": "((a{100}){100}){100}"}, "repetition|too large"),
        ({"silence": "30"}, "silence: '30'; use 0.1 to"),
        ({"silence": True}, "silence: True"),
        ({"deadline": 0}, "deadline: 0; use 0.1 to"),
        ({"deadline": float("nan")}, "deadline: nan"),
        ({"port": 65_536}, "port: 65536; use a TCP port, 1 to 65535"),
        ({"port": True}, "port: True"),
    ],
)
def test_what_is_no_rule_is_refused_with_what_to_write(wire: object, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        rule_of(wire)


@pytest.mark.parametrize(
    "text", ["", "exit=1", "output", "silence=soon", "port=80a", "port=-1", "cpu=5", "deadline="]
)
def test_what_is_no_rules_text_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="use "):
        parse(text)


def test_one_rule_twice_is_one_and_too_many_are_refused() -> None:
    assert rules.rules_of(["exit", {"port": 1}, "exit"]) == [Exit(), Port(1)]
    with pytest.raises(BadRequest, match="17, of them 0 about output; a process may have 16"):
        rules.rules_of([{"port": number} for number in range(1, 18)])
    with pytest.raises(BadRequest, match="9 about output"):
        rules.rules_of([{"output": str(number)} for number in range(9)])
    with pytest.raises(BadRequest, match="use a list"):
        rules.rules_of("exit")


def test_a_rule_of_a_newer_program_keeps_its_place() -> None:
    assert rules.known(["exit", "moon=full", "port=1"]) == [Exit(), None, Port(1)]


def test_nothing_loads_re2_without_an_output_rule() -> None:
    script = (
        "import sys; from outlive.common import client, held, rules; from outlive.worker import session;"
        "rules.parse_all(['exit', 'port=1', 'silence=3']); assert 're2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# Matching.


def streamed(pattern: str, pieces: list[bytes]) -> bool:
    """Tell whether it is found when the text comes in pieces, each searched with what may belong to it before."""
    text, scanned = b"", 0
    for piece in [*pieces, None]:
        text += piece or b""
        begin = rules.window(scanned)
        if rules.search(pattern, text[begin:], 1 if begin else 0, final=piece is None):
            return True
        scanned = len(text)
    return False


PATTERNS = [
    "ab+c",
    "^a",
    "b$",
    "^ab$",
    r"\bab\b",
    r"a\Bb",
    "a|bc$",
    "(?i)AB",
    r"\Aab",
    r"b\z",
    "é+b",
    ".é",
    "(a+)+$",
]


@given(
    st.sampled_from(PATTERNS),
    st.lists(st.text("abc \né", max_size=8).map(str.encode), max_size=6),
    st.integers(0, 20),
)
@example("b$", [b"ab", b"c"], 0)
@example("é+b", ["é".encode()[:1], "é".encode()[1:] + b"b"], 0)
@example(r"\bab\b", [b"ab", b""], 0)
def test_a_short_match_is_found_in_pieces_exactly_when_it_is_in_the_whole(
    pattern: str, pieces: list[bytes], more: int
) -> None:
    pieces = [piece[:more] for piece in pieces] + pieces  # borders within characters too
    whole = b"".join(pieces)
    assert streamed(pattern, pieces) == (rules.compiled(pattern).search(whole) is not None)


@given(st.integers(0, 2 * MATCH_MAX), st.integers(1, MATCH_MAX - 2), st.integers(1, MATCH_MAX))
def test_a_match_of_the_longest_length_is_found_across_any_border(before: int, length: int, step: int) -> None:
    whole = b"." * before + b"<" + b"x" * length + b">"
    pieces = [whole[at : at + step] for at in range(0, len(whole), step)]
    assert streamed("<x+>", pieces)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+b", "(.*.*)*x", "(x+x+)+y", "(.*a.{1,20}){1,20}b"])
def test_a_pathological_expression_takes_time_linear_in_the_text(pattern: str) -> None:
    # A backtracking engine would take longer than the universe has existed; the test's timeout is the assertion.
    assert rules.search(pattern, b"a" * 65_536 + b"!", 0, final=False) is None


def test_a_match_that_the_next_byte_could_undo_is_none_yet() -> None:
    assert rules.search("done$", b"done", 0, final=False) is None
    assert rules.search("done$", b"done", 0, final=True) == (0, 4)
    assert rules.search("done$", b"done\n", 0, final=False) == (0, 4)
    assert rules.search("login: ", b"\nlogin: ", 0, final=False) == (1, 8)
