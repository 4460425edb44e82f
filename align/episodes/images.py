"""Images that environments show, made ready for engine and trainer as those of the data are: decoded and processed in
child processes, equal ones once, and kept on disk until they were trained on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from align.data.media.library import Library
from align.data.media.shelf import Shelf
from align.data.media.shown import Shown
from align.data.records import MediaPart, RowError
from align.episodes.spec import Sight
from align.protocols.fleet import PromptItem

Found = TypeVar("Found")


class Images:
    """Images of the episodes of one engine. Used by one event loop; close it.

    kept: see `Sight`.
    """

    def __init__(self, library: Library, kept: int | None = None):
        self._library, self._kept = library, kept
        self._thread = ThreadPoolExecutor(1, "images")  # all below is its own: a library is one thread's at a time
        self._of_groups: dict[int, set[str]] = {}
        self._answered: deque[set[str]] = deque()

    async def _there(self, work: Callable[..., Found], *given: Any) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)

    async def show(self, group: int, sources: Sequence[str]) -> list[Shown | str]:
        """Each image, or why it cannot be shown. group: whose they are kept for.

        Raises ModelError where the model has no processor of images."""
        return await self._there(self._show, group, sources)

    def _show(self, group: int, sources: Sequence[str]) -> list[Shown | str]:
        rows = self._library.show([((MediaPart("image", source),), None) for source in sources])
        shown = [str(row) if isinstance(row, RowError) else row[0] for row in rows]
        self._of_groups.setdefault(group, set()).update(one.key for one in shown if isinstance(one, Shown))
        return shown

    async def of_prompt(self, prompt: PromptItem) -> list[Shown]:
        """What stands in a row's prompt, to be put into one that is written anew. Raises RowError where the store has
        lost it."""
        return await self._there(self._of_prompt, prompt) if prompt.media else []

    def _of_prompt(self, prompt: PromptItem) -> list[Shown]:
        found = []
        for medium in prompt.media:
            facts = Shelf(Path(medium.store)).facts(medium.key)
            if facts is None:
                raise RowError(f"the media store has lost an image of the prompt: {medium.key}")
            ids = prompt.token_ids[medium.start : medium.start + medium.length]
            placeholder = self._library.placeholders[medium.kind]
            found.append(Shown(medium.kind, medium.key, placeholder, ids, facts, medium.store))
        return found

    async def answered(self, group: int) -> None:
        """The group is done, or given up. What older groups had may leave the store."""
        await self._there(self._forget, group)

    def _forget(self, group: int) -> None:
        keys = self._of_groups.pop(group, set())
        if self._kept is None or not (keys or self._answered):
            return
        self._answered.append(keys)
        if len(self._answered) > self._kept:
            self._answered.popleft()
            self._library.retain(set().union(*self._answered, *self._of_groups.values()))

    def close(self) -> None:
        self._thread.shutdown()
        self._library.close()


def open_images(sight: Sight | None) -> Images | None:
    """Of what engines are told; None where the model sees none. No process is started before the first image."""
    if sight is None:
        return None
    library = Library(sight.settings, sight.model, sight.store, trust_remote_code=sight.trust_remote_code)
    return Images(library, sight.kept)


@contextmanager
def opened_images(sight: Sight | None) -> Iterator[Images | None]:
    """`open_images`, closed again."""
    images = open_images(sight)
    try:
        yield images
    finally:
        if images is not None:
            images.close()
