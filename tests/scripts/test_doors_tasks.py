"""The id of a task says what it is; any other text is the id of none."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import mcp_types as types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.shared.exceptions import MCPError

from outlive.scripts.doors import tasks
from outlive.scripts.doors.tasks import _meaning_of, _name_of

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def test_an_id_says_since_when_is_waited_for_what() -> None:
    arguments = {"session_ids": [4711], "match": "é|x", "timeout_ms": 5}
    name = _name_of(1785196800.25, arguments)
    assert name.isascii()
    assert _meaning_of(name) == (1785196800.25, arguments)


def test_two_waits_for_the_same_are_two_tasks() -> None:
    assert _name_of(1.0, {"session_ids": [1]}) != _name_of(1.0, {"session_ids": [1]})


async def test_a_wait_that_is_over_at_once_is_answered_though_there_are_too_many_to_remember(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "_REMEMBERED", 0)
    result = types.CallToolResult(content=[])
    go = asyncio.Event()

    async def run(arguments: dict[str, Any]) -> types.CallToolResult:
        await go.wait()
        return result

    waits = tasks.Tasks(run)
    first = asyncio.create_task(waits.start({"session_ids": [1]}))
    await asyncio.sleep(0)
    go.set()
    await asyncio.sleep(0)  # the first one is over, and does not know it yet
    assert await asyncio.gather(first, waits.start({"session_ids": [2]})) == [result, result]


@given(text=st.text())
def test_any_other_text_is_the_id_of_no_task(text: str) -> None:
    with pytest.raises(MCPError) as refused:
        _meaning_of(text)
    assert refused.value.code == types.INVALID_PARAMS


@given(meaning=ANY_JSON | st.tuples(st.text(), ANY_JSON, ANY_JSON))
def test_an_id_that_says_something_else_is_that_of_no_task(meaning: object) -> None:
    text = base64.urlsafe_b64encode(json.dumps(meaning).encode()).decode().rstrip("=")
    with pytest.raises(MCPError) as refused:
        _meaning_of(text)
    assert refused.value.code == types.INVALID_PARAMS
