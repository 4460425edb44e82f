"""Media on their way through a stage: from prompts to engines' settings, samples, trees and rollout files."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.actors.scoring import samples_of
from align.protocols.fleet import Completion, Group, PromptItem
from align.protocols.scorer import ScoreTable
from align.protocols.trees import Medium
from align.recipe.inputs import Media
from align.stages.backend import most_media, pixel_limits
from align.stages.groups import PromptCursor, to_trees
from align.stages.rollout_log import RolloutLog, read_rollouts


def medium(key: str, start: int = 1, kind: str = "image") -> Medium:
    return Medium(kind, key, "/store", start, 2, 8)  # type: ignore[arg-type]


TWO = PromptItem(0, np.arange(9), 0, media=(medium("a"), medium("b", 5)))
ONE = PromptItem(1, np.arange(4), 0, media=(medium("c"),))
NONE = PromptItem(2, np.arange(3), 0)


def group(prompt: PromptItem) -> Group:
    drawn = Completion(np.arange(2), np.zeros(2, np.float32), np.zeros(2, np.int32), "text", "eos")
    return Group(prompt, (drawn, drawn))


def test_engines_are_started_for_the_most_media_of_each_kind_in_a_prompt() -> None:
    video = replace(ONE, media=(medium("v", kind="video"),))
    assert most_media([NONE, ONE, TWO, video]) == {"image": 2, "video": 1}
    assert most_media([NONE]) == {}
    assert pixel_limits(Media(max_pixels=900)) == {"max_pixels": 900} and pixel_limits(Media()) == {}


def test_a_prompt_keeps_its_media_when_it_is_drawn_again_and_when_it_crosses_processes() -> None:
    cursor = PromptCursor((TWO, ONE, NONE), run_seed=0, stage_id="grpo", order_seed=3)
    drawn = {item.group_id % 3: item for item in cursor.take(3, 3)}
    assert {row: item.media for row, item in drawn.items()} == {0: TWO.media, 1: ONE.media, 2: ()}
    [again] = cursor.of([drawn[0].group_id])
    assert pickle.loads(pickle.dumps(again)).media == TWO.media  # noqa: S301


def test_media_stand_in_the_trunk_of_a_groups_tree_and_in_every_sample_of_it() -> None:
    groups = [group(TWO), group(NONE)]
    trees = to_trees(groups, np.ones(4, np.float32), np.zeros(4, dtype=bool))
    assert [tree.trunk.media for tree in trees] == [TWO.media, ()]
    assert all(not branch.media for tree in trees for branch in tree.branches)
    samples = samples_of(groups)
    shown = [{"type": "image", "path": "/store/a.png"}, {"type": "image", "path": "/store/b.png"}]
    assert [list(sample.media) for sample in samples] == [shown, shown, [], []]
    assert samples[0].media is samples[1].media, "what a group shares is sent to plugins once"


@pytest.mark.parametrize("prompts", [(TWO, NONE), (NONE, NONE)])
def test_rollout_files_name_the_files_of_a_prompts_media(prompts: tuple[PromptItem, ...], tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    log.cut_back(0)
    table = ScoreTable(("x",), np.zeros((4, 1), np.float32), ("reward",))
    log.add(1, [group(p) for p in prompts], ["p", "q"], table, np.zeros(4, np.float32), np.ones(4, dtype=bool))
    log.close_file()
    media = read_rollouts(tmp_path).columns["media"]
    expected = [[f"/store/{m.key}.png" for m in prompt.media] for prompt in prompts for _ in range(2)]
    assert [list(paths) for paths in media] == expected
