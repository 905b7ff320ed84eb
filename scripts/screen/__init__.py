"""The rendered screen: what a process's terminal shows, made from its transcript.

    async with Screens() as screens:
        screen = await screens.of(thread, "4711")     # again and again: only what is new is rendered
    screen = await screen_of(thread, "4711")          # once

A terminal emulator is large and is fed by strangers, so it runs in a process of its own, which holds nothing but
what it draws: a byte stream that takes it down costs an error message.

Read in this order; a module imports only from those above it.
    emulator    what an emulator is, and which one is taken.
    ghostty     the native one, libghostty-vt.
    grid        the fallback, pyte, with a parser of ours.
    renderer    the process they run in, and its frames.
    screens     reads transcripts, has them rendered, and says what the screens show.

Not here
    Typing, resizing and waiting: `common.client`.  Colours: a screen is text and a cursor.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .screens import Cursor, Screen, Screens, screen_of

__all__ = ["Cursor", "Screen", "Screens", "screen_of"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.screens"), name)
