"""Types as JSON Schema, and arguments that do not fit them as sentences that a model can act on.

Always true
    A wrong argument is named, with its value and with what it is for.
    `null` means that an argument is not given: models write it for what is optional.
    A number that is written as text counts: models do that, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec

from ...common.errors import BadRequest, shown

T = TypeVar("T", bound=msgspec.Struct)

_WHERE = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?", re.DOTALL)


@cache
def schema_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the JSON Schema of a type, with `type: object` at its root, as MCP wants it."""
    _, parts = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    root = parts.pop(kind.__name__)
    schema = {name: value for name, value in root.items() if name not in ("title", "description")}
    return {**schema, "$defs": parts} if parts else schema


def understood(kind: type[T], arguments: object) -> T:
    """Return the arguments as their type; raises `BadRequest`, which names field, value and remedy."""
    if not isinstance(arguments, Mapping):
        raise BadRequest(f"arguments: {shown(arguments)}; use an object, such as {{}}")
    given = {name: value for name, value in arguments.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise BadRequest(_half(name[:80], value))
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(_explained(kind, given, str(error))) from None
    except UnicodeEncodeError as error:  # in a name, or deep in a value
        raise BadRequest(
            f"arguments: {shown(error.object)}: has half a character in it, which no text can have"
        ) from None


def _half(where: str, text: str) -> str:
    return f"{where}: {shown(text)}: has half a character in it, which no text can have"


def _explained(kind: type[msgspec.Struct], given: Mapping[str, Any], message: str) -> str:
    found = _WHERE.fullmatch(message)
    what, path = (found["what"], found["path"] or "") if found else (message, "")
    properties = schema_of(kind)["properties"]
    field = re.split(r"[.\[]", path)[0]
    if not field:  # what is said of the whole names its field itself
        field = what.rpartition(" ")[2].strip("`")
        if field not in properties:
            return f"{field[:80]}: there is no such argument; use {', '.join(properties) or 'none'}"
        return f"{field}: missing. {properties[field]['description']}"
    wrong = what[:1].lower() + what[1:].replace("`", "")
    return f"{field}: {_value(given[field])}: {wrong}. {properties[field]['description']}"


def _value(value: object) -> str:
    """Return a value for a sentence, short whatever it is."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value[:5]))}{', …' if len(value) > 5 else ''}]"
    return shown(value)
