"""Frames: what they cannot hold is refused by field, what they can hold arrives as it was."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outlive.common import wire
from outlive.common.errors import BadRequest, ExpiredProcess, OutliveError, PeerError, SpawnError
from outlive.common.messages import (
    CHARS_MAX,
    CLIENT_OPS,
    FROM_WORKER_OPS,
    VERSION,
    WORKER_OPS,
    Body,
    ExecCommand,
    Kill,
    ListProcesses,
    ProcessRow,
    Reply,
    Request,
    Resize,
    WriteStdin,
    op_of,
)

from .conftest import until

OPS = {**CLIENT_OPS, **WORKER_OPS, **FROM_WORKER_OPS}

# Text as command lines and file names have it: bytes that are not UTF-8 are escaped.
raw_text = st.binary(max_size=20).map(os.fsdecode)
FIELDS: dict[str, st.SearchStrategy[Any]] = {"cmd": raw_text | st.lists(st.binary(max_size=9), max_size=3)}


def strategy(field: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Return values that a field's type allows."""
    inspect = msgspec.inspect
    match field:
        case inspect.StrType(pattern=None):
            return raw_text
        case inspect.StrType():  # part of headers and files: real text
            return st.text(max_size=20).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
        case inspect.BytesType():
            return st.binary(max_size=50)
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType(gt=_, ge=low, lt=below, le=high):
            top = (1 << 62) - 1 if high is None else high
            return st.integers(low or 0, below - 1 if below else top)
        case inspect.FloatType():
            return st.floats(0, 1e9)
        case inspect.NoneType():
            return st.none()
        case inspect.ListType(item_type=item, min_length=least):
            return st.lists(strategy(item), min_size=least or 0, max_size=3)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(strategy(key), strategy(value), max_size=3)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(strategy, items))
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{part.name: strategy(part.type) for part in fields})
        case inspect.UnionType(types=types):
            return st.one_of(*map(strategy, types))
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case inspect.AnyType():
            return st.none() | raw_text | st.integers(0, 9)
        case inspect.StructType(cls=wanted, fields=fields):
            return st.builds(wanted, **{field.name: strategy(field.type) for field in fields})
    raise AssertionError(f"no strategy for {field}")


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    body = draw(st.sampled_from(sorted(OPS.values(), key=lambda body: body.__name__)))
    described = msgspec.inspect.type_info(body)
    assert isinstance(described, msgspec.inspect.StructType)
    return body(**{field.name: draw(FIELDS.get(field.name, strategy(field.type))) for field in described.fields})


# What is sent arrives.


@settings(max_examples=300)
@given(bodies(), st.integers(0, 2**31), st.none() | st.floats(0, 1e9))
@example(
    ExecCommand(thread="t", cmd="echo \udcff", workdir=b"/\xff", environment={b"A\xff": b"\xfe"}, call_id=""), 1, 0
)
def test_every_body_arrives_as_it_was_sent(body: Body, id: int, deadline: float | None) -> None:
    request = wire.decode(wire.encode(wire.request(body, id=id, token="t", deadline=deadline)))
    assert isinstance(request, Request)
    assert (request.id, request.token, request.deadline) == (id, "t", deadline)
    assert wire.body_of(request, OPS) == body


def test_a_frame_is_these_bytes() -> None:
    frame = wire.encode(wire.request(Resize(thread="a", process_id="12", columns=80, rows=24), id=7))
    assert msgpack.unpackb(frame) == {
        "v": 1,
        "op": "resize",
        "body": {"thread": "a", "process_id": "12", "columns": 80, "rows": 24},
        "token": "",
        "id": 7,
        "deadline": None,
    }
    assert wire.encode(wire.success(7, 1)) == b"\x84\xa1v\x01\xa2id\x07\xa6result\x01\xa5error\xc0"


def test_down_keeps_its_shape_for_ever() -> None:
    frame = b"\x84\xa1v\x01\xa2op\xa4down\xa2id\x07\xa4body\x81\xa5force\xc3"
    request = wire.decode(frame)
    assert isinstance(request, Request)
    assert wire.body_of(request, CLIENT_OPS) == CLIENT_OPS["down"](force=True)


@pytest.mark.parametrize(
    "error", [BadRequest("no \udcff"), ExpiredProcess("gone"), SpawnError("not found", stage="exec")], ids=repr
)
def test_an_error_arrives_as_what_it_was(error: OutliveError) -> None:
    reply = wire.decode(wire.encode(wire.failure(3, error)))
    assert isinstance(reply, Reply)
    with pytest.raises(type(error)) as caught:
        wire.result_of(reply, Any)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "stage", None) == getattr(error, "stage", None)


