"""What the README shows as code, run as it is written there."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

import outlive

from .conftest import Home

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(title: str, language: str) -> list[str]:
    """Return the code under a heading."""
    text = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where `make test` fails after a moment; the `outlive` under test is in the PATH."""
    if not shutil.which("make"):
        pytest.skip("the README's tests are run by make, which is not installed")
    (tmp_path / "Makefile").write_text("test:\n\t@sleep 1; echo 1 failed; exit 3\n")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def run(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode()


async def test_the_agent_is_woken_with_the_outcome_of_its_tests(
    folder: Path, home: Home, host: outlive.Host
) -> None:
    (agent,) = blocks("Threads that sleep until something happens", "python")
    (lines,) = blocks("Threads that sleep until something happens", "sh")
    (folder / "agent.py").write_text(agent)
    start, wakes = lines.splitlines()
    await run("sh", "-c", start)
    await home.until(host, event="wake", what="done", rule="exit")
    assert re.search(r"^1 failed\nmake: .*\n 2$", host.paths.log.read_text(), re.MULTILINE)
    assert (await run("sh", "-c", wakes)).count("done") == 2


async def test_the_session_in_python_ends_with_its_answer(folder: Path, home: Home, host: outlive.Host) -> None:
    (program,) = blocks("Python", "python")
    printed = await run(sys.executable, "-c", program)
    assert "1 failed" in printed
    await host.down(force=True)
