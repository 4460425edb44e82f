"""The losses of a stage as one object: what they need together, and what a module may leave out."""

from __future__ import annotations

import pytest

from align.errors import RecipeError
from align.losses import Losses, configure, names
from align.recipe.parts import LossTerm


def losses(*terms: dict[str, object]) -> Losses:
    return Losses.of([LossTerm.model_validate(term) for term in terms])


def test_what_a_stage_needs_is_what_any_of_its_losses_needs() -> None:
    both = losses({"name": "dpo", "weighting": "wpo"}, {"name": "sft", "weight": 0.2})
    assert [(loss.name, loss.weight) for loss in both] == [("dpo", 1.0), ("sft", 0.2)]
    assert both.needs_reference and not (both.needs_margin or both.needs_proximal)
    assert (both.records, both.head, both.nll) == (("pair", "conversation"), ("log_sum_sq",), "chosen")
    alone = losses({"name": "sft"})
    assert (alone.needs_reference, alone.head, len(alone)) == (False, (), 1)
    assert losses({"name": "modpo", "preference_weight": 0.5}).needs_margin
    assert losses({"name": "orpo"}).nll == configure("orpo", {}).needs.nll != "none"
    assert losses({"name": "grpo"}).needs_proximal and not losses({"name": "grpo", "correction": "off"}).needs_proximal


def test_a_loss_that_leaves_something_out_answers_as_one_that_has_nothing_to_say() -> None:
    sft, metrics = configure("sft", {}), {"loss/total": 1.0, "mismatch/weight": 2.0, "mismatch/weight_sq": 8.0}
    assert (sft.remarks(), sft.may_lack, sft.lacking([]), sft.derived(metrics)) == ((), False, None, metrics)
    assert sft.seen_before([]) == [] and not sft.sees_others and configure("kto", {}).sees_others
    assert configure("grpo", {}).remarks()
    assert configure("grpo", {}).derived(metrics) == {"loss/total": 1.0, "mismatch/ess": 0.5}


def test_every_loss_of_ours_is_configured_by_its_defaults_or_says_which_option_it_lacks() -> None:
    for name in names():
        try:
            assert configure(name, {}).name == name
        except RecipeError as error:
            assert name == "modpo" and "preference_weight" in str(error)


def test_a_wrong_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="its options are: "):
        losses({"name": "grpo", "clip": 0.2})