def test_a_process_whose_command_line_is_not_utf_8_is_listed() -> None:
    row = ProcessRow(
        thread="t",
        process_id="1001",
        call_id="c",
        pid=1,
        state="attached",
        worker_pid=None,
        command=[os.fsdecode(b"caf\xe9")],
        cwd=os.fsdecode(b"/\xff"),
        tty=True,
        started_at="",
        bytes_written=0,
        bytes_delivered=0,
        outcome=None,
    )
    reply = wire.decode(wire.encode(wire.success(1, [row])))
    assert isinstance(reply, Reply)
    (arrived,) = wire.result_of(reply, list[ProcessRow])
    assert arrived == row
    assert os.fsencode(arrived.command[0]) == b"caf\xe9"


def test_text_that_no_bytes_can_be_is_the_callers_mistake() -> None:
    with pytest.raises(BadRequest, match="lone surrogate"):
        wire.encode(wire.request(ListProcesses(thread="\ud800"), id=1))


def test_ops_are_the_names_of_the_bodies() -> None:
    assert op_of(ExecCommand) == "exec_command"
    assert all(op_of(body) == op for op, body in OPS.items())
    assert not set(WORKER_OPS) & set(FROM_WORKER_OPS)


# What is refused.


def refused_or_understood(frame: bytes) -> None:
    try:
        message = wire.decode(frame)
    except PeerError:
        return
    if isinstance(message, Request):
        try:
            body = wire.body_of(message, OPS)
        except BadRequest as error:
            assert message.op in str(error) or "unknown request" in str(error)  # noqa: PT017
        else:
            assert isinstance(body, OPS[message.op])
    else:
        with suppress(OutliveError):
            wire.result_of(message, list[ProcessRow])


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.binary(max_size=3), inner),
    max_leaves=8,
)
DEEP = b"\x91" * 1000 + b"\xc0"


@given(st.binary(max_size=300))
@example(DEEP)
@example(b"\x81\xa1v" + DEEP)
@example(b"\x81\x91\xc0\x01")  # a list as a key
@example(b"\x83\xa1v\x01\xa2op\xa4down\xa4body\x81\xa1x" + DEEP)
@example(b"\x83\xa1v\x01\xa2id\x01\xa6result" + DEEP)
@example(b"\xdf\xff\xff\xff\xff")
@example(msgpack.packb({"v": 1, "id": 1, "result": msgpack.Timestamp(1)}))
@example(msgpack.packb({"v": 1, "id": 1, "result": msgpack.ExtType(5, b"")}))
def test_any_bytes_are_understood_or_a_peer_error(frame: bytes) -> None:
    refused_or_understood(frame)


@given(
    st.fixed_dictionaries(
        {"v": st.just(VERSION) | anything, "op": st.sampled_from(sorted(OPS)) | anything},
        optional={"id": anything, "token": anything, "deadline": anything, "body": anything},
    )
)
def test_any_map_is_understood_or_a_peer_error(table: dict[str, Any]) -> None:
    refused_or_understood(msgpack.packb(table))


@given(bodies(), st.data())
def test_any_value_of_a_bodys_field_is_understood_or_refused_by_name(body: Body, data: st.DataObject) -> None:
    request = wire.request(body, id=1)
    described = msgspec.inspect.type_info(type(body))
    assert isinstance(described, msgspec.inspect.StructType)
    names = [field.name for field in described.fields]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    table = {**request.body, name: data.draw(anything)}
    bent = wire.decode(
        msgpack.packb({"v": VERSION, "op": request.op, "id": 1, "body": table}, unicode_errors="surrogateescape")
    )
    assert isinstance(bent, Request)
    try:
        wire.body_of(bent, OPS)
    except BadRequest as error:
        assert f"{request.op}: " in str(error)  # noqa: PT017
        assert f"`$.{name}" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"thread": "t", "process_id": 5}, r"Expected `str`, got `int` - at `\$.process_id`"),
        ({"thread": "t", "process_id": "5", "chars": "text"}, r"Expected `bytes`, got `str` - at `\$.chars`"),
        ({"thread": "t", "process_id": "5", "chars": b"x" * (CHARS_MAX + 1)}, r"`\$.chars`"),
        ({"thread": "t", "process_id": "5", "yield_time_ms": -1}, r">= 0 - at `\$.yield_time_ms`"),
        ({"thread": "t", "process_id": "5", "write_id": 7}, r"`\$.write_id`"),
        ({"thread": "t"}, "missing required field `process_id`"),
        ([], "Expected `object`, got `array`"),
    ],
)
def test_a_bad_field_is_named(body: Any, complaint: str) -> None:
    with pytest.raises(BadRequest, match=complaint):
        wire.body_of(Request(v=VERSION, op=op_of(WriteStdin), body=body), CLIENT_OPS)


