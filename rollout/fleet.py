"""Engines as one: prompts are split over them, versions reach all of them, failures name the one that failed.

`RayFleet` and `LocalFleet` implement `align.protocols.Fleet`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from align.errors import AlignError, EngineError, PlacementError
from align.protocols import FailedPrompt, Group, Metrics, PromptItem, Publication, Sampling
from rollout.base import Engine, EngineSpec, check_engine_options
from rollout.worker import EngineWorker, worker_environment


def split(prompts: Sequence[PromptItem], workers: int) -> list[list[PromptItem]]:
    """Prompt i goes to worker i mod `workers`, with all of its completions: which engine draws a group, and in which
    company, depends on nothing but the list."""
    return [list(prompts[worker::workers]) for worker in range(workers)]


def join(parts: Sequence[Sequence[Group]]) -> list[Group]:
    """Undo `split`: groups in the order of the prompts."""
    count = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def generation_metrics(groups: Sequence[Group], seconds: float) -> Metrics:
    """Seconds, tokens and tokens per second of one `generate`."""
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    return {
        "time/generate": seconds,
        "tokens/generated": float(tokens),
        "tokens/generated_per_second": tokens / seconds if seconds > 0 else 0.0,
    }


class LocalFleet:
    """One engine in this process, for evaluation and tests without Ray. Calls block the event loop while it computes.

    `metrics()` is `generation_metrics` of the last `generate`.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._last: Metrics = {}

    async def publish(self, publication: Publication) -> Metrics:
        started = time.perf_counter()
        compare_digests([self._engine.publish(publication)], publication)
        return {"time/publish": time.perf_counter() - started}

    async def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        started = time.perf_counter()
        groups = self._engine.generate(prompts, group_size, sampling)
        self._last = generation_metrics(groups, time.perf_counter() - started)
        return groups

    async def stream(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling
    ) -> AsyncIterator[Group | FailedPrompt]:
        for group in await self.generate(prompts, group_size, sampling):
            yield group

    def metrics(self) -> Metrics:
        last, self._last = self._last, {}
        return last

    async def close(self) -> None:
        self._engine.close()


