"""What `align check` says of preference stages with rewards."""

from __future__ import annotations

import pytest

from align.cli.main import main
from tests.unit.check.workshop import Workshop

MODPO = "stages.dpo.loss={name: modpo, preference_weight: 0.6}"
JUDGED = "stages.dpo.rewards=[{use: 'judge.py:brevity'}]"
WEIGHTED = "stages.dpo.objectives={weights: {brevity: 0.4}}"


def test_a_preference_stage_with_rewards_is_planned(workshop: Workshop, capsys):
    assert main(["check", "recipe.yaml", MODPO, JUDGED, WEIGHTED]) == 0
    said = capsys.readouterr().out
    assert "loss modpo" in said and "margins: before the stage, rewards judge both answers of each pair" in said


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([JUDGED], "the loss dpo reads none"),
        ([WEIGHTED], "the stage has none: add `rewards: [...]`"),
        ([MODPO, JUDGED, "stages.dpo.objectives={combine: decoupled}"], "unknown key `combine`"),
        ([MODPO, JUDGED, "stages.dpo.objectives={weights: {short: 1}}"], "which no reward of this stage gives"),
        ([MODPO], "the pair has no `margin`"),
    ],
)
def test_what_gives_no_margin_is_refused(workshop: Workshop, capsys, overrides, wanted):
    assert main(["check", "recipe.yaml", *overrides]) == 2
    assert wanted in capsys.readouterr().err
