"""Episodes: nobody waits for anybody's tool, and nothing is left of two thousand of them.

    python -m tests.prove environments

Environments are real processes, forked and killed as in a run; the engine inside is scripted (a step takes ten
milliseconds, whatever it holds), so that the time is that of environments and of the episodes' engine alone. The bound
is arithmetic: the longest episode's delays and steps, nothing else.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from align.episodes.engine import EpisodeEngine
from align.protocols.fleet import Group
from align.protocols.trainer import Publication
from tests.prove.entry import conclude
from tests.unit.episodes import stage

TURNS, EPISODES, STEP_S = 5, 64, 0.01
MEDIAN_S, TAIL_S, TAIL = 0.1, 10.0, 0.01
WORLD = f"""
import time
from rewards import environment

@environment
class World:
    def reset(self, row, episode_seed):
        self.delays, self.turn = list(row["delays"]), 0

    def respond(self, reply):
        delay, self.turn = self.delays[self.turn], self.turn + 1
        time.sleep(delay)
        return "go on" if self.turn < {TURNS} else None

    def reward(self):
        return 1.0
"""


class Slow(stage.Scripted):
    """A step takes its time."""

    def step(self) -> list[Any]:
        time.sleep(STEP_S)
        return super().step()


def opened(folder: Path, **rules: Any) -> EpisodeEngine:
    stage.write(folder, WORLD)
    tokenizer = stage.tokenizer_in(folder)
    spec = asyncio.run(stage.spec_of(folder, tokenizer, use="world.py:World", max_turns=TURNS, **rules))
    engine = EpisodeEngine(spec, Slow(tokenizer, lambda text, request: "on"))
    engine.publish(Publication(1, "adapter", "", ""))
    return engine


def played(engine: EpisodeEngine, delays: list[list[float]], size: int = 1) -> dict[int, float]:
    """Seconds until each group was there, by its number."""
    tokenizer = engine._spec.environment.tokenizer
    prompts = [stage.prompt(tokenizer, engine._spec, n, "go", delays=one) for n, one in enumerate(delays)]
    began, done = time.monotonic(), {}
    engine.add(stage.requests(prompts, size))
    while engine.running:
        for number, answer in engine.step():
            assert isinstance(answer, Group), answer
            done[number] = time.monotonic() - began
    return done


def long_tail(folder: Path) -> dict[str, Any]:
    rng = random.Random(0)
    delays = [
        [TAIL_S if rng.random() < TAIL else MEDIAN_S * 2 ** rng.gauss(0, 1) for _ in range(TURNS)]
        for _ in range(EPISODES)
    ]
    engine = opened(folder, timeout_s=30.0)
    try:
        done = played(engine, delays)
    finally:
        engine.close()
    bound = max(sum(one) for one in delays) + TURNS * STEP_S
    return {"seconds": max(done.values()), "bound": bound, "ratio": max(done.values()) / bound}


def hanging(folder: Path) -> dict[str, Any]:
    timeout, retries = 2.0, 1
    delays = [[3600.0] * TURNS] + [[0.05] * TURNS for _ in range(15)]
    engine = opened(folder, timeout_s=timeout, retries=retries, on_timeout="redraw", on_kill=0.0)
    tokenizer = engine._spec.environment.tokenizer
    prompts = [stage.prompt(tokenizer, engine._spec, n, "go", delays=one) for n, one in enumerate(delays)]
    began, done = time.monotonic(), {}
    try:
        engine.add(stage.requests(prompts, 2))
        while engine.running:
            for number, _ in engine.step():
                done[number] = time.monotonic() - began
    finally:
        engine.close()
    others = max(seconds for number, seconds in done.items() if number)
    return {"others": others, "its_own": done[0], "bound": 2 * timeout * (1 + retries) + 1.0}


def many(folder: Path, count: int) -> dict[str, Any]:
    """Processes, descriptors, folders and memory before and after `count` episodes."""
    engine = opened(folder, timeout_s=10.0)
    own = psutil.Process()

    def counts() -> dict[str, int]:
        gc.collect()
        return {
            "processes": len(own.children(recursive=True)),
            "descriptors": own.num_fds(),
            "temporary": len(os.listdir(tempfile.gettempdir())),
            "megabytes": own.memory_info().rss >> 20,
        }

    try:
        played(engine, [[0.0] * TURNS] * 64)
        before, began = counts(), time.monotonic()
        for _ in range(count // 64):
            played(engine, [[0.0] * TURNS] * 64)
        after, seconds = counts(), time.monotonic() - began
    finally:
        engine.close()
    left = len(own.children(recursive=True))
    return {"before": before, "after": after, "seconds": seconds, "left_when_closed": left}


def main() -> int:
    begun = time.monotonic()
    figures: dict[str, Any] = {}
    for name, prove in (("long_tail", long_tail), ("hanging", hanging), ("many", lambda folder: many(folder, 2048))):
        with tempfile.TemporaryDirectory() as aside:
            figures[name] = prove(Path(aside))
        print(name, figures[name], flush=True)
    tail, hang, left = figures["long_tail"], figures["hanging"], figures["many"]
    figures["checks"] = {
        "a long tail costs at most 15 % beyond the longest episode": tail["ratio"] <= 1.15,
        "a tool that never returns delays nobody else": hang["others"] < 2.0,
        "and its own group by the timeouts of its tries": hang["its_own"] <= hang["bound"],
        "nothing is left of 2,048 episodes": all(
            left["after"][what] <= left["before"][what] for what in ("processes", "descriptors", "temporary")
        )
        and left["left_when_closed"] == 0,
        "memory is flat": left["after"]["megabytes"] <= left["before"]["megabytes"] + 8,
    }
    claim = "episodes wait for nobody else's tool, and nothing is left of two thousand"
    command = "python -m tests.prove environments"
    return conclude("environments", claim=claim, command=command, figures={"episodes": figures}, begun=begun)


if __name__ == "__main__":
    sys.exit(main())
