"""What a call becomes: the argv and the environment of a child.  Decides; starts nothing.

Children inherit the caller's environment, not ours, plus a few variables that make programs print plainly, plus
what the call itself sets, plus the three names by which a child and its tree are known.
"""

from __future__ import annotations

import os

from ..common import launch
from ..common.errors import BadRequest
from ..common.messages import ExecCommand
from ..common.transcript import Facts

# What children get unless the call sets it: programs should print for a reader that is no terminal.
PLAIN_ENVIRONMENT: dict[bytes, bytes] = {
    b"NO_COLOR": b"1",
    b"TERM": b"dumb",
    b"LANG": b"C.UTF-8",
    b"LC_CTYPE": b"C.UTF-8",
    b"LC_ALL": b"C.UTF-8",
    b"COLORTERM": b"",
    b"PAGER": b"cat",
    b"GIT_PAGER": b"cat",
    b"GH_PAGER": b"cat",
}


def environment_of(call: ExecCommand, facts: Facts) -> dict[bytes, bytes]:
    """Return the environment of a child; what the call sets wins over what makes programs print plainly."""
    # Whoever carries what is only for our own processes is never signalled.
    ours = launch.ROLE, launch.LIMITS
    given = call.environment | PLAIN_ENVIRONMENT | call.overrides
    known_by = {
        launch.THREAD: facts.thread_id.encode(),
        launch.PROCESS: facts.process_id.encode(),
        launch.MARK: facts.mark.encode(),
    }
    return {name: value for name, value in given.items() if name not in ours} | known_by


def command_line(call: ExecCommand) -> list[bytes]:
    """Return the argv of a call; a shell command line gets the caller's shell, as a login shell by default."""
    if isinstance(call.cmd, list):
        if not call.cmd or not call.cmd[0]:
            raise BadRequest("cmd: missing command line; give at least the program")
        argv = call.cmd
    else:
        if not call.cmd.strip():
            raise BadRequest("cmd: missing command line for exec_command")
        shell = call.shell or _usual_shell(call.environment)
        argv = [shell, b"-lc" if call.login else b"-c", os.fsencode(call.cmd)]
    if b"\0" in b"".join(argv) + call.workdir:
        raise BadRequest("cmd or workdir: contains a NUL byte, which no program can be given")
    for variables in (call.environment, call.overrides):
        if b"" in variables or b"=" in b"".join(variables) or b"\0" in b"".join((*variables, *variables.values())):
            wrong = next(n for n, value in variables.items() if not n or b"=" in n or b"\0" in n + value)
            raise BadRequest(f"environment: {wrong!r:.80} is no name a variable can have, or holds a NUL byte")
    return argv


def _usual_shell(environment: dict[bytes, bytes]) -> bytes:
    for shell in (environment.get(b"SHELL", b""), b"/bin/bash"):
        if shell.startswith(b"/") and os.access(shell, os.X_OK):
            return shell
    return b"/bin/sh"
