"""What a child inherits of the signals that its spawner is deaf to: nothing."""

from __future__ import annotations

import pytest

import outlive


@pytest.mark.parametrize("tty", [True, False])
async def test_a_child_ignores_and_blocks_no_signal(host: outlive.Host, tty: bool) -> None:
    thread = await host.thread("t")
    reply = await thread.exec_command(["/bin/grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"], tty=tty)
    masks = dict(line.split(":\t") for line in reply.output.splitlines())
    # The last 31 bits: the others are real-time signals, two of which the C library keeps for itself.
    assert {name: int(mask, 16) & 0x7FFFFFFF for name, mask in masks.items()} == {"SigIgn": 0, "SigBlk": 0}
