"""Where the episodes of one environment are played in an engine: its process, and the places of those that live."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

from align.data.world import chosen
from align.episodes.describe import open_host, started
from align.episodes.images import Images
from align.episodes.setting import setting_of
from align.episodes.spec import EpisodeSpec, WorldSpec
from align.protocols.fleet import PromptItem


class Venue:
    """All but `close` belongs to one event loop. The environment's process is started by `open`.

    context: tokens that an engine holds at most. Raises Unsupported where the chat template cannot be continued.
    """

    def __init__(self, spec: EpisodeSpec, world: WorldSpec, context: int, images: Images | None):
        self.setting = setting_of(world.rules, spec.tokenizer, world.description, context, images)
        self.host = open_host(world.rules, spec.folder, spec.seed, _log(spec, world))
        self.live = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def open(self) -> None:
        """Raises PluginError where the environment cannot be loaded."""
        await started(self.host)

    def close(self) -> None:
        self.host.close()

    async def enter(self) -> None:
        """Wait for one of the `max_live` places, in order."""
        if self.live < self.setting.rules.max_live and not self._waiting:
            self.live += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()
            elif place in self._waiting:
                self._waiting.remove(place)
            raise

    def leave(self) -> None:
        """Give the place to whoever waits longest: it counts as live from now on."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.live -= 1


class Venues:
    """Those of a stage: as one, and each by the prompts that choose it."""

    def __init__(self, spec: EpisodeSpec, context: int, images: Images | None):
        self.every = [Venue(spec, world, context, images) for world in spec.worlds]
        self._names = tuple(world.rules.as_ for world in spec.worlds)

    @property
    def live(self) -> int:
        return sum(venue.live for venue in self.every)

    def of(self, prompt: PromptItem) -> Venue:
        """The one that the prompt's row chooses."""
        return self.every[chosen(prompt.row, self._names)]

    async def open(self) -> None:
        await asyncio.gather(*(venue.open() for venue in self.every))

    def close(self) -> None:
        for venue in self.every:
            venue.close()


def _log(spec: EpisodeSpec, world: WorldSpec) -> Path | None:
    if spec.logs is None:
        return None
    return spec.logs / ("environment.log" if len(spec.worlds) == 1 else f"{world.description['name']}.log")
