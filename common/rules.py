"""Wake rules: what may come true of a process, how that is written, and when its output matches.

    exit              it has ended, in whatever way
    output=RE         it has printed something that RE matches
    silence=SECONDS   it has printed nothing for so long
    port=N            something listens on this TCP port of this host
    deadline=SECONDS  so much time has passed since the rule was set

In Python and JSON they are `"exit"`, `{"output": RE}`, `{"silence": 30}`, `{"port": 8000}`, `{"deadline": 3600}`.
The text of a rule (`str`) is its identity; it is what headers, messages and the journal hold.

Expressions are RE2's: linear in the text, whatever is asked, with a bound on memory.  They match bytes; `^` and `$`
are the ends of a line.  A terminal ends its lines with CR LF, and RE2 takes the CR for part of the line.

Always true
    Whether an expression matches does not depend on where the output was cut into pieces: matches of up to
    `MATCH_MAX` bytes are found across every border, and nothing is called a match that the next byte could undo.
    Without an output rule nothing here loads RE2.

Not here
    When rules come true: `scanner` (output), `broker.watches` (all others).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .errors import BadRequest, shown

if TYPE_CHECKING:
    import re2

# Bytes of a match that is found for certain; a longer one may be found or not.
MATCH_MAX = 4096
# Bytes of an expression, and of memory for what is made of it.
PATTERN_MAX = 1000
PATTERN_MEMORY = 1 << 20
# Rules that a process may have at once, and how many of them about its output: the header has room for so many.
RULES_MAX = 16
OUTPUTS_MAX = 8
# Seconds.  A rule about less would cost more wake-ups than it is worth; ten years are for ever.
SECONDS_MIN = 0.1
SECONDS_MAX = 315_360_000
# What may follow the output, as far as an expression can tell: a letter, the end of a line, anything else.
_NEXT = (b"a", b"\n", b" ")

KINDS = "exit, output=RE, silence=SECONDS, port=N or deadline=SECONDS"


@dataclass(frozen=True, slots=True)
class Exit:
    """It has ended."""

    def __str__(self) -> str:
        return "exit"

    def to_wire(self) -> str:
        """Return the form of Python and JSON."""
        return "exit"


@dataclass(frozen=True, slots=True)
class Output:
    """It has printed something that `pattern` matches."""

    pattern: str

    def __str__(self) -> str:
        return f"output={self.pattern}"

    def to_wire(self) -> dict[str, Any]:
        """Return the form of Python and JSON."""
        return {"output": self.pattern}


@dataclass(frozen=True, slots=True)
class Silence:
    """It has printed nothing for `seconds`."""

    seconds: float

    def __str__(self) -> str:
        return f"silence={_number(self.seconds)}"

    def to_wire(self) -> dict[str, Any]:
        """Return the form of Python and JSON."""
        return {"silence": self.seconds}


@dataclass(frozen=True, slots=True)
class Port:
    """Something listens on TCP port `number`."""

    number: int

    def __str__(self) -> str:
        return f"port={self.number}"

    def to_wire(self) -> dict[str, Any]:
        """Return the form of Python and JSON."""
        return {"port": self.number}


@dataclass(frozen=True, slots=True)
class Deadline:
    """`seconds` have passed since the rule was set."""

    seconds: float

    def __str__(self) -> str:
        return f"deadline={_number(self.seconds)}"

    def to_wire(self) -> dict[str, Any]:
        """Return the form of Python and JSON."""
        return {"deadline": self.seconds}


Rule = Exit | Output | Silence | Port | Deadline


def rule_of(value: object) -> Rule:
    """Understand a rule as Python and JSON write it, or one that is a rule already; raises `BadRequest`."""
    if isinstance(value, Exit | Output | Silence | Port | Deadline):
        value = value.to_wire()
    if value == "exit":
        return Exit()
    if not isinstance(value, Mapping) or len(value) != 1:
        raise BadRequest(
            f'wake rule {shown(value)}: use "exit", or one of {{"output": RE}}, {{"silence": SECONDS}}, '
            '{"port": N}, {"deadline": SECONDS}'
        )
    ((kind, content),) = value.items()
    if kind == "output":
        if not isinstance(content, str):
            raise BadRequest(f"wake rule output: {shown(content)} is no expression; use text")
        return _output(content)
    if kind in ("silence", "deadline"):
        return _clock(kind, content)
    if kind == "port":
        return _port(content)
    raise BadRequest(
        f"wake rule {shown(kind)}: there is none of this name; use exit, output, silence, port, deadline"
    )


def parse(text: str) -> Rule:
    """Understand the text of a rule, as the command line takes it; raises `BadRequest`."""
    kind, equals, content = text.partition("=")
    if text == "exit":
        return Exit()
    if kind not in ("output", "silence", "port", "deadline") or not equals:
        raise BadRequest(f"wake rule {text[:40]!r}: use {KINDS}")
    if kind == "output":
        return _output(content)
    if kind == "port":
        return _port(int(content) if content.isascii() and content.isdecimal() else content)
    try:
        return _clock(kind, float(content))
    except ValueError:
        return _clock(kind, content)


def rules_of(values: Iterable[object]) -> list[Rule]:
    """Understand several rules in the form of Python and JSON, each once; raises `BadRequest`."""
    if isinstance(values, str | Mapping):
        raise BadRequest(f"wake rules {shown(values)}: use a list of rules")
    return _checked(rule_of(value) for value in values)


def parse_all(texts: Iterable[str]) -> list[Rule]:
    """Understand the texts of several rules, each once; raises `BadRequest`."""
    return _checked(parse(text) for text in texts)


def known(texts: Iterable[str]) -> list[Rule | None]:
    """Understand the texts in a header, in their places; `None` for one that this code does not know."""
    found: list[Rule | None] = []
    for text in texts:
        try:
            found.append(parse(text))
        except BadRequest:  # of a newer program, or damaged: the process is worth more than the rule
            found.append(None)
    return found


def _checked(rules: Iterable[Rule]) -> list[Rule]:
    once = list(dict.fromkeys(rules))
    outputs = sum(isinstance(rule, Output) for rule in once)
    if len(once) > RULES_MAX or outputs > OUTPUTS_MAX:
        raise BadRequest(
            f"wake rules: {len(once)}, of them {outputs} about output; a process may have {RULES_MAX}, of them "
            f"{OUTPUTS_MAX} about output"
        )
    return once


def _output(pattern: str) -> Output:
    size = len(pattern.encode("utf-8", "surrogateescape"))
    if not 1 <= size <= PATTERN_MAX:
        raise BadRequest(f"wake rule output: the expression has {size} bytes; use 1 to {PATTERN_MAX}")
    if compiled(pattern).search(b""):
        raise BadRequest(
            f"wake rule output: {pattern[:40]!r} matches nothing at all, so it is true at once; ask for a text"
        )
    return Output(pattern)


def _clock(kind: str, content: object) -> Silence | Deadline:
    sound = isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content)
    if not sound or not SECONDS_MIN <= content <= SECONDS_MAX:  # type: ignore[operator]
        raise BadRequest(f"wake rule {kind}: {shown(content)}; use {SECONDS_MIN} to {SECONDS_MAX} seconds")
    seconds = float(content)  # type: ignore[arg-type]
    return Silence(seconds) if kind == "silence" else Deadline(seconds)


def _port(content: object) -> Port:
    if type(content) is not int or not 1 <= content <= 65_535:
        raise BadRequest(f"wake rule port: {shown(content)}; use a TCP port, 1 to 65535")
    return Port(content)


def _number(seconds: float) -> str:
    return str(int(seconds)) if seconds == int(seconds) else repr(seconds)


@lru_cache(maxsize=256)
def compiled(pattern: str) -> re2._Regexp:
    """Return what searches for an expression; raises `BadRequest`."""
    import re2

    options = re2.Options()
    options.max_mem = PATTERN_MEMORY
    options.never_capture = True
    options.log_errors = False
    try:
        return re2.compile(b"(?m)" + pattern.encode("utf-8", "surrogateescape"), options)
    except re2.error as error:
        said = error.args[0]
        why = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        raise BadRequest(
            f"wake rule output: {pattern[:40]!r} is no expression of RE2's: {why}; it has no look-around and no "
            "back-references"
        ) from None


def window(scanned: int) -> int:
    """Return where the next window begins, when everything before `scanned` has been searched.

    A match that ends at the border may have been undecided; one byte more tells what goes before it.
    """
    return max(0, scanned - MATCH_MAX - 1)


def search(pattern: str, window: bytes, start: int, *, final: bool) -> tuple[int, int] | None:
    """Return where in `window` an expression matches, from `start` on; `None` where it does not, or may not.

    What is before `start` is only looked at as what goes before.  `final`: nothing will follow the window; else a
    match that touches its end counts if it stands whatever follows.
    """
    expression = compiled(pattern)
    found = expression.search(window, start)
    if found is None:
        return None
    size = len(window)
    if not final and found.end() == size:
        if not all(expression.search(window + following, start, size) for following in _NEXT):
            return None
    return found.start(), found.end()
