"""The input calls that this worker knows: those under way, and the last ones that were answered.

A client that loses its broker during `write_stdin` asks again with the same `write_id`.  By then the input may have
been typed, and the answer lost on its way; the repetition joins the call, or gets the same answer.

Always true
    The input of one write id is typed at most once by this worker, also when the call failed.
    What is remembered is bounded, in calls and in bytes; the newest answer is kept whatever its size.

Not here
    Who else may have typed it (a former worker, the broker): `processes` compares `first_asked` with how long it
    has held the process, and with `forgotten_until`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from dataclasses import dataclass

from ..common import kernel
from ..common.response import Response

# Answers kept.  A repetition comes within seconds, and a caller has one call under way at a time.
ANSWERS_MAX = 64
# Bytes of output in them: an answer of the default size takes at most 40 KB.
BYTES_MAX = 4 << 20


@dataclass(slots=True)
class Write:
    """One input call: how many bytes it was to type, and what it is or will be answered."""

    size: int
    answer: asyncio.Future[Response]
    bytes: int = 0


class Writes:
    """The calls by their write id, oldest first.

    `forgotten_until`: when (`CLOCK_BOOTTIME`) the last call was forgotten; an unknown id of a call that began
    later never came here.
    """

    def __init__(self) -> None:
        self.forgotten_until = 0.0
        self._under_way: dict[str, Write] = {}
        self._answered: dict[str, Write] = {}
        self._bytes = 0

    def get(self, write_id: str) -> Write | None:
        """Return what is known of a call."""
        return self._under_way.get(write_id) or self._answered.get(write_id)

    async def once(self, write_id: str, size: int, work: Awaitable[Response]) -> Response:
        """Do the work of a call that is not known yet, and remember how it went."""
        write = Write(size, asyncio.get_running_loop().create_future())
        self._under_way[write_id] = write
        try:
            response = await work
        except BaseException as error:
            if isinstance(error, Exception):
                write.answer.set_exception(error)
                write.answer.exception()  # seen: nobody has to ask again
            else:
                write.answer.cancel()
            raise
        else:
            write.answer.set_result(response)
            write.bytes = sys.getsizeof(response.output)
            return response
        finally:
            del self._under_way[write_id]
            self._remember(write_id, write)

    def _remember(self, write_id: str, write: Write) -> None:
        self._answered[write_id] = write
        self._bytes += write.bytes
        while len(self._answered) > ANSWERS_MAX or (self._bytes > BYTES_MAX and len(self._answered) > 1):
            self._bytes -= self._answered.pop(next(iter(self._answered))).bytes
            self.forgotten_until = kernel.boottime()