class RayFleet:
    """`workers` engines, each in an actor of its own.

    Actors are created here and start side by side; `ready` (or the first publish or generate) waits for them.

    Args:
        spec: what each engine is.
        workers: how many.
        cpus, gpus: reserved per actor; fractions are allowed.
        placement_group, bundles: where; bundle `bundles[i]` holds worker i (all of them anywhere in the group when
            bundles is None; anywhere in the cluster when placement_group is None).
        start_timeout_s, request_timeout_s: after these an engine counts as hung. A request is one publish, or one
            worker's part of one generate. close_timeout_s: how long `close` waits before it kills.

    Raises:
        RecipeError: an engine option that the engine does not have (before any actor is created).
    """

    def __init__(
        self,
        spec: EngineSpec,
        workers: int,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        placement_group: PlacementGroup | None = None,
        bundles: Sequence[int] | None = None,
        start_timeout_s: float = 300.0,
        request_timeout_s: float = 1800.0,
        close_timeout_s: float = 10.0,
    ):
        if workers < 1 or (bundles is not None and len(bundles) != workers):
            raise PlacementError(
                f"{workers} rollout workers cannot be placed in the bundles {bundles}",
                where="rollout.workers",
                remedy="give at least one worker, and one bundle for each",
            )
        check_engine_options(spec.name, spec.engine)
        self._last: Metrics = {}
        self._start_timeout_s = start_timeout_s
        self._request_timeout_s = request_timeout_s
        self._close_timeout_s = close_timeout_s
        actor = ray.remote(EngineWorker)
        self._workers: list[Any] = []
        self._starts: list[Any] = []
        for index in range(workers):
            options: dict[str, Any] = {
                "num_cpus": cpus,
                "num_gpus": gpus,
                "max_restarts": 0,
                "runtime_env": {"env_vars": worker_environment(spec)},
            }
            if placement_group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    placement_group=placement_group,
                    placement_group_bundle_index=-1 if bundles is None else bundles[index],
                )
            worker: Any = actor.options(**options).remote()
            self._workers.append(worker)
            self._starts.append(worker.start.remote(spec))

    async def ready(self) -> None:
        """Wait until every engine has started.

        Raises:
            EngineError: an engine did not start in time. Whatever its start raised otherwise, as it raised it.
        """
        if self._starts:
            await self._all(self._starts, self._start_timeout_s, "start")
            self._starts = []

    async def publish(self, publication: Publication) -> Metrics:
        """Every engine loads the version at once; returns `{"time/publish": seconds}` when all digests agree.

        Raises:
            EngineError: an engine holds other weights than were published, failed, or did not answer in time.
        """
        await self.ready()
        started = time.perf_counter()
        answers = [worker.publish.remote(publication) for worker in self._workers]
        what = f"load version {publication.version}"
        compare_digests(await self._all(answers, self._request_timeout_s, what), publication)
        return {"time/publish": time.perf_counter() - started}

    async def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        """G completions of each prompt, in order. `metrics()` then describes this call (see `generation_metrics`).

        Raises:
            EngineError: an engine failed or did not answer in time. DataError: a prompt does not fit.
        """
        await self.ready()
        started = time.perf_counter()
        answers = [
            worker.generate.remote(part, group_size, sampling)
            for worker, part in zip(self._workers, split(prompts, len(self._workers)), strict=True)
        ]
        groups = join(await self._all(answers, self._request_timeout_s, "generate"))
        self._last = generation_metrics(groups, time.perf_counter() - started)
        return groups

    async def stream(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling
    ) -> AsyncIterator[Group | FailedPrompt]:
        """`generate`, handed on group by group once all are there."""
        for group in await self.generate(prompts, group_size, sampling):
            yield group

    def metrics(self) -> Metrics:
        last, self._last = self._last, {}
        return last

    async def close(self) -> None:
        """Let every engine shut down, then end its actor; one that is hung or dead is ended without."""
        workers, self._workers, self._starts = self._workers, [], []
        answers = [worker.close.remote() for worker in workers]
        if answers:
            await asyncio.to_thread(ray.wait, answers, num_returns=len(answers), timeout=self._close_timeout_s)
        for worker in workers:
            ray.kill(worker)

    async def _all(self, answers: Sequence[Any], timeout_s: float, what: str) -> list[Any]:
        """Every worker's answer, or the first failure, with the worker named."""
        if not answers:
            raise EngineError(f"the fleet was asked to {what} after it was closed")
        tasks = [asyncio.ensure_future(self._one(i, ref, timeout_s, what)) for i, ref in enumerate(answers)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, index: int, answer: Awaitable[Any], timeout_s: float, what: str) -> Any:
        place = f"rollout worker {index}"
        try:
            return await asyncio.wait_for(_awaited(answer), timeout_s)
        except TimeoutError:
            raise EngineError(
                f"the engine did not {what} within {timeout_s:g} s",
                where=place,
                remedy="it hangs or is overloaded: fewer groups, shorter rollout.max_tokens, or more rollout.workers",
            ) from None
        except RayTaskError as error:
            raise _placed(error.cause, place, what) from error
        except RayActorError as error:
            raise EngineError(
                f"the engine's process died when asked to {what}: {_first_line(error)}",
                where=place,
                remedy="often memory: see the worker's log in Ray's session folder",
            ) from error
        except RayError as error:
            raise EngineError(f"Ray failed to {what}: {_first_line(error)}", where=place) from error


def compare_digests(digests: Sequence[str], publication: Publication) -> None:
    """Raise EngineError unless every engine holds what was published."""
    for index, digest in enumerate(digests):
        if digest != publication.digest:
            raise EngineError(
                f"holds other weights than version {publication.version} was published with "
                f"(digest {digest[:12]}, the trainer's is {publication.digest[:12]})",
                where=f"rollout worker {index}",
            )


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _placed(cause: BaseException, place: str, what: str) -> AlignError:
    """Our errors as they are, with the worker named where they name no place; others as an EngineError."""
    if isinstance(cause, AlignError):
        return type(cause)(cause.what, where=cause.where or place, remedy=cause.remedy)
    return EngineError(f"the engine failed to {what}: {type(cause).__name__}: {_first_line(cause)}", where=place)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
