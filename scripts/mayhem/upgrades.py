"""One upgrade after the other, while everything goes on."""

from __future__ import annotations

from .scene import Scene

# Seconds between two upgrades, at most.
PAUSE = 1.0


class Upgrades:
    """Upgrades the broker, to the same code: what changes hands is the same."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    async def attempt(self) -> bool:
        """Try one in which anybody may die; tell whether it went through."""
        raise NotImplementedError

    async def go_on(self, times: int) -> None:
        """Upgrade so many times, and see that each time there is another broker and every process answers."""
        raise NotImplementedError
