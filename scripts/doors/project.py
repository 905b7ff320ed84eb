"""The thread of a project folder: its name, so that everybody who works there finds the same sessions."""

from __future__ import annotations

import hashlib
import os
import re

# Characters of the folder's name that are kept, and of the hash that tells apart folders of one name.
_READABLE = 40
_HASH = 8


def thread_of_folder(folder: str | os.PathLike[str]) -> str:
    """Return the name of a folder's thread: readable, and of no other folder.

    The folder's real path counts, so that a way over a symbolic link leads to the same thread.
    """
    path = os.path.realpath(folder)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(path)).lstrip("._-")[:_READABLE]
    return f"{readable or 'project'}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:_HASH]}"
