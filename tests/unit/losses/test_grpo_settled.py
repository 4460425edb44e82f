"""What losses.md settles about grpo: ratios before an update, KL estimators, groups, truncation, cispo's cap; and what
the options refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.data.microbatches import plan_microbatches
from align.data.packing import collate, global_counts
from align.errors import RecipeError
from align.losses import configure
from align.losses.base import LossInputs
from align.losses.policy_terms import entropy_threshold, kl_terms
from align.objectives import combine
from align.protocols.fleet import Completion, Group
from align.protocols.scorer import ScoreTable
from align.recipe.objectives import Objectives
from align.recipe.parts import Rollout
from align.recipe.stages import OnlineStage
from align.stages.groups import group_ids, penalise_truncated, to_trees, untrained
from align.train.trainer import PolicyTrainer
from align.types import HeadOutputs
from tests.unit.core.test_forward import make_model, padded_logps
from tests.unit.core.trees import group
from tests.unit.losses.test_grpo import AGGREGATIONS, SURROGATES, TERMS, Case, run
from tests.unit.stages.plain import prompt
from tests.unit.stages.test_online import Run
from tests.unit.train.test_trainer import make_spec, trees_for


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> PolicyTrainer:
    folder = tmp_path_factory.mktemp("base") / "model"
    make_model("qwen3").save_pretrained(folder)
    return PolicyTrainer(make_spec(folder, "grpo"))


# ------------------------------------------------------------------------------------------ item 14


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_before_any_update_the_ratio_to_proximal_log_probs_of_the_same_packing_is_exactly_one(
    trainer: PolicyTrainer, ratio: str
) -> None:
    loss = configure("grpo", {"ratio": ratio, "clip_low": 0.0, "clip_high": 0.0})
    trees = trees_for("grpo")
    trainer.module.train()
    for part in plan_microbatches(trees, 60, keep_together=False):
        batch = collate(part)
        proximal = trainer.batch_logps(batch)
        outputs = trainer.module(batch, want=loss.needs.head)
        inputs = LossInputs(outputs, batch, global_counts(trees), proximal_logps=proximal)
        assert torch.equal(outputs.logps.detach(), proximal)
        metrics = loss(inputs).metrics
        assert metrics["policy/ratio"].sum == metrics["policy/ratio"].count == batch.labels.numel()
        assert metrics["policy/clip_fraction"].sum == 0


def test_before_any_update_the_ratio_to_the_samplers_log_probs_is_one_within_1e_4(trainer: PolicyTrainer) -> None:
    """The sampler here: one plain forward per sequence, in float32."""
    sampler = make_model("qwen3")
    trees = trees_for("grpo", 3)
    seen = []
    for tree in trees:
        with torch.no_grad():
            rows = padded_logps(sampler, tree)
        seen.append(
            replace(
                tree,
                branches=tuple(replace(b, behavior_logps=r.numpy()) for b, r in zip(tree.branches, rows, strict=True)),
            )
        )
    uncorrected = PolicyTrainer(make_spec(Path(trainer.spec.base), "grpo", loss_options={"correction": "off"}))
    metrics = uncorrected.evaluate(seen)
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-4) and metrics["mismatch/max_abs"] < 1e-4
    corrected = trainer.evaluate(seen)
    assert corrected["policy/ratio"] == 1.0 and corrected["mismatch/correction"] == pytest.approx(1.0, abs=1e-4)
    assert corrected["mismatch/max_abs"] == metrics["mismatch/max_abs"] and corrected["mismatch/ess"] > 1 - 1e-6
    assert corrected["loss/total"] == pytest.approx(metrics["loss/total"], abs=1e-4), "nothing changes"


# ------------------------------------------------------------------------------------------ item 16


def gradient_of_estimate(estimator: str, theta: torch.Tensor, reference: torch.Tensor, sampler: torch.Tensor) -> Any:
    """The estimate's expectation under `sampler`, by enumeration of the vocabulary, and its gradient in theta."""
    leaf = theta.clone().requires_grad_()
    logps = torch.log_softmax(leaf, -1)
    terms = reference * 0 + kl_terms(logps, reference, sampler, estimator)
    value = (sampler.exp() * terms).sum()
    return value.item(), torch.autograd.grad(value, leaf)[0]


