"""Events: what the broker tells whoever wants to hear it, and the recent ones for who comes later.

An event is two frames on the events socket: its topic, `delta` for output and `event` for all others, and a msgpack
map.  Each has event, seq (counts all), thread, process_id, call_id, at (RFC 3339 UTC), and

    begin                   pid, command (cut if it is long)
    delta                   n (counts per call), offset, chunk
    end                     outcome, output (its head and tail)
    detached, reattached
    worker                  what: up, with epoch and pid; died, with epoch and how
    broker                  what: up, down, replaced; pid
    wake                    what: pending, delivered, done, failed, dead, read, dropped; number, rule; failure

Always true
    A subscriber that does not read loses events, which it sees by their seq; it holds up nobody.
    What nobody listens to is not even packed: every process has two events.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack
import zmq

from ..common import messages, wire
from .records import rfc3339

# Events kept for `outlive events`, and bytes of those that it is given: half of what an answer can hold.
RECENT = 1000
RECENT_SIZE = 2 << 20


class Events:
    """The events of one broker."""

    def __init__(self, on_deltas: Callable[[bool], None]) -> None:
        """`on_deltas`: called when somebody wants output, the first, and when nobody does any more."""
        self.deltas_wanted = False
        self._on_deltas = on_deltas
        self._sequence = 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._topics: set[bytes] = set()
        self._port: wire.Port | None = None

    def serve(self, socket: zmq.Socket[bytes]) -> None:
        """Tell subscribers from now on, by this XPUB socket, which is ours to close."""
        self._port = wire.Port(socket, self._subscription)

    def publish(self, event: str, thread_id: str, process_id: str | None = None, **fields: Any) -> None:
        """Tell the subscribers, and remember it, unless it is output."""
        self._sequence += 1
        table = {
            "event": event,
            "seq": self._sequence,
            "thread": thread_id or None,
            "process_id": process_id,
            "call_id": fields.pop("call_id", None),
            "at": time.time_ns(),
            **fields,
        }
        topic = b"delta" if event == "delta" else b"event"
        if event != "delta":
            self._recent.append({name: value for name, value in table.items() if name != "output"})
        if self._is_wanted(topic):
            self._send(topic, _packed(_shown(table)))

    def recent(self) -> list[dict[str, Any]]:
        """Return the last events, oldest first, without any output: as many as an answer has room for."""
        latest: deque[dict[str, Any]] = deque()
        room = RECENT_SIZE
        for event in reversed(self._recent):
            room -= len(_packed(event))
            if room < 0:
                break
            latest.appendleft(_shown(event))
        return [*latest]

    def close(self) -> None:
        """Tell nobody any more."""
        if self._port:
            self._port.close()

    def _is_wanted(self, topic: bytes) -> bool:
        return any(topic.startswith(wanted) for wanted in self._topics)

    def _send(self, topic: bytes, body: bytes) -> None:
        if self._port:
            with suppress(zmq.ZMQError):
                self._port.send([topic, body])

    def _subscription(self, frames: list[bytes]) -> None:
        """XPUB tells who wants what: the first who wants a topic, and when nobody does any more.

        Whatever else a subscriber says comes this way, too: what begins with neither 1 nor 0 is of no topic.
        """
        for frame in frames:
            subscribed, topic = frame[:1] == b"\1", frame[1:]
            if frame[:1] not in (b"\0", b"\1"):
                continue
            if b"event".startswith(topic) or b"delta".startswith(topic):
                (self._topics.add if subscribed else self._topics.discard)(topic)
                if self.deltas_wanted != self._is_wanted(b"delta"):
                    self.deltas_wanted = not self.deltas_wanted
                    self._on_deltas(self.deltas_wanted)
            elif subscribed and topic.startswith(messages.READY_TOPIC):
                self._send(topic, b"")


def _shown(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event as it is shown: its time is written out only for who looks."""
    return {**event, "at": rfc3339(event["at"])}


def _packed(event: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(event, unicode_errors="surrogateescape")
    return packed
