"""An agent that looks after a slow test run: it starts it, sleeps, is woken, reads the failure, reruns one test.

    outlive start tests scripts/examples/babysitter.py:main
    outlive events -f

While the tests run there is no process of this agent at all, only a wake rule in the broker.  Whatever is killed in
between, it is woken once, with the outcome.  `decide` stands for a model: it is shown what happened, and says what
to do next.  What it has done so far is in `babysitter.log`, in the directory of `outlive start`.
"""

from __future__ import annotations

import re
from pathlib import Path

import outlive

SUITE = str(Path(__file__).with_name("suite.sh"))


def decide(reason: str, exit_code: int | None, output: str) -> list[str] | None:
    """Return the next command; `None`: nothing is left to do."""
    if reason == "start":
        return ["sh", SUITE]
    if exit_code != 0 and (failed := re.search(r"FAILED (\w+)", output)):
        return ["sh", SUITE, failed[1]]
    return None


async def main(session: outlive.Session, wake: outlive.Wake) -> None:
    """Carry on: called by `outlive start`, and again whenever a process that we wait for has ended."""
    exit_code, output = None, ""
    for match in wake.matches:
        if match.process_id:
            answer = await session.write_stdin(match.process_id)  # its end, and what was not read of it
            exit_code, output = answer.exit_code, answer.output
            note(f"exit code {exit_code}: {output.splitlines()[-1]}")
    command = decide(wake.reason, exit_code, output)
    if command is None:
        note("all is well")
        return
    await session.exec_command(command, wake_on=["exit"], yield_time_ms=250)
    note(f"started {' '.join(command[2:]) or 'everything'}")


def note(text: str) -> None:
    """Write a line into the log."""
    with open("babysitter.log", "a") as log:
        log.write(text + "\n")