def exact(theta: torch.Tensor, reference: torch.Tensor, direction: str) -> Any:
    leaf = theta.clone().requires_grad_()
    logps = torch.log_softmax(leaf, -1)
    value = (logps.exp() * (logps - reference)).sum()
    if direction == "forward":
        value = (reference.exp() * (reference - logps)).sum()
    return value.item(), torch.autograd.grad(value, leaf)[0]


def test_kl_estimators_have_the_value_and_the_gradient_that_they_are_said_to_have() -> None:
    g = torch.Generator().manual_seed(0)
    theta, other, third = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(3))
    reference, stale = torch.log_softmax(other, -1), torch.log_softmax(third, -1)
    policy = torch.log_softmax(theta, -1)
    reverse, reverse_gradient = exact(theta, reference, "reverse")
    _, forward_gradient = exact(theta, reference, "forward")

    k1 = float((policy.exp() * (policy - reference)).sum())
    k3, k3_gradient = gradient_of_estimate("k3", theta, reference, policy)
    assert k1 == pytest.approx(reverse, abs=1e-12) and k3 == pytest.approx(reverse, abs=1e-12)
    torch.testing.assert_close(k3_gradient, forward_gradient, atol=1e-12, rtol=1e-10)
    k2, k2_gradient = gradient_of_estimate("k2", theta, reference, policy)
    torch.testing.assert_close(k2_gradient, reverse_gradient, atol=1e-12, rtol=1e-10)
    assert abs(k2 - reverse) > 1e-3 and (k3_gradient - reverse_gradient).abs().max() > 1e-3

    for sampler in (policy, stale):  # unbiased whoever sampled
        value, gradient = gradient_of_estimate("w_k3", theta, reference, sampler)
        assert value == pytest.approx(reverse, abs=1e-12)
        torch.testing.assert_close(gradient, reverse_gradient, atol=1e-12, rtol=1e-10)
    assert (gradient_of_estimate("k2", theta, reference, stale)[1] - reverse_gradient).abs().max() > 1e-3


def test_k1_as_a_loss_term_has_no_gradient_and_is_refused_with_the_remedy() -> None:
    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    logps = torch.log_softmax(theta, -1)
    (gradient,) = torch.autograd.grad((logps.detach().exp() * logps).sum(), theta)
    assert gradient.abs().max() < 1e-15
    with pytest.raises(RecipeError, match="`w_k3` and `k2` have the reverse KL's gradient"):
        configure("grpo", {"kl": 0.1, "kl_estimator": "k1"})


@pytest.mark.parametrize("u", [-1000.0, -30.0, 0.0, 1e-4, 19.0, 30.0, 1000.0])
@pytest.mark.parametrize("estimator", ["k2", "k3", "w_k3"])
def test_kl_terms_are_finite_and_never_negative_at_any_distance(u: float, estimator: str) -> None:
    logps = torch.tensor([-5.0], requires_grad=True)
    (term,) = kl_terms(logps, torch.tensor([-5.0 + u]), torch.tensor([-5.0]), estimator)
    (gradient,) = torch.autograd.grad(term, logps)
    assert term.isfinite() and term >= 0 and gradient.isfinite().all()
    if u == 1e-4 and estimator != "k2":
        assert term.item() == pytest.approx(5e-9, rel=1e-2), "exp(u) - 1 - u would lose it to rounding"


# ------------------------------------------------------------------------------------------ item 17


def completion(length: int, finish: str = "eos") -> Completion:
    ids, logps = np.arange(length, dtype=np.int64), np.full(length, -0.5, np.float32)
    return Completion(ids, logps, np.zeros(length, np.int32), "x" * length, finish)  # type: ignore[arg-type]