@pytest.mark.parametrize("seconds", [float("nan"), -1.0])
def test_a_delay_is_a_number_from_zero_on(seconds: float) -> None:
    with pytest.raises(BadRequest, match="after_s"):
        wire.body_of(
            Request(v=VERSION, op="kill", body={"thread": "t", "process_ids": ["1"], "after_s": seconds}),
            CLIENT_OPS,
        )


def test_a_field_that_this_version_does_not_know_is_ignored() -> None:
    body = {"thread": "t", "process_ids": ["1"], "from_the_future": 1}
    assert wire.body_of(Request(v=VERSION, op="kill", body=body), CLIENT_OPS) == Kill(thread="t", process_ids=["1"])


def test_an_unknown_request_is_named_and_so_are_the_known_ones() -> None:
    with pytest.raises(BadRequest, match=r"unknown request 'explode'; this side knows clean, .*write_stdin"):
        wire.body_of(Request(v=VERSION, op="explode", body={}), CLIENT_OPS)
    with pytest.raises(BadRequest, match="unknown request 'down'"):
        wire.body_of(Request(v=VERSION, op="down", body={}), WORKER_OPS)


def test_a_list_that_nobody_would_read_is_not_sent() -> None:
    call = ListProcesses(thread="t")
    fits, much = ({"environment": {str(n): "" for n in range(count)}} for count in (250_000, 250_001))
    wire.decode(wire.encode(Request(v=VERSION, op="x", body=fits)))
    with pytest.raises(BadRequest, match="x: environment has 250001 entries; at most 250000 are sent"):
        wire.encode(Request(v=VERSION, op="x", body=much))
    assert wire.decode(wire.encode(wire.request(call)))


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (b"", "not msgpack"),
        (b"\x90", "is a list, not a map"),
        (b"\x80", "`v` is None; this side speaks versions 1"),
        (b"\x81\xa1v\x02", "`v` is 2"),
        (b"\x82\xa1v\x01\xa2op\x05", "at `\\$.op`"),
        (b"\x81\xa1v\x01", "missing required field `id`"),
        (b"\x80" * 2, "not msgpack"),
        (b"\xc7\x00\x05", "not msgpack"),
        (b"\0" * (wire.FRAME_MAX + 1), "at most 4194304 are read"),
        (b"\xdd\x00\x03\xd0\x91" + b"\0" * 250_001, "not msgpack"),  # a list of 250,001
    ],
)
def test_a_bad_frame_is_refused_by_name(frame: bytes, complaint: str) -> None:
    with pytest.raises(PeerError, match=complaint):
        wire.decode(frame)


def test_a_frame_beyond_the_limit_is_not_sent() -> None:
    with pytest.raises(BadRequest, match="at most 4194304 are sent"):
        wire.encode(wire.success(1, b"x" * wire.FRAME_MAX))


# Ports.


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(0)


async def test_frames_go_both_ways_and_all_of_them_arrive(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/control"
    router, dealer = wire.new_socket(context, zmq.ROUTER), wire.new_socket(context, zmq.DEALER)
    router.bind(address)
    dealer.connect(address)
    got: list[list[bytes]] = []
    back: list[list[bytes]] = []

    def answer(frames: list[bytes]) -> None:
        got.append(frames)
        server.send(frames)

    server = wire.Port(router, answer)
    client = wire.Port(dealer, back.append)
    count = 5 * wire.Port.BATCH + 1
    for number in range(count):
        client.send([b"%d" % number])
    await until(lambda: len(back) == count)
    assert back == [[b"%d" % number] for number in range(count)]
    assert len(got) == count
    with pytest.raises(zmq.ZMQError, match="Host unreachable"):
        server.send([b"nobody", b"x"])
    client.close()
    server.close()
    client.close()  # again does nothing


async def test_a_port_may_be_closed_by_what_it_received(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"ipc://{tmp_path}/control"
    router, dealer = wire.new_socket(context, zmq.ROUTER), wire.new_socket(context, zmq.DEALER)
    router.bind(address)
    dealer.connect(address)
    server = wire.Port(router, lambda frames: server.close())
    client = wire.Port(dealer, lambda frames: None)
    client.send([b"1"])
    client.send([b"2"])
    await until(lambda: router.closed)
    await asyncio.sleep(0)
    client.close()
    assert not caplog.records
