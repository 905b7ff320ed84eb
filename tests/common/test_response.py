"""The result of a tool call: never longer than its room, head and tail right, characters whole."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outlive.common.messages import READ_MAX
from outlive.common.outcome import Outcome
from outlive.common.response import Response, chunk_id, clip, output, tokens, whole_characters
from outlive.common.transcript import Gap

MARKER = re.compile("…([0-9]+) tokens truncated…")


def response(outcome: Outcome | None = None, **fields: object) -> Response:
    table: dict[str, object] = {
        "thread": "t",
        "process_id": "52328",
        "chunk_id": "6e6db0",
        "wall_time_seconds": 30.0024,
        "exit_code": outcome.exit_code if outcome else None,
        "session_id": None if outcome else 52328,
        "original_token_count": 9,
        "output": "…",
        "outcome": outcome.to_wire() if outcome else None,
        "sentence": outcome.sentence() if outcome else "",
        "output_end": 36,
    }
    return Response(**{**table, **fields})  # type: ignore[arg-type]


# The text.


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (None, "Process running with session ID 52328"),
        (Outcome("exited", code=0), "Process exited with code 0"),
        (Outcome("signaled", signal=9), "Process ended by signal 9 (SIGKILL)"),
        (Outcome.lost("rebooted"), "Process lost: rebooted"),
    ],
)
def test_the_text_is_the_one_that_models_know(outcome: Outcome | None, line: str) -> None:
    assert response(outcome).text() == (
        f"Chunk ID: 6e6db0\nWall time: 30.0024 seconds\n{line}\nOriginal token count: 9\nOutput:\n…"
    )


def test_warnings_stand_before_the_output() -> None:
    lines = response(warnings=["one", "two"], output="Output:\nfake").text().split("\n")
    assert lines[4:] == ["Warning: one", "Warning: two", "Output:", "Output:", "fake"]


def test_the_wall_time_has_four_digits() -> None:
    assert "\nWall time: 0.2500 seconds\n" in response(wall_time_seconds=0.25).text()


def test_a_chunk_id_is_six_hex_digits_and_new_each_time() -> None:
    ids = {chunk_id() for _ in range(20)}
    assert len(ids) > 1
    assert all(re.fullmatch("[0-9a-f]{6}", id) for id in ids)


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (36, 9)])
def test_tokens_are_bytes_by_four(count: int, expected: int) -> None:
    assert tokens(count) == expected


# Clipping.


@st.composite
def streams(draw: st.DrawFn, content: st.SearchStrategy[bytes]) -> tuple[list[tuple[int, bytes] | Gap], int, int]:
    """Return what a transcript yields of a stretch that starts anywhere, and where it starts and ends."""
    start = draw(st.integers(0, 1000))
    at = start
    parts: list[tuple[int, bytes] | Gap] = []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            data = draw(content)
            if data:
                parts.append((at, data))
                at += len(data)
        elif not parts or not isinstance(parts[-1], Gap):
            length = draw(st.integers(1, 5000))
            parts.append(Gap(at, at + length))
            at += length
    return parts, start, at


text = st.text("aä€😀\n", max_size=60).map(lambda text: text.encode())


@given(streams(st.binary(max_size=60)) | streams(text), st.integers(0, 30))
@example(([(0, b"x" * 9)], 0, 9), 2)
@example(([(0, b"\x80" * 40)], 0, 40), 2)
def test_a_clipped_text_is_never_longer_than_its_room_and_the_marker(
    stream: tuple[list[tuple[int, bytes] | Gap], int, int], max_tokens: int
) -> None:
    parts, start, end = stream
    clipped = clip(parts, start, end, max_tokens)
    marker = max(map(len, MARKER.findall(clipped)), default=0) + len("… tokens truncated…")
    assert len(clipped) <= max_tokens * 4 + marker


@given(streams(text), st.integers(0, 30))
def test_a_clipped_text_keeps_head_and_tail_of_whole_characters(
    stream: tuple[list[tuple[int, bytes] | Gap], int, int], max_tokens: int
) -> None:
    parts, start, end = stream
    clipped = clip(parts, start, end, max_tokens)
    assert "�" not in clipped
    whole = b"".join(b"\0" * (part.end - part.start) if isinstance(part, Gap) else part[1] for part in parts)
    pieces = MARKER.split(clipped)
    if len(pieces) == 1:
        assert clipped.encode() == whole
        assert len(whole) <= max_tokens * 4
        return
    head, dropped, tail = pieces[0].encode(), int(pieces[1]), pieces[2].encode()
    assert whole.startswith(head)
    assert whole.endswith(tail)
    assert len(head) + len(tail) <= max_tokens * 4
    assert dropped == tokens(len(whole) - len(head) - len(tail))
    assert dropped > 0
    room = max_tokens * 4
    before = next((part.start for part in parts if isinstance(part, Gap)), end) - start
    after = end - max((part.end for part in parts if isinstance(part, Gap)), default=start)
    # As much as there is room for, up to a character that would be cut.
    assert len(head) > min(before, room // 2) - 4
    assert len(tail) > min(after, room - room // 2) - 4


@pytest.mark.parametrize(
    ("data", "max_tokens", "expected"),
    [
        (b"x" * 40, 10, "x" * 40),
        (b"x" * 41, 10, "x" * 20 + "…1 tokens truncated…" + "x" * 20),
        (b"a" * 20 + b"b" * 60 + b"c" * 20, 10, "a" * 20 + "…15 tokens truncated…" + "c" * 20),
        (b"abc", 0, "…1 tokens truncated…"),
        (b"", 0, ""),
        ("aä€😀".encode() * 4, 4, "aä€…7 tokens truncated…€😀"),
    ],
)
def test_a_text_that_is_too_long_keeps_its_ends(data: bytes, max_tokens: int, expected: str) -> None:
    assert clip([(7, data)], 7, 7 + len(data), max_tokens) == expected


def test_bytes_that_are_no_longer_kept_count_as_truncated() -> None:
    parts = [(0, b"head"), Gap(4, 4004), (4004, b"tail")]
    assert clip(parts, 0, 4008, 10_000) == "head…1000 tokens truncated…tail"
    assert clip(parts[1:], 4, 4008, 10_000) == "…1000 tokens truncated…tail"
    assert clip(parts[:2], 0, 4004, 10_000) == "head…1000 tokens truncated…"


# Whole characters.


@given(st.text("aä€😀"), st.integers(0, 3))
def test_only_the_beginning_of_a_character_is_held_back(text: str, cut: int) -> None:
    raw = text.encode()
    raw = raw[: max(0, len(raw) - cut)]
    whole = whole_characters(raw)
    raw[:whole].decode()
    assert len(raw) - whole <= 3
    assert raw[:whole].decode() == raw.decode("utf-8", "ignore")


@given(st.binary(max_size=20))
def test_bytes_that_become_no_character_are_not_held_back_for_long(raw: bytes) -> None:
    whole = whole_characters(raw)
    assert 0 <= len(raw) - whole <= 3
    assert whole_characters(raw + b"a") == len(raw) + 1


# Answers to read_output.


def test_output_is_cut_at_its_limit_and_says_where_to_go_on() -> None:
    parts = [(5, b"abc"), Gap(8, 20), (20, b"defg")]
    whole = output(parts, 5, 100, 24, Outcome("exited", code=0), ended=True)
    assert (whole.pieces, whole.gaps) == ([(5, b"abc"), (20, b"defg")], [(8, 20)])
    assert (whole.next_offset, whole.written, whole.ended) == (24, 24, True)
    assert whole.outcome == {"kind": "exited", "code": 0}
    cut = output(parts, 5, 5, 24, None, ended=True)
    assert (cut.pieces, cut.next_offset, cut.ended) == ([(5, b"abc"), (20, b"de")], 22, False)
    assert output(parts, 5, 3, 24, None, ended=True).next_offset == 8


@given(st.binary(max_size=300), st.integers(1, 100))
def test_reading_piece_by_piece_yields_everything_once(data: bytes, limit: int) -> None:
    got, at = b"", 0
    while True:
        answer = output([(at, data[at:])] if at < len(data) else [], at, limit, len(data), None, ended=True)
        got += b"".join(piece for _, piece in answer.pieces)
        at = answer.next_offset
        if answer.ended:
            break
        assert answer.pieces
    assert got == data


def test_a_reply_holds_no_more_than_fits_into_a_frame() -> None:
    answer = output([(0, b"x" * (READ_MAX + 1))], 0, READ_MAX + 1, READ_MAX + 1, None, ended=True)
    assert answer.next_offset == READ_MAX
    assert not answer.ended
