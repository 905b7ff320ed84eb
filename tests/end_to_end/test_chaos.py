"""The chaos script itself: a short run is clean, and the same check sees what a lossy pump loses."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest


async def chaos(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run `scripts/chaos` and return its exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "outlive.scripts.chaos", *arguments, "--json", stdout=-1, stderr=-1
    )
    try:
        printed, _ = await process.communicate()
    except BaseException:
        process.terminate()  # it cleans up
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, json.loads(printed)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("worker", 15),
        ("all", 16),
        pytest.param("broker", 6, marks=pytest.mark.long),
        pytest.param("keeper", 4, marks=pytest.mark.long),
    ],
    ids=lambda value: str(value),
)
async def test_the_killed_cost_nothing(kind: str, kills: int) -> None:
    status, toll = await chaos(kind, "--kills", str(kills), "--children", "1")
    assert toll["evidence"] == []
    assert status == 0
    assert toll["kills"] >= kills
    assert toll["bytes_compared"] > 0


@pytest.mark.timeout(180)
async def test_upgrades_cost_nothing() -> None:
    status, toll = await chaos("upgrade", "--times", "3", "--children", "1")
    assert toll["evidence"] == []
    assert status == 0
    assert toll["upgrades"] == 3
    assert toll["bytes_compared"] > 0


@pytest.mark.timeout(180)
async def test_no_wake_is_lost_and_none_comes_twice() -> None:
    status, toll = await chaos("wakes", "--times", "30", "--children", "6")
    assert toll["evidence"] == []
    assert status == 0
    assert toll["wakes_expected"] >= 30
    assert toll["kills"] > 0


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_the_check_sees_what_the_copying_pump_loses() -> None:
    status, toll = await chaos("worker", "--copied", "--children", "2")
    if status == 77:
        pytest.skip("no real-time killer here: a clean result would prove nothing")
    assert status == 0
    assert toll["lost"] != 0
