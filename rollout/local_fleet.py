"""A fleet of one engine in this process, and what it shares with the fleet of actors."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence

from align.errors import EngineError
from align.protocols.fleet import FailedPrompt, Group, PromptItem, Sampling
from align.protocols.trainer import Metrics, Publication
from rollout.base import Answer, Engine, Request, require_group


class LocalFleet:
    """One engine in this process, for evaluation and tests without Ray. The event loop waits while it computes a step;
    between steps whoever else is awake has a turn."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._tickets = itertools.count()
        self._answers: dict[int, Group | FailedPrompt] = {}

    async def publish(self, publication: Publication) -> Metrics:
        started = time.perf_counter()
        while not self._engine.accepts(publication):
            self._step()
            await asyncio.sleep(0)
        compare_digest(self._engine.publish(publication), publication, "the engine")
        return {"time/publish": time.perf_counter() - started}

    async def stream(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling
    ) -> AsyncIterator[Group | FailedPrompt]:
        async for _, answer in self._drawn(prompts, group_size, sampling):
            yield answer

    async def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        return await in_order(self._drawn(prompts, group_size, sampling))

    async def probe(self, prompt: PromptItem, sampling: Sampling) -> list[Group]:
        return [g async for _, g in self._drawn([prompt], 1, sampling, plain=True) if isinstance(g, Group)]

    async def _drawn(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling, *, plain: bool = False
    ) -> AsyncIterator[Answer]:
        requests = [Request(next(self._tickets), prompt, group_size, sampling, plain) for prompt in prompts]
        self._engine.add(requests)
        left = {request.ticket for request in requests}
        try:
            while left:
                for ticket in [ticket for ticket in self._answers if ticket in left]:
                    left.remove(ticket)
                    yield ticket, self._answers.pop(ticket)
                if left:
                    self._step()
                    await asyncio.sleep(0)
        finally:
            if left:
                self._engine.abandon(sorted(left))

    def _step(self) -> None:
        self._answers.update(self._engine.step())

    def metrics(self) -> Metrics:
        return {}

    async def close(self) -> None:
        self._engine.close()


async def in_order(drawn: AsyncIterator[Answer]) -> list[Group]:
    """All groups, by ticket. Raises DataError for a prompt that could not be sampled."""
    answers = [answer async for answer in drawn]
    return [require_group(answer) for _, answer in sorted(answers, key=lambda answer: answer[0])]


def compare_digest(digest: str, publication: Publication, place: str) -> None:
    """Raise EngineError unless an engine holds what was published."""
    if digest != publication.digest:
        raise EngineError(
            f"holds other weights than version {publication.version} was published with "
            f"(digest {digest[:12]}, the trainer's is {publication.digest[:12]})",
            where=place,
        )
