"""A reward reads what was generated, special tokens included, where it says so, and a stage tells where it does not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.actors.scoring import samples_of, score_table
from align.protocols.ends import texts_of
from align.protocols.fleet import Completion, Group, PromptItem
from align.protocols.scorer import ScoreTable
from align.stages.reward_notes import NotedScorer
from align.stages.rollout_log import RolloutLog
from rewards import Sample
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool

TAGS = {7: "<answer>", 8: "</answer>", 2: "<|im_end|>"}
SPECIAL = frozenset(TAGS.values())
MINE = """
from rewards import reward, Score

@reward
def usual(samples):
    return [Score(float("<answer>" in s.completion), info={"read": s.completion, "raw": s.raw}) for s in samples]

@reward(text="raw", cache=True)
def marks(samples):
    open("asked", "a").write("x" * len(samples))
    return [float(s.completion.startswith("<answer>")) for s in samples]

def theirs(prompts, completions, **kwargs):
    return [float("<answer>" in c) for c in completions]
"""


def decode(ids: list[int], skip: bool) -> str:
    return "".join("" if skip and i in TAGS else TAGS.get(i, chr(i)) for i in ids)


def drawn(ids: list[int]) -> Completion:
    text, raw = texts_of(ids, frozenset({2}), decode)
    return Completion(np.array(ids), np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), text, "eos", raw)


MARKED, PLAIN = [7, 111, 107, 8, 2], [111, 107, 2]


def groups(*completions: list[int]) -> list[Group]:
    prompt = PromptItem(0, np.arange(3), 0, ({"role": "text", "content": "?"},), {"answer": "ok"}, "f:1", ())
    return [Group(prompt, tuple(drawn(ids) for ids in completions))]


def score(folder: Path, samples: list[Sample], *specs: PluginSpec) -> PoolResult:
    (folder / "mine.py").write_text(MINE)
    with RewardPool(specs, folder, 0, cache=folder / "rewards.sqlite") as pool:
        return pool.score_sync(samples)


@pytest.mark.parametrize(
    ("ids", "text", "raw"),
    [
        (MARKED, "ok", "<answer>ok</answer>"),
        (PLAIN, "ok", None),
        ([7, 111], "o", "<answer>o"),
        ([7, 8, 2, 2], "", "<answer></answer>"),
        ([2], "", None),
        ([], "", None),
        ([2, 111, 2], "o", "<|im_end|>o"),
    ],
)
def test_what_ends_a_completion_belongs_to_neither_text(ids: list[int], text: str, raw: str | None) -> None:
    assert texts_of(ids, frozenset({2}), decode) == (text, raw)


def test_an_ending_token_that_is_not_special_does_not_stand_in_the_text() -> None:
    """Some tokenizers know the end of a turn as a token like any other."""
    assert texts_of([111, 107, 10], frozenset({2, 10}), decode) == ("ok", None)


def test_a_reward_reads_completions_as_its_decorator_or_the_recipe_says(tmp_path: Path) -> None:
    samples = samples_of(groups(MARKED, PLAIN))
    result = score(
        tmp_path,
        samples,
        PluginSpec("mine.py:usual"),
        PluginSpec("mine.py:usual", "asked", options={"text": "raw"}),
        PluginSpec("mine.py:marks"),
        PluginSpec("mine.py:theirs", signature="trl"),
        PluginSpec("mine.py:theirs", "theirs_raw", signature="trl", options={"text": "raw"}),
        PluginSpec("regex", "form", {"pattern": "<answer>.*</answer>"}, {"text": "raw"}),
    )
    assert result.scores == [[0.0, 1.0, 1.0, 0.0, 1.0, 1.0], [0.0] * 6]
    assert result.infos[0]["usual"] == {"read": "ok", "raw": "<answer>ok</answer>"}
    stripped = {name: n for name, n in result.metrics.items() if name.endswith("/stripped")}
    assert stripped == {"reward/usual/stripped": 1.0, "reward/theirs/stripped": 1.0}


def test_the_cache_keeps_apart_what_differs_in_its_special_tokens_alone(tmp_path: Path) -> None:
    """As where token ids are not known, of a file that `align rewards try` reads."""
    for raw, expected in (("<answer>ok</answer>", 1.0), (None, 0.0), ("<answer>ok</answer>", 1.0)):
        assert score(tmp_path, [Sample("ok", raw=raw)], PluginSpec("mine.py:marks")).scores == [[expected]]
    assert (tmp_path / "asked").read_text() == "xx"


def test_rollouts_keep_both_texts(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = ScoreTable(("right",), np.zeros((2, 1), np.float32), ("reward",))
    log = RolloutLog(tmp_path / "rollouts")
    log.cut_back(0)
    log.add(1, groups(MARKED, PLAIN), ["?"], table, np.zeros(2, np.float32), np.ones(2, bool))
    log.close_file()
    rows = pyarrow.parquet.read_table(tmp_path / "rollouts" / "step-000001.parquet").to_pylist()
    assert [row["completion"] for row in rows] == ["ok", "ok"]
    assert [row["completion_raw"] for row in rows] == ["<answer>ok</answer>", None]


class Judges:
    """The pool as a scorer."""

    def __init__(self, pool: RewardPool):
        self.pool = pool

    async def score(self, found: list[Group], budget: Any = None) -> Any:
        return score_table(found, await self.pool.score(samples_of(found)))

    async def close(self) -> None:
        self.pool.close()


def told(folder: Path, specs: list[PluginSpec], *calls: list[Group]) -> list[str]:
    (folder / "mine.py").write_text(MINE)

    async def run() -> list[str]:
        lines: list[str] = []
        scorer = NotedScorer(Judges(RewardPool(specs, folder, 0)), "exam", SPECIAL, lines.append)  # type: ignore[arg-type]
        for found in calls:
            await scorer.score(found)
        scorer.finish()
        await scorer.close()
        return lines

    return asyncio.run(run())


def test_a_stage_tells_once_and_with_its_count_what_rewards_do_not_see(tmp_path: Path) -> None:
    usual = PluginSpec("mine.py:usual")
    lines = told(tmp_path, [usual], groups(PLAIN), groups(MARKED, PLAIN), groups(MARKED, MARKED))
    assert lines == [
        "exam: 1 of 3 completions hold special tokens (</answer>, <answer>) that are taken out of the text which usual "
        "read; `text: raw` at a reward shows it what was generated",
        "exam: usual read 3 of 5 completions without their special tokens",
    ]
    assert told(tmp_path, [PluginSpec("mine.py:marks")], groups(MARKED)) == []


def test_a_stage_tells_of_the_first_failed_call_and_how_many_there_were(tmp_path: Path) -> None:
    options = {"retries": 0, "max_error_rate": 1.0}
    (tmp_path / "bad.py").write_text("def bad(samples):\n    raise RuntimeError('503')\n")
    lines = told(tmp_path, [PluginSpec("bad.py:bad", options=options)], groups(PLAIN, PLAIN), groups(PLAIN))
    assert lines[0].startswith("exam: reward bad: a call of 2 samples failed (raised: RuntimeError: 503 (")
    assert "asked again: in parts" in lines[0]
    assert lines[1:] == ["exam: in all 4 calls of reward bad failed"]