def test_the_same_prompt_twice_in_a_batch_is_two_groups() -> None:
    first = prompt(0)
    again = replace(first, group_id=7)
    groups = [Group(p, (completion(2), completion(3))) for p in (first, again)]
    scores = np.asarray([[1.0], [0.0], [5.0], [4.0]], np.float32)
    advantages, _, _ = combine(scores, group_ids(groups), ("a",), ("reward",), Objectives(), {}, 0)
    trees = to_trees(groups, advantages, np.zeros(4, bool))
    assert [tree.id for tree in trees] == [0, 7] and (trees[0].trunk.token_ids == trees[1].trunk.token_ids).all()
    assert (advantages > 0).tolist() == [True, False, True, False], "as one group both of the first would be below"
    assert advantages[:2].tolist() == pytest.approx(advantages[2:].tolist())


# ------------------------------------------------------------------------------------------ item 18


@pytest.mark.parametrize("how", AGGREGATIONS, ids=lambda how: how["aggregation"])
@pytest.mark.parametrize("terms", TERMS)
def test_a_masked_completion_leaves_every_denominator(how: dict[str, Any], terms: str) -> None:
    """The loss with a masked completion is the loss of the batch that never had it."""
    rng = np.random.default_rng(3)
    groups = [Group(prompt(n), (completion(4, "length"), *map(completion, (3, 5, 1)))) for n in range(2)]
    table = ScoreTable(("a",), np.zeros((8, 1), np.float32), ("reward",))
    advantages = rng.standard_normal(8).astype(np.float32)
    trees = to_trees(groups, advantages, untrained(groups, table, "mask"))
    without = [replace(tree, branches=tree.branches[1:]) for tree in trees]
    assert global_counts(trees) == global_counts(without)
    assert global_counts(trees).sequences == 6 and global_counts(trees).tokens == 18
    values = [torch.as_tensor(rng.standard_normal(18)) for _ in range(4)]
    for proximal in (False, True):
        cases = (Case(t, collate(t), *values) for t in (trees, without))
        losses = [run({**TERMS[terms], **how}, case, proximal).loss.item() for case in cases]
        assert losses[0] == pytest.approx(losses[1], rel=1e-14) != 0


def penalised(scores: list[list[float]], objectives: Objectives, penalty: float = 0.5) -> np.ndarray:
    """Advantages of one group whose second completion was truncated."""
    groups = [Group(prompt(0), (completion(2), completion(3, "length"), completion(4)))]
    names = ("a", "b")[: len(scores[0])]
    table = ScoreTable(names, np.asarray(scores, np.float32), ("reward",) * len(names))
    table, objectives = penalise_truncated(groups, table, objectives, penalty)
    ids = group_ids(groups)
    return combine(table.scores, ids, table.objectives, table.kinds, objectives, {}, 0)[0]


def test_a_penalised_completion_has_its_combined_reward_lowered_by_the_penalty() -> None:
    objectives = Objectives(weights={"a": 2.0, "b": 0.25})
    got = penalised([[1, 8], [1, 4], [0, 0]], objectives)
    lowered = np.asarray([[2 + 2], [2 + 1 - 0.5], [0]], np.float32)
    expected = combine(lowered, np.zeros(3, np.int64), ("sum",), ("reward",), Objectives(), {}, 0)[0]
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert penalised([[1], [1], [1]], Objectives(scale="none")).tolist() == pytest.approx([1 / 6, -1 / 3, 1 / 6])


def test_a_penalty_weighs_its_own_scale_where_objectives_are_decoupled() -> None:
    objectives = Objectives(combine="decoupled", whiten=False)
    small, large = (penalised([[1], [1], [0]], objectives, penalty) for penalty in (0.1, 1.0))
    plain = combine(np.asarray([[1], [1], [0]]), np.zeros(3, int), ("a",), ("reward",), objectives, {}, 0)[0]
    cost = (np.asarray([0, 1, 0]) - 1 / 3) / (np.std([0, 1, 0], ddof=1) + 1e-4)
    for got, penalty in ((small, 0.1), (large, 1.0)):
        assert got.tolist() == pytest.approx((plain - penalty * cost).tolist(), abs=1e-6)


