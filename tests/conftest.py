"""What the tests of several packages use, and the patience they all have."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import settings

from outlive.common.pump import Pumps

# A busy machine is not a failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture
async def pumps() -> AsyncIterator[Pumps]:
    pumps = Pumps(asyncio.get_running_loop())
    yield pumps
    pumps.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)
