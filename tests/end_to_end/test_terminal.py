"""What a terminal does, through ours: bytes both ways, sizes, signals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import outlive

from .conftest import PYTHON, Home, eventually

EVERY_BYTE = bytes(range(256)) * 8


async def said(thread: outlive.Thread, process_id: str, wanted: bytes) -> bytes:
    """Return all output once it contains `wanted`."""
    while wanted not in (text := await thread.output(process_id)):
        await thread.read_output(process_id, len(text), wait_ms=5000)
    return text


@pytest.mark.parametrize("tty", [True, False])
async def test_binary_output_is_kept_byte_for_byte(host: outlive.Host, tmp_path: Path, tty: bool) -> None:
    (tmp_path / "bytes").write_bytes(EVERY_BYTE)
    thread = await host.thread("binary")
    raw = "stty raw; " if tty else ""
    child = await thread.exec_command(["sh", "-c", f"{raw}cat {tmp_path}/bytes"], tty=tty)
    assert await thread.output(child.process_id) == EVERY_BYTE


async def test_binary_input_is_typed_byte_for_byte_also_while_detached(
    home: Home, host: outlive.Host, tmp_path: Path
) -> None:
    thread = await host.thread("typed")
    target = tmp_path / "got"
    line = f"stty raw -echo; echo ready; exec head -c {3 * len(EVERY_BYTE)} >{target}"
    child = await thread.exec_command(["sh", "-c", line], tty=True, yield_time_ms=250)
    await said(thread, child.process_id, b"ready")
    assert (await thread.write_stdin(child.process_id, EVERY_BYTE)).typed == len(EVERY_BYTE)
    await thread.detach()
    assert (await thread.write_stdin(child.process_id, EVERY_BYTE, resume=False)).typed == len(EVERY_BYTE)
    await thread.write_stdin(child.process_id, EVERY_BYTE)
    assert await thread.wait(child.process_id) == outlive.Outcome("exited", code=0)
    assert target.read_bytes() == 3 * EVERY_BYTE


async def test_a_resize_is_seen_by_the_child_attached_and_detached(host: outlive.Host) -> None:
    thread = await host.thread("size")
    script = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
while True:
    print(os.get_terminal_size().lines, os.get_terminal_size().columns, flush=True)
    signal.sigwait({signal.SIGWINCH})
"""
    child = await thread.exec_command([*PYTHON, script], tty=True, size=(91, 31), yield_time_ms=250)
    await said(thread, child.process_id, b"31 91\r\n")
    answer = await thread.resize(child.process_id, 132, 50)
    assert (answer["columns"], answer["rows"]) == (132, 50)
    await said(thread, child.process_id, b"50 132\r\n")
    await thread.detach()
    await thread.resize(child.process_id, 40, 10)
    await said(thread, child.process_id, b"10 40\r\n")
    pipes = await thread.exec_command(["sleep", "1000"], yield_time_ms=250)
    with pytest.raises(outlive.BadRequest, match="no terminal"):
        await thread.resize(pipes.process_id, 80, 24)


async def test_a_signal_to_the_foreground_group_spares_the_shell(host: outlive.Host) -> None:
    thread = await host.thread("foreground")
    shell = await thread.exec_command(["bash", "--norc", "-i"], tty=True, yield_time_ms=250)
    await thread.write_stdin(shell.process_id, "sh -c 'echo be\"\"gun; exec sleep 1000'; echo status=$?\n")
    await said(thread, shell.process_id, b"begun")
    await thread.kill(shell.process_id, signal="QUIT", foreground=True)
    await said(thread, shell.process_id, b"status=131")
    await thread.write_stdin(shell.process_id, "sh -c 'echo ag\"\"ain; exec sleep 1000'; echo status=$?\n")
    await said(thread, shell.process_id, b"again")
    await thread.write_stdin(shell.process_id, "\x03")  # after which bash forgets the rest of the line
    await thread.write_stdin(shell.process_id, "echo now=$?\n")
    await said(thread, shell.process_id, b"now=130")
    assert [row.process_id for row in await thread.processes()] == [shell.process_id]


async def test_ctrl_c_gets_past_input_that_the_program_does_not_read(host: outlive.Host) -> None:
    thread = await host.thread("deaf")
    line = "trap 'echo caught; exit 6' INT; echo ready; while :; do sleep 0.01; done"
    child = await thread.exec_command(["bash", "-c", line], tty=True, yield_time_ms=250)
    await said(thread, child.process_id, b"ready")
    answer = await thread.write_stdin(child.process_id, b"y\n" * 60_000)
    assert answer.typed < 120_000
    assert any("not read" in warning for warning in answer.warnings)
    await thread.write_stdin(child.process_id, "\x03")
    assert await thread.wait(child.process_id) == outlive.Outcome("exited", code=6)


async def test_a_child_that_closes_its_terminal_and_opens_it_again_is_read_on(host: outlive.Host) -> None:
    thread = await host.thread("reopen")
    script = """
import os
terminal = os.ttyname(0)
os.write(1, b"before\\n")
for fd in (0, 1, 2):
    os.close(fd)
os.write(os.open(terminal, os.O_RDWR), b"after\\n")
os._exit(8)
"""
    answer = await thread.exec_command([*PYTHON, script], tty=True)
    assert (answer.output, answer.exit_code) == ("before\r\nafter\r\n", 8)


async def test_yes_leaves_memory_bounded_and_is_killed(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("yes")
    children = [await thread.exec_command(["yes"], tty=tty, yield_time_ms=250) for tty in (True, False)]

    async def flooded(size: int) -> None:
        for child in children:
            seen = (await thread.read_output(child.process_id, 0)).written
            wanted = seen + size
            while seen < wanted:
                seen = (await thread.read_output(child.process_id, seen, wait_ms=5000)).written

    def weight() -> int:
        """Memory of broker, worker and transcripts, in bytes; the transcripts by their blocks."""
        pids = [*home.pids("broker"), *home.pids("worker")]
        anonymous = sum(
            int(line.split()[1]) * 1024
            for pid in pids
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("RssAnon")
        )
        (broker,) = home.pids("broker")
        blocks = 0
        for fd in os.listdir(f"/proc/{broker}/fd"):
            path = f"/proc/{broker}/fd/{fd}"
            if "memfd:" in os.readlink(path):
                kept = os.stat(path).st_blocks * 512
                assert kept < 3 << 20  # head, unread, tail, and the slack before a trim
                blocks += kept
        assert blocks
        return anonymous + blocks

    await flooded(4 << 20)
    before = weight()
    await flooded(12 << 20)
    assert weight() - before < 6 << 20
    await thread.kill(*(child.process_id for child in children), signal="KILL")
    for child in children:
        assert await thread.wait(child.process_id) == outlive.Outcome("signaled", signal=9, by="caller")
    await eventually(lambda: not [pid for pid in home.pids() if _name(pid) == "yes"])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@pytest.mark.parametrize("data", [b"\xff" * 1_600_000, b"\0" * 1_600_000, "€".encode() * 500_000])
async def test_the_largest_answer_that_can_be_asked_for_arrives(
    host: outlive.Host, tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "data").write_bytes(data)
    thread = await host.thread("large")
    answer = await thread.exec_command(["cat", f"{tmp_path}/data"], max_output_tokens=1_000_000)
    assert answer.exit_code == 0
    # What a transcript keeps of an ended process, in full.
    kept = len(data[: 1 << 20].decode(errors="replace"))
    assert kept - 4 < len(answer.output) < kept + 60
