"""The configuration file: a few limits, with defaults that suit most people.

A missing file is fine; a wrong one is an error that names the field, never half-read.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .errors import BadRequest, shown


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `config.toml` may say.

    max_processes       processes a thread may hold at once.
    warn_at             from how many on the agent is warned.
    when_full           `prune` the least recently used one, or `refuse` rather than end a live one.
    ended_keep_hours    how long an ended process answers.
    ended_keep_count    how many ended processes of a thread answer.
    idle_sleep_s        seconds without a call after which a thread goes to bed, unless its program runs; 0: never.
    journal_max_mb      how much is kept of all of them together.
    pump                `auto`: splice where the kernel can; `copied` forces the lossy fallback, for tests.
    seed                makes process ids predictable, for tests.
    """

    max_processes: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 64
    warn_at: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 60
    when_full: Literal["prune", "refuse"] = "prune"
    ended_keep_hours: Annotated[float, msgspec.Meta(ge=0, le=1_000_000)] = 24.0
    ended_keep_count: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 1000
    idle_sleep_s: Annotated[float, msgspec.Meta(ge=0, le=1_000_000_000)] = 0.0
    journal_max_mb: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1024
    pump: Literal["auto", "copied"] = "auto"
    seed: int | None = None


def load(path: Path) -> Config:
    """Read `path`; raises `BadRequest` naming the file, the field and what it may be."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadRequest(f"configuration {path}: it is no file; move it away, or put one there")
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Config()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"configuration {path}: {error}") from None
    import tomllib  # only for those who have a file

    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise BadRequest(f"configuration {path}: {error}") from None
    try:
        return msgspec.convert(table, Config, strict=True)
    except msgspec.ValidationError as error:
        raise BadRequest(f"configuration {path}: {_complaint(str(error), table)}") from None


def _complaint(error: str, table: dict[str, Any]) -> str:
    """Return what msgspec says about a field with its value, or which fields there are."""
    wanted, _, place = error.partition(" - at `$.")
    name = place.rstrip("`")
    if place and name in table:
        return f"{name} is {shown(table[name])}; {wanted[:1].lower()}{wanted[1:]}"
    return f"{error}; there are {', '.join(Config.__struct_fields__)}"