def test_a_penalty_brings_no_unscored_completion_back() -> None:
    assert np.isnan(penalised([[1], [float("nan")], [0]], Objectives())).tolist() == [False, True, False]


def test_an_online_stage_penalises_as_its_plan_says_and_reports_the_share(tmp_path: Path) -> None:
    run = Run(tmp_path, truncated="penalise")
    run.publications.close()  # it is never run
    stage = run.stage
    stage.plan = replace(stage.plan, truncated_penalty=0.5, objectives=Objectives(scale="none"))
    groups = [Group(prompt(0), (completion(2), completion(3, "length")))]
    table = ScoreTable(("a",), np.zeros((2, 1), np.float32), ("reward",))
    advantages, metrics = stage.advantages(groups, table, 0)
    assert advantages.tolist() == pytest.approx([0.25, -0.25]) and metrics["objective/truncated/mean"] == 0.5
    assert table.objectives == ("a",), "what the rewards gave is logged as they gave it"


def test_penalised_completions_keep_their_tokens() -> None:
    groups = [Group(prompt(0), (completion(2), completion(3, "length")))]
    table = ScoreTable(("a",), np.zeros((2, 1), np.float32), ("reward",))
    assert untrained(groups, table, "penalise").tolist() == [False, False]


def test_an_objective_called_truncated_cannot_be_penalised_beside() -> None:
    table = ScoreTable(("truncated",), np.zeros((1, 1), np.float32), ("reward",))
    with pytest.raises(RecipeError, match="a reward of this stage has that name"):
        penalise_truncated([Group(prompt(0), (completion(1),))], table, Objectives(), 1.0)


@pytest.mark.parametrize("options", [{"truncated": "penalise"}, {"truncated_penalty": 1.0}])
def test_a_penalty_and_its_size_go_together(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="go together"):
        Rollout.model_validate(options)
    stage = {"id": "g", "kind": "online", "data": "p.jsonl", "rewards": "numeric"}
    stage["rollout"] = {"truncated": "penalise", "truncated_penalty": 1.0}  # type: ignore[assignment]
    assert OnlineStage.model_validate(stage).rollout.truncated_penalty == 1.0
    with pytest.raises(ValueError, match="give it there"):
        OnlineStage.model_validate({**stage, "objectives": {"weights": {"truncated": 2.0}}})


# ------------------------------------------------------------------------------------------ item 19


def test_cispos_cap_is_absolute_has_its_own_default_and_no_part_in_clip_high() -> None:
    case = Case.make(9)
    weights = torch.tensor([0.1, 1.2, 4.9, 5.1, 80.0], dtype=torch.float64).repeat(99)[: case.logps.numel()]
    leaf = (case.batch.behavior_logps + weights.log()).requires_grad_()
    for options, cap in (({}, 5.0), ({"cispo_cap": 1.1}, 1.1)):
        loss = run({"surrogate": "cispo", **options}, replace(case, logps=leaf)).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        expected = -weights.clamp(max=cap) * case.batch.advantages / leaf.numel()
        torch.testing.assert_close(gradient, expected, atol=1e-14, rtol=1e-9)
    with pytest.raises(RecipeError, match="`clip_high` belongs to `surrogate: clip`"):
        configure("grpo", {"surrogate": "cispo", "clip_high": 4.0})


# ------------------------------------------------------------------------------------------ top_entropy, and refusals


@pytest.mark.parametrize(("share", "kept"), [(0.2, 3), (0.5, 6), (0.9, 10), (0.01, 1)])
def test_the_top_share_is_that_of_the_quantile_and_rounding_moves_no_token(share: float, kept: int) -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 9.0, 8.0, 7.0, 0.0, 10.0])
    threshold = entropy_threshold(values, share)
    for noise in (0.0, 1e-4, -1e-4):
        assert int((values + noise >= threshold).sum()) == kept
    assert int((torch.zeros(5) >= entropy_threshold(torch.zeros(5), 0.2)).sum()) == 5, "ties stay together"


