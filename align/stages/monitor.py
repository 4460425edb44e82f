"""After each publish: do engines sample from the distribution that the trainer computes?

The digest says that an engine holds the weights of a version, the probe at its start that it applies an adapter. This
watches what comes of both, all along: every engine continues one fixed prompt by a few tokens, and the trainer, which
still has that version's weights, says how likely it finds them. A single step hardly moves log-probabilities (6e-5 at a
learning rate of 1e-6, beside noise of 4e-2 in bfloat16), so what lies beyond the tolerance is never an old version, but
an engine that has stopped applying an adapter, or a kernel that computes something else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from align.protocols.fleet import Fleet, Group, PromptItem, Sampling
from align.protocols.trainer import Metrics, Trainer
from align.stages.groups import to_trees

TOKENS = 4
# of a token's own |log-probability|, and at least of 1 nat: what rounding does to a logit grows with its size. Measured
# on SmolLM2-135M against another implementation: 3.2e-5 in float32, 0.061 in bfloat16; float16 has three bits more.
_TOLERANCE = {"float32": 0.002, "float16": 0.05, "bfloat16": 0.3}
TOLD = 3  # warnings; the metric goes on
EVERY, WAIT_S = 10, 60.0
"""Where the trainer never waits for groups, it waits for a probe once in so many versions, and so long at most."""


def tolerance(*dtypes: str) -> float:
    """How far log-probabilities of a token may be apart, as a share of the trainer's own (of 1 nat where that is less):
    by the coarsest of the dtypes of trainer and engine. "auto" says nothing."""
    return max((_TOLERANCE[name] for name in dtypes if name in _TOLERANCE), default=_TOLERANCE["float32"])


class Monitor:
    """`published` asks the engines, `difference` compares; names "monitor/...".

    Where nothing else runs (ahead=False) engines draw the probe alone, before any group, so that what groups are
    computed with stays a function of their list. Else they draw it beside the groups that run, while the trainer waits
    for those; one that has not come when the trainer goes on is given up and counted, but for one in EVERY.

    Args:
        prompt: what is continued. sampling: the stage's. tolerance: see `tolerance`. tell: receives
            warnings.
    """

    def __init__(
        self,
        trainer: Trainer,
        fleet: Fleet,
        prompt: PromptItem,
        sampling: Sampling,
        *,
        tolerance: float,
        ahead: bool,
        tell: Callable[[str], None],
    ):
        self._trainer, self._fleet, self._tell = trainer, fleet, tell
        self._prompt = replace(prompt, seed=0)
        self._sampling = replace(sampling, max_tokens=min(TOKENS, sampling.max_tokens))
        self._tolerance, self._ahead = tolerance, ahead
        self._told = self._skipped = 0
        self._asked: asyncio.Task[list[Group]] | None = None
        self._version = 0

    async def published(self, version: int) -> None:
        """The engines hold `version`, and so does the trainer until its next update."""
        await self.close()
        self._version = version
        self._asked = asyncio.create_task(self._fleet.probe(self._prompt, self._sampling))
        if not self._ahead:
            await asyncio.wait([self._asked])

    async def difference(self) -> Metrics:
        """To be called before the next update. max_difference: the largest of any engine and token, in nats; nothing
        where no engine has drawn. Raises what the engines or the trainer raise."""
        asked, self._asked = self._asked, None
        if asked is None:
            return {}
        if self._skipped == EVERY - 1:
            await asyncio.wait([asked], timeout=WAIT_S)
        await given_up(asked)
        drawn = [] if asked.cancelled() else asked.result()
        # a request that runs may have been taken over by whole weights that were published meanwhile
        drawn = [g for g in drawn if all((c.versions == self._version).all() for c in g.completions)]
        self._skipped = 0 if drawn else min(self._skipped + 1, EVERY - 1)
        if not drawn:
            return {"monitor/skipped": 1.0}
        found = await self._differences(drawn)
        largest, worst = (max(values) for values in zip(*found, strict=True))
        if worst > self._tolerance and self._told < TOLD:
            self._told += 1
            self._tell(
                f"monitor: after version {self._version} was published, an engine's log-probability of a sampled token "
                f"differs from the trainer's by {largest:.3g} nats, {worst:.3g} of its size "
                f"(tolerance {self._tolerance:g}): look at mismatch/kl, "
                "the engine's options and dtype"
            )
        return {"monitor/max_difference": largest, "monitor/skipped": 0.0}

    async def _differences(self, drawn: Sequence[Group]) -> list[tuple[float, float]]:
        """Per engine, the largest over its tokens: in nats, and as a share of the log-probability or of 1 nat. Engines
        that drew the same are computed once."""
        alike: dict[bytes, list[Group]] = {}
        for group in drawn:
            alike.setdefault(group.completions[0].token_ids.tobytes(), []).append(group)
        found: list[tuple[float, float]] = []
        for groups in alike.values():
            [tree] = to_trees(groups[:1], np.zeros(1, np.float32), np.zeros(1, bool))
            [[logps]] = await self._trainer.logps([tree])
            size = np.maximum(np.abs(logps), 1.0)
            for apart in (np.abs(g.completions[0].logps - logps) for g in groups):
                found.append((float(apart.max()), float((apart / size).max())))
        return found

    async def close(self) -> None:
        """Give a probe up that is still drawn."""
        asked, self._asked = self._asked, None
        if asked is not None:
            await given_up(asked)


async def given_up(task: asyncio.Task[list[Group]]) -> None:
    """Cancel what is not done, and see it end; an error in it is its own."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # seen
