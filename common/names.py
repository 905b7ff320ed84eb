"""What may be a name: of a thread, of a process, of a socket in the file system.

Not here
    Which folders and files a broker has: `paths`.  The spawner uses this module and must stay light.
"""

from __future__ import annotations

import os
import re

from .errors import BadRequest

_THREAD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# The process ids given at random; when they run out, counting goes on from the next one.
RANDOM_IDS = range(1000, 100_000)
# Ten digits: they are counted one at a time.
_PROCESS = re.compile(r"[1-9][0-9]{0,9}")

# Bytes in `sockaddr_un.sun_path`, less the final zero.
_SOCKET_PATH_MAX = 107


def check_thread(name: str) -> str:
    """Return `name` if a thread may be called that; else raise `BadRequest`."""
    if not _THREAD.fullmatch(name):
        raise BadRequest(
            f"thread {_shown(name)}: a name has 1 to 64 characters of A-Z a-z 0-9 . _ - "
            "and starts with a letter or a digit"
        )
    return name


def check_process(process_id: str) -> str:
    """Return `process_id` if it can be one; else raise `BadRequest`."""
    if not _PROCESS.fullmatch(process_id):
        raise BadRequest(f"process {_shown(process_id)}: a process id is a number, as `outlive ps` shows it")
    return process_id


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:60]!r}… ({len(text)} characters)"


class SocketPath:
    """A socket's path of any length: beyond the kernel's 107 bytes it is reached through its folder.

    The text is valid until `close`; ZeroMQ connects only after `connect` has returned.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        folder, name = os.path.split(path)
        long = len(os.fsencode(path)) > _SOCKET_PATH_MAX
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY) if long else -1
        self.text = f"/proc/self/fd/{self._folder}/{name}" if long else os.fspath(path)

    def close(self) -> None:
        """Let the folder go; closing again does nothing."""
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)

    def __enter__(self) -> str:
        return self.text

    def __exit__(self, *_: object) -> None:
        self.close()