def test_top_entropy_is_over_the_whole_update_whatever_the_packing_budget(
    trainer: PolicyTrainer, tmp_path: Path
) -> None:
    base, options = Path(trainer.spec.base), {"top_entropy": 0.3, "entropy_bonus": 0.01, "kl": 0.1}
    spec = make_spec(base, "grpo", loss_options=options, reference="start")
    found = [PolicyTrainer(replace(spec, max_tokens=n)).evaluate(trees_for("grpo")) for n in (10_000, 12)]
    n = global_counts(trees_for("grpo")).tokens
    assert found[0]["policy/top_entropy_tokens"] == found[1]["policy/top_entropy_tokens"] == n - np.ceil(0.7 * (n - 1))
    for name in ("loss/total", "loss/policy", "policy/entropy", "policy/entropy_threshold"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-6), name


def test_the_off_policy_mask_takes_only_sequences_of_negative_advantage_that_drifted() -> None:
    trees = [group(np.random.default_rng(4), 0, size=4)]
    branches = [
        replace(b, advantages=np.full(len(b), a, np.float32))
        for b, a in zip(trees[0].branches, (1.0, -1.0, -1.0, 1.0), strict=True)
    ]
    trees = [replace(trees[0], branches=tuple(branches))]
    batch = collate(trees)
    drift = torch.tensor([0.5, 0.5, 0.1, -0.5])[batch.sequence_ids]
    leaf = (batch.behavior_logps - drift).requires_grad_()
    loss = configure("grpo", {"off_policy_threshold": 0.2, "clip_low": 9, "clip_high": 9})
    inputs = LossInputs(HeadOutputs(leaf), batch, global_counts(trees))
    output = loss(inputs)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    assert [bool(gradient[batch.sequence_ids == s].any()) for s in range(4)] == [True, False, True, True]
    assert output.metrics["policy/off_policy_sequences"].sum == 1


REFUSED = [
    ({"surrogate": "sapo", "clip_low": 0.1}, "`clip_low` belongs to `surrogate: clip`; the surrogate here is sapo"),
    ({"surrogate": "cispo", "clip_delta": 4.0}, "`clip_delta` belongs to `surrogate: clip`"),
    ({"cispo_cap": 5.0}, "`cispo_cap` belongs to `surrogate: cispo`; the surrogate here is clip, which reads"),
    ({"sapo_temperature_neg": 1.05}, "`sapo_temperature_neg` belongs to `surrogate: sapo`"),
    ({"dppo_low": 0.1}, "`dppo_low` belongs to `surrogate: dppo`; the surrogate here is clip"),
    ({"surrogate": "dppo", "clip_low": 0.1}, "the surrogate here is dppo, which reads `dppo_divergence`"),
    (
        {"surrogate": "dppo", "correction": {"cap": 3}},
        "to the sampler itself, on which `correction` has no effect",
    ),
    ({"surrogate": "vespo", "ratio": "sequence"}, "to the sampler itself, on which `ratio` has no effect"),
    ({"clip_high": 0.28, "clip_delta": 1.28}, "must lie above 1 . `clip_high` = 1.28"),
    ({"kl_estimator": "k3"}, "`kl_estimator` without `kl`"),
    ({"constant_length": 8}, "go together"),
    ({"aggregation": "constant"}, "go together"),
    ({"top_entropy": 0.0}, "greater than 0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        configure("grpo", options)


def test_defaults_that_nobody_set_are_never_refused() -> None:
    for surrogate in SURROGATES.values():
        configure("grpo", surrogate)
    configure("grpo", {"kl": 0.0, "kl_estimator": "k2"})  # a KL that is switched off stays written down
