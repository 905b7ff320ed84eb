"""The program of a thread that is woken: the effect of each wake is a process of its own, started by a named call.

Two files in its folder, THREAD.deliveries and THREAD.effects; a line is RUN FAILURES WAKE PROCESS RULE WHAT.  A run
leaves its lines among the deliveries when it begins.  The effects are written by the processes: a call that is
repeated counts once, so that whatever is run again, a line too many is a wake too many.
"""

from __future__ import annotations

from pathlib import Path

from outlive import Session, Wake
from outlive.common.program import WakeMatch

# Leave a line, end.
EFFECT = 'echo "$1" >>"$2"'


def line_of(wake: Wake, match: WakeMatch) -> str:
    """Return what is left of one wake."""
    what = match.text if match.outcome is None else match.outcome.get("code", match.outcome["kind"])
    return f"{wake.run} {wake.attempt} {match.number} {match.process_id} {match.rule} {what}"


async def main(session: Session, wake: Wake) -> None:
    """Let every wake have its effect."""
    matches = [match for match in wake.matches if match.process_id]
    _deliver(wake, matches)
    for match in matches:
        argv = ["/bin/sh", "-c", EFFECT, "sh", line_of(wake, match), f"{wake.thread}.effects"]
        await session.exec_command(argv, call_id=f"effect-{match.number}")


def _deliver(wake: Wake, matches: list[WakeMatch]) -> None:
    with Path(f"{wake.thread}.deliveries").open("ab", buffering=0) as deliveries:
        deliveries.write("".join(f"{line_of(wake, match)}\n" for match in matches).encode())
