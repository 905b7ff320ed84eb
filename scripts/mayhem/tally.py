"""What one run counts, what of it must be zero, and how it is shown.

Always true
    A run is clean only if every one of `ZEROS` is zero.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field

from .. import flood

# Complaints kept as evidence.
EVIDENCE = 40


@dataclass
class Tally:
    """What happened, then what must be zero."""

    kills: int = 0
    kills_of_workers: int = 0
    kills_of_brokers: int = 0
    kills_of_keepers: int = 0
    kills_before_up: int = 0
    kills_per_second: float = 0.0
    seconds: float = 0.0
    upgrades: int = 0
    upgrades_refused: int = 0
    children: int = 0
    commands: int = 0
    ended_unheld: int = 0
    inputs: int = 0
    inputs_asked_again: int = 0
    handoffs: int = 0
    wakes_expected: int = 0
    wakes_delivered_again: int = 0
    woken_after_ms: float = 0.0
    runs: int = 0
    answered_after_ms: float = 0.0
    answered_at_latest_ms: float = 0.0
    bytes_expected: int = 0
    bytes_compared: int = 0
    lost: int = 0
    repeated: int = 0
    out_of_order: int = 0
    processes_lost: int = 0
    outcomes_wrong: int = 0
    descriptors_leaked: int = 0
    commands_run_twice: int = 0
    inputs_lost_or_repeated: int = 0
    wakes_lost: int = 0
    wakes_doubled: int = 0
    calls_failed: int = 0
    left_running: int = 0
    mischief: dict[str, int] = field(default_factory=dict)
    evidence: list[str] = field(default_factory=list)

    ZEROS = (
        "lost",
        "repeated",
        "out_of_order",
        "processes_lost",
        "outcomes_wrong",
        "descriptors_leaked",
        "commands_run_twice",
        "inputs_lost_or_repeated",
        "wakes_lost",
        "wakes_doubled",
        "calls_failed",
        "left_running",
    )

    def __post_init__(self) -> None:
        self._answers: list[float] = []
        self._wakes: list[float] = []

    @property
    def clean(self) -> bool:
        """Whether nothing went wrong."""
        return not any(getattr(self, name) for name in self.ZEROS)

    def count(self, name: str, amount: int, why: str) -> None:
        """Count something that must not happen, if it did, and keep the evidence."""
        if amount:
            setattr(self, name, getattr(self, name) + int(amount))
            if len(self.evidence) < EVIDENCE:
                self.evidence.append(f"{name} +{int(amount)}: {why}")

    def answered(self, seconds: float) -> None:
        """Take note of how long after a broker's death a call was answered."""
        self._answers.append(seconds * 1000)
        self.answered_after_ms = round(statistics.median(self._answers), 1)
        self.answered_at_latest_ms = round(max(self._answers), 1)

    def woken(self, seconds: float) -> None:
        """Take note of how long after what it waits for a thread's program had done its work."""
        self._wakes.append(seconds * 1000)
        self.woken_after_ms = round(statistics.median(self._wakes), 1)

    def check_output(self, who: str, expected: int, written: int) -> None:
        """Compare how much a child printed with how much it should have."""
        self.count("lost", max(0, expected - written), f"{who}: {written} bytes of {expected}")
        self.count("repeated", max(0, written - expected), f"{who}: {written} bytes of {expected}")

    def check_piece(self, who: str, tag: int, offset: int, data: bytes) -> None:
        """Compare a piece of a flood's transcript with what the child printed there."""
        self.bytes_compared += len(data)
        if wrong := flood.misplaced(tag, offset, data):
            # A loss or a repetition shifts what follows; only its size tells how much was lost.
            wrong = flood.disordered(tag, data) or wrong
            self.count("out_of_order", wrong, f"{who}: at offset {offset} of {len(data)} bytes")

    def check_text(self, who: str, right: bytes, found: bytes) -> None:
        """Compare all that a child printed with what it should have."""
        self.bytes_expected += len(right)
        self.bytes_compared += len(found)
        self.check_output(who, len(right), len(found))
        if len(right) == len(found):
            self.count("out_of_order", len(right) * (right != found), f"{who}: other output, {found[:60]!r}")


def report(tally: Tally, as_json: bool) -> None:
    """Print the counts on stdout and the evidence on stderr."""
    table = asdict(tally)
    evidence, mischief = table.pop("evidence"), table.pop("mischief")
    if as_json:
        print(json.dumps({**table, "mischief": mischief, "evidence": evidence}))
    else:
        for name, value in table.items():
            print(f"{name.replace('_', ' '):26}{value:>14}")
        for name, times in sorted(mischief.items()):
            print(f"  {name:60}{times:>6}")
    for line in evidence:
        print(line, file=sys.stderr)
