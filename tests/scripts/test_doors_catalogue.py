"""What the tools say of themselves, and what they make of arguments, whatever these are."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlive.common.errors import BadRequest
from outlive.common.messages import Output
from outlive.common.response import Response
from outlive.scripts.doors import vocabulary
from outlive.scripts.doors.catalogue import TOOLS, Tool, _last_lines, _piece
from outlive.scripts.doors.schema import schema_of, understood

EACH = pytest.mark.parametrize("tool", TOOLS.values(), ids=list(TOOLS))

SOME_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
EXITED = {"kind": "exited", "code": 3}


@EACH
def test_a_tool_is_described_in_full(tool: Tool) -> None:
    listed = tool.to_builtins()
    assert json.loads(json.dumps(listed)) == listed
    for name in ("inputSchema", "outputSchema"):
        assert listed[name]["type"] == "object"
        assert "$ref" not in listed[name]
    assert listed["inputSchema"]["additionalProperties"] is False
    for field in listed["inputSchema"]["properties"].values():
        assert field["description"].endswith(".")
        assert field["type"]
    assert listed["description"].count(".") >= 2


def test_the_two_tools_take_what_models_know_with_the_same_defaults() -> None:
    def defaults(name: str) -> dict[str, Any]:
        schema = schema_of(TOOLS[name].arguments)
        assert schema["required"] == [next(iter(schema["properties"]))]
        return {field: rest.get("default") for field, rest in schema["properties"].items()}

    assert defaults("exec_command") == {
        "cmd": None,
        "workdir": None,
        "tty": False,
        "yield_time_ms": 10_000,
        "max_output_tokens": 10_000,
        "shell": None,
        "login": True,
    }
    assert defaults("write_stdin") == {
        "session_id": None,
        "chars": "",
        "yield_time_ms": 250,
        "max_output_tokens": 10_000,
    }


def test_only_what_changes_something_says_so() -> None:
    assert [name for name, tool in TOOLS.items() if not tool.read_only] == [
        "exec_command",
        "write_stdin",
        "terminate_session",
    ]


def refusal(tool: Tool, arguments: object) -> str:
    """Return why a tool refuses arguments; empty if it does not."""
    try:
        understood(tool.arguments, arguments)
    except BadRequest as error:
        return str(error)
    return ""


@EACH
@settings(max_examples=50)
@given(data=st.data())
def test_any_argument_is_understood_or_refused_by_name(tool: Tool, data: st.DataObject) -> None:
    fields = list(schema_of(tool.arguments)["properties"])
    given_ = data.draw(st.dictionaries(st.sampled_from([*fields, "other"]), SOME_JSON, max_size=4))
    said = refusal(tool, given_)
    if said:
        named = said.partition(":")[0]
        assert named in [*fields, "other"]
        assert named in given_ or "missing" in said
        assert len(said) < 500


@pytest.mark.parametrize("arguments", [None, [], "ls", 5])
def test_arguments_that_are_no_object_are_refused(arguments: object) -> None:
    with pytest.raises(BadRequest, match=r"arguments: .*; use an object, such as \{\}"):
        understood(vocabulary.ExecCommand, arguments)


@pytest.mark.parametrize("arguments", [{"\ud800": 1}, {"session_ids": ["\ud800"]}, {"match": "\ud800"}])
def test_half_a_character_is_refused_wherever_it_is(arguments: dict[str, object]) -> None:
    with pytest.raises(BadRequest, match=r"'\\ud800': has half a character in it"):
        understood(vocabulary.Wait, arguments)


def test_null_and_numbers_as_text_are_what_a_model_means_by_them() -> None:
    understood_ = understood(vocabulary.WriteStdin, {"session_id": "4711", "chars": None, "yield_time_ms": 300.0})
    assert (understood_.session_id, understood_.chars, understood_.yield_time_ms) == (4711, "", 300)


@pytest.mark.parametrize(
    "answer",
    [
        vocabulary.Reply.of(
            Response(
                thread="t",
                process_id="4711",
                chunk_id="abcdef",
                wall_time_seconds=1.23456,
                exit_code=3,
                session_id=None,
                original_token_count=5000,
                output="some output",
                outcome=EXITED,
                output_end=9,
                warnings=["mind this"],
            ),
            1000,
        ),
        vocabulary.Sessions(
            sessions=[
                vocabulary.SessionRow(
                    session_id=4711,
                    state="ended",
                    command="make test",
                    workdir="/src",
                    tty=True,
                    started_at="2026-07-28T00:00:00Z",
                    bytes_written=123,
                    bytes_unread=45,
                    **vocabulary.of_outcome(EXITED),
                )
            ]
        ),
        vocabulary.Piece(
            session_id=4711,
            state="ended",
            cursor=10,
            next_cursor=987,
            bytes_written=1234,
            gaps=[vocabulary.Gap(50, 67)],
            output="before and after",
            **vocabulary.of_outcome(EXITED),
        ),
        vocabulary.Waited(
            sessions=[
                vocabulary.Awaited(session_id=1, came_true="match", matched="ready", offset=17),
                vocabulary.Awaited(session_id=2, came_true="exit", **vocabulary.of_outcome(EXITED)),
                vocabulary.Awaited(session_id=5, came_true="port"),
            ],
            timed_out=False,
        ),
        vocabulary.Terminated(session_id=4711, state="ended", **vocabulary.of_outcome(EXITED)),
        vocabulary.ScreenAnswer(
            session_id=4711,
            columns=80,
            rows=24,
            cursor=vocabulary.Cursor(row=3, column=14, visible=True),
            complete=True,
            lines=["one", "two"],
        ),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_the_text_of_an_answer_has_all_that_its_fields_have(answer: vocabulary.Answer) -> None:
    text = answer.text()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name not in ("state", "outcome"):  # in a sentence of their own
                    look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)
        elif not isinstance(value, bool):
            assert str(value) in text, value

    look(answer.structured())
    look(vocabulary.ending(answer.structured().get("outcome", msgspec.UNSET)))


def test_what_is_not_known_is_absent() -> None:
    answer = vocabulary.Terminated(session_id=1, state="running", **vocabulary.of_outcome(None))
    assert answer.structured() == {"session_id": 1, "state": "running"}
    lost = vocabulary.of_outcome({"kind": "lost", "reason": "rebooted"})
    answer = vocabulary.Terminated(session_id=1, state="ended", **lost)
    assert "exit_code" not in answer.structured()
    assert answer.text() == "Session 1: Process lost: rebooted"


def output_of(data: bytes, at: int = 0, *, gaps: tuple[tuple[int, int], ...] = (), ended: bool = False) -> Output:
    """Return a piece of an output that is `data` from `at` on."""
    return Output(
        pieces=[(at, data)] if data else [],
        gaps=list(gaps),
        next_offset=at + len(data),
        written=at + len(data),
        ended=ended,
        outcome=None,
    )


@given(text=st.text(), room=st.integers(4, 20), ended=st.booleans())
def test_pieces_of_any_size_make_up_the_whole_output(text: str, room: int, ended: bool) -> None:
    raw = text.encode()
    read, at = "", 0
    while at < len(raw):
        piece = _piece(1, at, output_of(raw[at:], at, ended=ended), room)
        assert at < piece.next_cursor <= at + room
        read, at = read + piece.output, piece.next_cursor
    assert read == text


def test_a_gap_is_named_in_its_place() -> None:
    whole = Output(
        pieces=[(0, b"head"), (10, b"tail")], gaps=[(4, 10)], next_offset=14, written=14, ended=True, outcome=None
    )
    piece = _piece(1, 0, whole, 100)
    assert piece.output == "head\n[bytes 4 to 10 are not kept]\ntail"
    assert piece.structured()["gaps"] == [{"from": 4, "to": 10}]


@given(
    lines=st.lists(st.text("ab", max_size=3), min_size=1, max_size=6),
    count=st.integers(1, 8),
    cut=st.integers(0, 9),
)
def test_the_last_lines_are_those(lines: list[str], count: int, cut: int) -> None:
    raw = "\n".join(lines).encode()
    pieces = [(at, part) for at, part in ((0, raw[:cut]), (cut, raw[cut:])) if part]
    output = Output(pieces=pieces, gaps=[], next_offset=len(raw), written=len(raw), ended=True, outcome=None)
    start, last = _last_lines(output, 0, count)
    expected = b"".join(raw.splitlines(keepends=True)[-count:])
    assert b"".join(data for _, data in last.pieces) == expected
    assert start == len(raw) - len(expected)
