"""One upgrade after the other, while everything goes on.

The installed program is the one that runs, so an upgrade changes everything that an upgrade changes but the code.

Always true
    An upgrade in which nobody is killed goes through; one in which somebody is may fail, and says why.
"""

from __future__ import annotations

import outlive

from .scene import Moment, Scene

# Seconds between two upgrades, at most.
PAUSE = 1.0


class Upgrades:
    """The upgrades of one run."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        # Of the last one that did not go through.
        self.why = ""

    async def attempt(self) -> bool:
        """Upgrade once; tell whether it went through."""
        self.scene.at(Moment.UPGRADE)
        try:
            await self.scene.host.upgrade()
        except (outlive.Unavailable, outlive.BadRequest) as error:
            self.why = str(error)
            self.scene.tally.upgrades_refused += 1
            return False
        self.scene.tally.upgrades += 1
        return True

    async def go_on(self, times: int) -> None:
        """Upgrade so many times; each has to go through, and every process to answer after it."""
        scene, tally = self.scene, self.scene.tally
        while not scene.over.is_set() and tally.upgrades < times:
            before = {(row.thread, row.process_id) for row in await scene.until_done(scene.host.processes)}
            if not await self.attempt():
                tally.count("calls_failed", 1, f"upgrade {tally.upgrades + 1}: {self.why}")
            for thread_id, process_id in sorted(before):
                # What ended meanwhile answers, too.
                await scene.until_done(outlive.Thread(scene.host, thread_id).read_output, process_id, 1 << 60)
            await scene.pause(PAUSE)
        scene.over.set()
