"""A thousand threads that sleep: what they cost while nothing happens."""

from __future__ import annotations

import pytest

from outlive.scripts.footprint import sleeping

from .conftest import Home


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_a_thousand_sleeping_threads_cost_little_memory_and_no_wake_up(home: Home) -> None:
    memory, wakeups = await sleeping(1000, 10)
    assert memory.value is not None
    assert memory.value <= 60
    assert wakeups.value == 0
    assert home.pids("worker") == []
    assert home.pids("worker.spawner") == []
