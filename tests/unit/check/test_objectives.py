"""`align check` on the objectives of an online stage: known from what its plugins say of themselves."""

from __future__ import annotations

import pytest

from align.cli.main import main
from tests.unit.check.workshop import Workshop

JUDGE = """\
from rewards import Objective, Score, reward

@reward(objectives={"length": Objective(kind="cost", range=(0, 100)), "polite": Objective(range=(0, 1))})
def brevity(samples):
    return [Score({"length": len(s.completion), "polite": 1}) for s in samples]
"""
GIVEN = "{weights: {numeric: 1.0, brevity: 0.5}}"
LIMITED = """{combine: lagrangian, constraints: {length: {max: 40}}, schedule: {polite: [[0, 0.0], [200, 0.5]]},
      gates: {polite: {when: correct, at_least: 1}}}"""


def told(workshop: Workshop, capsys: pytest.CaptureFixture[str], objectives: str, status: int, *more: str) -> str:
    workshop.write("judge.py", JUDGE)
    workshop.change("- numeric\n", "- {use: numeric, as: correct}\n")
    workshop.change(GIVEN, objectives)
    assert main(["check", "recipe.yaml", *more]) == status
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_plan_says_how_scores_become_advantages(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(workshop, capsys, LIMITED, 0)
    for words in (
        "objectives: lagrangian by weight (polite 0 at step 0 to 0.5 at step 200)",
        "length at most 40 (lambda up to 10)",
        "polite only where correct is at least 1, else missing",
        "compared with the group",
    ):
        assert words in out


def test_a_limit_outside_the_range_that_a_plugin_declares_is_found_at_its_line(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    out = told(workshop, capsys, LIMITED, 2, "stages.grpo.objectives.constraints.length.max=400")
    assert "`max: 400` on 'length' is always met" in out and "[0, 100]" in out


def test_every_misspelt_name_is_found_at_once(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(workshop, capsys, "{weights: {corect: 1}, gates: {polite: {when: lenght, at_most: 9}}}", 2)
    assert "recipe.yaml:39" in out and "did you mean `correct`?" in out and "did you mean `length`?" in out


def test_contradictions_within_the_recipe_need_no_plugin(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    out = told(workshop, capsys, "{baseline: batch}", 2, "stages.grpo.dynamic_sampling={}")
    assert "`dynamic_sampling` replaces groups whose scores are equal" in out


def test_truncation_that_is_penalised_is_one_of_the_objectives(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    penalised = ("stages.grpo.rollout.truncated=penalise", "stages.grpo.rollout.truncated_penalty=1.0")
    limited = "{combine: lagrangian, constraints: {truncated: {max: 0.1}}}"
    assert "truncated at most 0.1" in told(workshop, capsys, limited, 0, *penalised)


def test_a_kl_inside_the_reward_is_refused_with_what_has_its_gradient(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    out = told(workshop, capsys, "{kl: 0.05}", 2)
    assert "recipe.yaml:39" in out and "not offered by this version" in out and "kl_estimator: w_k3" in out


@pytest.mark.parametrize(("best", "status"), [("metric: eval/length", 2), ("metric: eval/length, mode: min", 0)])
def test_the_best_checkpoint_by_a_cost_is_not_the_most_costly(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], best: str, status: int
) -> None:
    more = ("stages.grpo.eval={data: sft.jsonl}", f"stages.grpo.save={{best: {{{best}}}}}")
    out = told(workshop, capsys, LIMITED, status, *more)
    assert ("would keep the worst checkpoint: eval/length is a cost" in out) == bool(status)
