"""What is kept of ended processes, in real files: outcomes, output with its gaps, and ids for ever."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.broker.archive import Record, ThreadArchive
from outlive.common.errors import ExpiredProcess, UnknownProcess
from outlive.common.transcript import Gap, Limits

SMALL = Limits(head=8192, tail=8192, unread=0, slack=4096)


def row_of(process_id: str, outcome: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "thread": "t",
        "process_id": process_id,
        "call_id": f"call-{process_id}",
        "outcome": outcome or {"kind": "exited", "code": 3},
    }


def archive_in(folder: Path, *, hours: float = 24.0, count: int = 1000) -> ThreadArchive:
    return ThreadArchive(folder, hours, count)


def test_a_kept_process_answers_with_its_outcome_and_every_byte(tmp_path: Path, children: Any) -> None:
    output = bytes(range(256)) * 5 + b'\n{"not": "the head"}\n'
    archive = archive_in(tmp_path / "t")
    archive.use("1234")
    archive.keep(row_of("1234"), children.transcript("1234", output))
    record = archive.get("1234")
    assert list(record.parts(0, len(output))) == [(0, output)]
    assert record.piece(7, 100).pieces == [(7, output[7:107])]
    answer = record.answer(10_000, 0, typed_nothing=False)
    assert (answer.exit_code, answer.session_id, answer.output_end) == (3, None, len(output))
    assert answer.sentence == "Process exited with code 3"


def test_an_answer_after_everything_was_delivered_is_empty_and_still_has_the_outcome(
    tmp_path: Path, children: Any
) -> None:
    archive = archive_in(tmp_path / "t")
    row = row_of("1234", {"kind": "signaled", "signal": 9})
    archive.keep(row, children.transcript("1234", b"all of it"))
    answer = archive.get("1234").answer(10_000, None, typed_nothing=True)
    assert (answer.output, answer.exit_code, answer.original_token_count) == ("", 137, 0)
    assert answer.warnings == ["the process has ended; nothing was typed"]


def test_a_gap_is_kept_as_a_gap(tmp_path: Path, children: Any) -> None:
    output = os.urandom(100_000)
    transcript = children.transcript("1234", output, SMALL)
    archive = archive_in(tmp_path / "t")
    archive.keep(row_of("1234"), transcript)
    parts = list(archive.get("1234").parts(0, len(output)))
    assert parts == [(0, output[:8192]), Gap(8192, 91_808), (91_808, output[91_808:])]
    assert parts == list(transcript.read(0, len(output)))
    piece = archive.get("1234").piece(8000, 1 << 20)
    assert piece.gaps == [(8192, 91_808)]
    assert piece.ended
    # Of the stream, 84 kB are gone: the file holds what was kept, and a line.
    assert (tmp_path / "t/ended/1234").stat().st_size < 8192 * 2 + 1000


@given(data=st.data())
def test_a_record_reads_like_the_bytes_it_was_made_of(data: st.DataObject) -> None:
    stream = data.draw(st.binary(max_size=60))
    bounds = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=8)))
    ranges = list(zip(bounds[::2], bounds[1::2], strict=False))
    kept = {at for first, last in ranges for at in range(first, last)}
    record = Record({}, len(stream), ranges, b"".join(stream[first:last] for first, last in ranges))
    start, end = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 70))
    told: dict[int, int | None] = {}
    for part in record.parts(start, end):
        where, what = (
            (range(part.start, part.end), [None] * (part.end - part.start))
            if isinstance(part, Gap)
            else (range(part[0], part[0] + len(part[1])), part[1])
        )
        assert len(where) > 0
        assert not told or where[0] == max(told) + 1, "in order, and without a hole between"
        told.update(zip(where, what, strict=True))
    expected = range(start, min(end, len(stream)))
    assert told == {at: stream[at] if at in kept else None for at in expected}


def test_an_id_of_another_thread_or_of_nobody_is_unknown(tmp_path: Path) -> None:
    archive = archive_in(tmp_path / "t")
    archive.use("1234")
    with pytest.raises(UnknownProcess, match="4321 was never started in thread t"):
        archive.get("4321")


def test_the_oldest_make_room_and_answer_expired(tmp_path: Path, children: Any) -> None:
    archive = archive_in(tmp_path / "t", count=3)
    for process_id in ("5000", "4000", "3000", "2000", "1000"):
        archive.use(process_id)
        archive.keep(row_of(process_id), children.transcript(process_id, b"x"))
    assert [row["process_id"] for row in archive.rows()] == ["3000", "2000", "1000"]
    assert len(archive) == 3
    with pytest.raises(ExpiredProcess):
        archive.get("4000")
    assert sorted(os.listdir(tmp_path / "t/ended")) == ["1000", "2000", "3000"]


def test_what_is_too_old_expires_and_what_is_not_stays(tmp_path: Path, children: Any) -> None:
    archive = archive_in(tmp_path / "t")
    for process_id in ("2000", "1000"):
        archive.use(process_id)
        archive.keep(row_of(process_id), children.transcript(process_id, b"x"))
    old = (tmp_path / "t/ended/2000").stat().st_mtime - 25 * 3600
    os.utime(tmp_path / "t/ended/2000", (old, old))
    archive = archive_in(tmp_path / "t")
    assert archive.get("1000").data == b"x"
    with pytest.raises(ExpiredProcess):
        archive.get("2000")
    assert not (tmp_path / "t/ended/2000").exists()


def test_the_next_broker_finds_everything_and_the_ids_for_ever(tmp_path: Path, children: Any) -> None:
    archive = archive_in(tmp_path / "t", count=1)
    for process_id in ("1000", "99999", "100000"):
        archive.use(process_id)
    archive.keep(row_of("1000"), children.transcript("1000", b"x"))
    archive.keep(row_of("99999"), children.transcript("99999", b"y"))
    for _ in range(3):
        archive = archive_in(tmp_path / "t", count=1)
        assert archive.ids == {"1000", "99999", "100000"}
        assert archive.get("99999").data == b"y"
        for process_id in ("1000", "100000"):
            with pytest.raises(ExpiredProcess):
                archive.get(process_id)


def test_files_and_folders_are_private(tmp_path: Path, children: Any) -> None:
    archive = archive_in(tmp_path / "t")
    archive.use("1234")
    archive.keep(row_of("1234"), children.transcript("1234", b"secret"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "t").rglob("*")}
    assert modes == {"ids": 0o600, "ended": 0o700, "1234": 0o600}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\n",
        b"not json\n",
        b"[]\n",
        b"{}\n",
        b"\xff\xfe\n",
        b'{"format": 2, "row": {}, "written": 1, "ranges": [[0, 1]]}\nx',
        b'{"format": 1, "row": {}, "written": "many", "ranges": []}\n',
        b'{"format": 1, "row": {}, "written": 1, "ranges": [0, 1]}\nx',
        b'{"format": 1, "row": 7, "written": 1, "ranges": [[0, 1]]}\nx',
        b'{"format": 1, "row": {"outcome": null}, "written": 9, "ranges": [[0, 9]]}\ntorn',
        b'{"format": 1, "row": {"outcome": null}, "written": 9, "ranges": [[5, 2]]}\n',
    ],
)
def test_a_damaged_file_counts_as_expired(tmp_path: Path, children: Any, damage: bytes) -> None:
    archive = archive_in(tmp_path / "t")
    for process_id in ("1000", "2000"):
        archive.use(process_id)
        archive.keep(row_of(process_id), children.transcript(process_id, b"x"))
    (tmp_path / "t/ended/1000").write_bytes(damage)
    with pytest.raises(ExpiredProcess):
        archive.get("1000")
    assert archive.get("2000").data == b"x"
    assert [row["process_id"] for row in archive.rows()] == ["2000"]


def test_a_file_that_somebody_removed_counts_as_expired(tmp_path: Path, children: Any) -> None:
    archive = archive_in(tmp_path / "t")
    archive.use("1000")
    archive.keep(row_of("1000"), children.transcript("1000", b"x"))
    (tmp_path / "t/ended/1000").unlink()
    assert list(archive.rows()) == []
    with pytest.raises(ExpiredProcess):
        archive.get("1000")


def test_one_damaged_line_does_not_make_the_other_ids_unknown(tmp_path: Path) -> None:
    archive = archive_in(tmp_path / "t")
    archive.use("1000")
    with open(tmp_path / "t/ids", "ab") as file:
        file.write(b"\xff\xfe\n2000\n-7\nabc\n")
    archive = archive_in(tmp_path / "t")
    assert archive.ids == {"1000", "2000"}


def test_an_id_after_a_torn_line_is_still_an_id(tmp_path: Path) -> None:
    archive = archive_in(tmp_path / "t")
    archive.use("1000")
    with open(tmp_path / "t/ids", "ab") as file:
        file.write(b"20")  # a full disk, or a power cut
    archive = archive_in(tmp_path / "t")
    archive.use("3000")
    archive = archive_in(tmp_path / "t")
    assert {"1000", "3000"} <= archive.ids


def test_a_draft_that_a_dead_broker_left_is_removed_by_the_next(tmp_path: Path) -> None:
    archive_in(tmp_path / "t")
    (tmp_path / "t/ended/.1000").write_bytes(b"half of")
    archive = archive_in(tmp_path / "t")
    assert len(archive) == 0
    assert os.listdir(tmp_path / "t/ended") == []


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Refuse writes beyond `size` with EFBIG: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_the_file_and_nothing_else(tmp_path: Path, children: Any) -> None:
    transcript = children.transcript("1000", os.urandom(200_000))
    small = children.transcript("2000", b"x")
    archive = archive_in(tmp_path / "t")
    archive.use("1000")
    archive.use("2000")
    with files_no_larger_than(50_000), pytest.raises(OSError):
        archive.keep(row_of("1000"), transcript)
    assert os.listdir(tmp_path / "t/ended") == []
    with pytest.raises(ExpiredProcess):
        archive.get("1000")
    archive.keep(row_of("2000"), small)
    assert archive.get("2000").data == b"x"


def test_the_first_line_of_a_file_is_what_ps_shows(tmp_path: Path, children: Any) -> None:
    archive = archive_in(tmp_path / "t")
    archive.keep(row_of("1234"), children.transcript("1234", b"abc"))
    line, _, data = (tmp_path / "t/ended/1234").read_bytes().partition(b"\n")
    assert json.loads(line) == {"format": 1, "row": row_of("1234"), "written": 3, "ranges": [[0, 3]]}
    assert data == b"abc"


def test_a_call_is_remembered_when_its_process_has_expired(tmp_path: Path, children: Any) -> None:
    archive = archive_in(tmp_path / "t", count=1)
    for process_id in ("1000", "1001"):
        archive.use(process_id)
        archive.keep(row_of(process_id), children.transcript(process_id, b""))
    assert archive.calls["call-1000"] == "1000"
    with pytest.raises(ExpiredProcess):
        archive.get(archive.calls["call-1000"])
