"""Under flood: how fast output is drained, and how soon other calls are answered meanwhile.

Always true
    A drain counts only if every byte arrived and every child ended well.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

from ..common.client import Host, connect
from .measurement import Bench, Row, first_output, start_all

# Bytes that a flooding child prints without end, for measurements beside the flood.
ENDLESS = 1 << 50


async def drain(bench: Bench) -> list[Row]:
    """Drain of one and of 16 flooding children, attached and detached."""
    rows: list[Row] = []
    total = (64 if bench.quick else 128) << 20
    for count in (1, 16):
        bare: list[float] = []
        ours: dict[str, list[float]] = {"attached": [], "detached": []}
        async with connect() as host:
            for turn in bench.repeat(7, 3):
                bare.append(bench.flood(count, total // count).run_baseline())
                for mode, seconds in ours.items():
                    seconds.append(await _drained(bench, host, f"{mode}-{count}-{turn}", count, total, mode))
        for mode, seconds in ours.items():
            rates = [total / 1e6 / one for one in seconds]
            # The share of each pair, so that a slow moment of the machine counts on both sides.
            shares = [base / own for base, own in zip(bare, seconds, strict=True)]
            share = statistics.median(shares)
            wanted = count == 1
            rows.append(
                Row(
                    name=f"drain {count} {mode}",
                    value=statistics.median(rates),
                    unit="MB/s",
                    low=min(rates),
                    high=max(rates),
                    baseline=statistics.median(total / 1e6 / one for one in bare),
                    ratio=share,
                    target="ratio ≥ 0.9" if wanted else "",
                    holds=share >= 0.9 if wanted else None,
                    note=f"{bench.programs.name}; ratios {min(shares):.2f}–{max(shares):.2f}",
                )
            )
    return rows


async def _drained(bench: Bench, host: Host, name: str, count: int, total: int, mode: str) -> float:
    flood = bench.flood(count, total // count)
    thread = await host.thread(name)
    ids = await start_all(thread, flood.child, count)
    await first_output(thread, ids)
    if mode == "detached":
        await thread.detach()
    flood.let_go()
    outcomes = await asyncio.gather(*(thread.wait(one) for one in ids))
    flood.close()
    if any(outcome.exit_code != 0 for outcome in outcomes):
        raise RuntimeError(f"{name}: the floods ended with {outcomes}")
    for one in await thread.processes(ended=True):
        if one.bytes_written != total // count + 1:
            raise RuntimeError(f"{name}: {one.bytes_written} bytes of {total // count + 1} arrived")
    await thread.shutdown(all=True)
    return flood.seconds()


async def control(bench: Bench) -> list[Row]:
    """`status` and `ps` while one child floods, attached and detached."""
    rows = []
    async with connect() as host:
        for mode in ("attached", "detached"):
            flood = bench.flood(1, ENDLESS)
            thread = await host.thread(mode)
            ids = await start_all(thread, flood.child, 1)
            await first_output(thread, ids)
            if mode == "detached":
                await thread.detach()
            flood.let_go()
            calls: dict[str, Callable[[], Awaitable[object]]] = {"status": host.status, "ps": host.processes}
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for _ in bench.repeat(1000, 200):
                for name, call in calls.items():
                    start = time.perf_counter()
                    await call()
                    taken[name].append((time.perf_counter() - start) * 1e3)
                await asyncio.sleep(0.001)  # a caller that never pauses measures only its own load
            await thread.kill(*ids, signal="KILL")
            await thread.shutdown(all=True)
            flood.close()
            for name, times in taken.items():
                slow = percentile(times, 0.99)
                rows.append(
                    Row(
                        name=f"{name} under flood, {mode}, p99",
                        value=slow,
                        unit="ms",
                        low=min(times),
                        high=max(times),
                        target="< 10 ms",
                        holds=slow < 10,
                        note=f"p50 {statistics.median(times):.2f} ms, {len(times)} calls",
                    )
                )
    return rows


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
