"""Run folders with an evaluate stage, written as a run writes them, without running one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from align.protocols.fleet import Completion, Group, PromptItem
from align.protocols.scorer import ScoreTable
from align.stages.files import write_json
from align.stages.rollout_log import RolloutLog

EXAM: dict[str, Any] = {
    "id": "exam", "kind": "evaluate", "of": ["grpo"], "data": "held.jsonl", "rewards": ["numeric", "judge.py:harm"],
}  # fmt: skip
GRPO: dict[str, Any] = {
    "id": "grpo", "kind": "online", "data": "prompts.jsonl", "batch": {"groups": 2, "group_size": 2},
    "rewards": ["numeric"], "objectives": {"weights": {"helpful": 0.7, "harm": 0.3}}, "steps": 2,
}  # fmt: skip


def write_examined(
    run: Path,
    scores: Sequence[Sequence[float]],
    *,
    stages: Sequence[dict[str, Any]] = (GRPO, EXAM),
    finished: bool = True,
    kinds: Sequence[str] = ("reward", "cost"),
) -> Path:
    """A run whose exam gave `scores` f[P, 2] on helpful and harm (a cost) to what grpo made."""
    run.mkdir(parents=True)
    recipe = {"name": run.name, "output": str(run.parent), "model": {"path": "m"}, "stages": list(stages)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    entry = {"state": "finished" if finished else "running", "fingerprint": {}, "artefacts": {}}
    write_json(run / "run.json", {"stages": {stage["id"]: entry for stage in stages}})
    table = ScoreTable(("helpful", "harm"), np.asarray(scores, np.float32), tuple(kinds))
    groups = [Group(PromptItem(n, np.arange(3), 0), (completion(n),)) for n in range(len(scores))]
    log = RolloutLog(run / "exam" / "rollouts" / "grpo")
    log.cut_back(-1)
    unknown = np.full(len(scores), np.nan, np.float32)
    log.add(0, groups, [f"prompt {n}" for n in range(len(scores))], table, unknown, np.zeros(len(scores), bool))
    log.close_file()
    return run


def completion(number: int) -> Completion:
    n = 2 + number % 3
    return Completion(np.arange(n), np.zeros(n, np.float32), np.zeros(n, np.int32), "text", "eos")
