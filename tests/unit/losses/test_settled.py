"""The twenty settled disagreements of the losses, one after another; a test's number is the item's.

The rest of a proof, where there is more than can be shown here:

     1  two real ranks over gloo: tests/unit/train/test_ranks.py; TRL's mean of means: tests/parity/test_trl_others.py
     2  TRL's pairs with itself: tests/parity/test_trl_others.py; a trainer's microbatches of one: test_kto.py
   4-6  equality with TRL, and where TRL is not finite: tests/parity/test_trl_others.py
     9  every kind of empty row: tests/unit/data/test_formats.py
    10  every loss and option: test_splits.py; through a model: tests/unit/core/test_forward.py; ranks: test_ranks.py
    11  templates, truncation, prefixes: tests/unit/data/test_render.py
    12  more families, with gradients: tests/unit/core/test_forward.py
    13  vLLM's own log-probabilities at a temperature: tests/integration/test_vllm_engine.py
    15  after training, and against the base: tests/unit/train/test_trainer.py
    16  estimators against TRL: tests/parity/test_trl_grpo.py; with every option: test_grpo_settled.py, as for 17-19
    17  combiners over ragged groups: tests/unit/objectives/test_combine.py
    18  a whole online turn: tests/unit/stages/test_online.py
    20  the recipe's whole run: tests/unit/train/test_trainer.py; on one rank of two: test_ranks.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.cli.main import main
from align.data.packing import collate, global_counts, mark_nll
from align.errors import DataError, NonFiniteError, RecipeError
from align.losses import configure, grpo, kto, orpo, simpo
from align.losses.base import LossInputs, Prepass
from align.losses.policy_terms import kl_terms
from align.model.policy_module import PolicyModule
from align.objectives import combine
from align.protocols.fleet import Completion, Group, PromptItem
from align.protocols.scorer import ScoreTable
from align.protocols.trees import Segment, Tree
from align.recipe.adapter import Adapter
from align.recipe.objectives import Objectives
from align.stages.groups import PromptCursor, penalise_truncated, to_trees, untrained
from align.train.prepass import run_prepass
from align.train.trainer import PolicyTrainer
from align.types import HeadOutputs
from tests.unit.check.workshop import Workshop, open_workshop
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import group, pair, unpaired
from tests.unit.data.build import prepared
from tests.unit.data.test_render import Pair, _bos_tokenizer, encoded
from tests.unit.losses.test_oracles import by_sequence, random_logps, run, sequences_of
from tests.unit.train.test_trainer import base, make_spec, trees_for, weights  # noqa: F401


def f64(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def rows(n: int, seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    return [unpaired(rng, i) for i in range(n)]


def found(ratios: torch.Tensor) -> Prepass:
    return Prepass(torch.arange(len(ratios)), ratios, ratios, torch.ones(len(ratios)))


def slope(function: Any, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Central differences of a scalar function at x f64[n]."""
    steps = eps * torch.eye(x.numel(), dtype=x.dtype)
    return torch.stack([(function(x + step) - function(x - step)) / (2 * eps) for step in steps])


# ------------------------------------------------------------------------------------------------- KTO


def test_01_ktos_z_is_the_mean_over_all_mismatched_pairs_of_uneven_ranks() -> None:
    mismatched = kto.auxiliary(rows(5), kto.Config())

    def ratios(trees: list[Tree], gather: Any) -> Prepass:
        batches = [(collate([tree]), True) for tree in trees]
        forward = lambda batch: HeadOutputs(logps=0.1 * batch.labels.double())  # noqa: E731
        return run_prepass(batches, forward, lambda batch: 0.05 * batch.labels.double(), gather)

    sent: list[torch.Tensor] = []
    ratios(mismatched[3:], lambda tensor: (sent.append(tensor), tensor)[1])
    waiting = iter(sent)
    both = ratios(mismatched[:3], lambda tensor: torch.cat([tensor, next(waiting)]))
    one = ratios(mismatched, lambda tensor: tensor)
    z = [kto.batch_stats(each, kto.Config())["z"].item() for each in (both, one)]
    assert z[0] == z[1] == pytest.approx(one.ratios.mean().item()) and z[0] > 0.1


def test_02_kto_never_matches_a_prompt_with_its_own_completion_whatever_the_order_and_duplicates() -> None:
    trees = rows(7)
    trees = [replace(tree, trunk=trees[i // 3].trunk) for i, tree in enumerate(trees)]  # prompts 0 0 0 1 1 1 2
    own = {tree.trunk.token_ids.tobytes(): set() for tree in trees}
    for tree in trees:
        own[tree.trunk.token_ids.tobytes()].add(tree.branches[0].token_ids.tobytes())
    made = kto.auxiliary(trees, kto.Config())
    for tree in made:
        assert tree.branches[0].token_ids.tobytes() not in own[tree.trunk.token_ids.tobytes()]
    again = kto.auxiliary([trees[i] for i in (3, 6, 0, 5, 2, 4, 1)], kto.Config())
    assert [(t.id, t.branches[0].token_ids.tolist()) for t in again] == [
        (t.id, t.branches[0].token_ids.tolist()) for t in made
    ]


def test_02_a_batch_too_small_for_a_mismatch_has_no_reference_point() -> None:
    assert kto.auxiliary(rows(1), kto.Config()) == []


def test_03_ktos_gradient_equals_finite_differences_with_z_frozen_and_z_is_never_negative() -> None:
    trees = rows(4)
    x = random_logps(trees, 1)
    reference = x.detach() - 0.3

    def z_of(logps: torch.Tensor) -> dict[str, torch.Tensor]:
        """The reference point as if the mismatched pairs' log-ratios moved with the policy's."""
        return kto.batch_stats(found((logps - reference).view(-1)), kto.Config())

    frozen = z_of(x)
    assert frozen["z"] > 0.1 and not frozen["z"].requires_grad

    def value(logps: torch.Tensor, stats: dict[str, torch.Tensor]) -> torch.Tensor:
        options = {"beta": 0.7, "undesirable_weight": 0.0}  # both sides together would move z little
        return run("kto", options, trees, logps, reference, stats=stats)[0].loss

    (gradient,) = torch.autograd.grad(value(x, z_of(x)), x)
    numeric = slope(lambda y: value(y, frozen), x.detach())
    torch.testing.assert_close(gradient, numeric, atol=1e-8, rtol=1e-6)
    moving = slope(lambda y: value(y, z_of(y)), x.detach())
    assert (moving - gradient).abs().max() > 1e-3, "a moving z would be another gradient"
    assert kto.batch_stats(found(f64(-2.0, 0.5)), kto.Config())["z"] == 0.0


# ------------------------------------------------------------------------------------------------- ORPO, SimPO, CPO


def test_04_orpos_likelihood_covers_prompt_and_response_by_default_and_the_response_by_option() -> None:
    tree = sequences_of(2, 1, trunk=3)  # two of the prompt's three tokens have a prediction
    prompt, response, rejected = f64(-3.0, -5.0), f64(-1.0, -2.0), f64(-4.0)
    whole, batch = run("orpo", {"lambda": 0.0}, [tree], torch.cat([prompt, response, rejected]))
    assert batch.nll_mask.tolist() == [True] * 4 + [False]
    assert whole.loss.item() == pytest.approx((3 + 5 + 1 + 2) / 4)
    alone, _ = run("orpo", {"lambda": 0.0, "nll": "response"}, [tree], torch.cat([response, rejected]))
    assert alone.loss.item() == pytest.approx((1 + 2) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_05_log1mexp_and_its_gradient_are_finite_from_probability_one_down_to_nothing(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -1e-12, -200.0, -1000.0, -0.7, -2.0], dtype=dtype, requires_grad=True)
    value = orpo.log1mexp(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    edge = math.log(-math.expm1(-1e-7))
    exact = [edge, edge, 0.0, 0.0, math.log(1 - math.exp(-0.7)), math.log(1 - math.exp(-2.0))]
    torch.testing.assert_close(value.detach(), torch.tensor(exact, dtype=dtype), atol=1e-6, rtol=1e-5)
    slopes = [0.0, 0.0, 0.0, 0.0, -1 / math.expm1(0.7), -1 / math.expm1(2.0)]
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=dtype), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mean", [0.0, -1e-12, -200.0, -1000.0])
def test_05_orpo_is_finite_whatever_the_mean_log_probability(mean: float) -> None:
    for other in (mean, -1.0):
        logps = torch.tensor([mean, mean, other], requires_grad=True)
        out, _ = run("orpo", {"nll": "response"}, [sequences_of(2, 1)], logps)
        (gradient,) = torch.autograd.grad(out.loss, logps)
        assert math.isfinite(out.loss.item()) and bool(gradient.isfinite().all())


def test_06_alphapo_uses_expm1_and_clamps_and_counts_its_exponent() -> None:
    means = torch.tensor([-1000.0, -319.9, -1e-6, 0.0], requires_grad=True)
    reward = simpo.implicit_reward(means, 0.25)
    (gradient,) = torch.autograd.grad(reward.sum(), means)
    assert bool(reward.isfinite().all()) and bool(gradient.isfinite().all())
    assert reward[0].item() == pytest.approx(-math.expm1(80) / 0.25, rel=1e-5) and gradient[0] == 0.0
    assert reward[2].item() == pytest.approx(-1e-6, rel=1e-5), "1 - p^-a cancels in float32"
    for logps, clamped in ((-1000.0, 1.0), (-2.0, 0.0)):
        out, _ = run("simpo", {"alpha": 0.25}, [sequences_of(2, 3)], torch.full((5,), logps))
        assert math.isfinite(out.loss.item()) and out.metrics["rewards/clamped"].sum == clamped


@pytest.mark.parametrize("beta", [0.5, 2.0, 10.0])
def test_07_simpos_gamma_is_the_margin_itself_whatever_beta(beta: float) -> None:
    out, _ = run("simpo", {"beta": beta, "gamma": 0.8}, [sequences_of(2, 2)], torch.full((4,), -1.0).double())
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(0.8)))


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.chdir(tmp_path)
    return open_workshop(tmp_path)


def check(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str]:
    code = main(["check", "recipe.yaml", *overrides])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("key", ["gamma_beta_ratio", "simpo_gamma"])
def test_07_an_ambiguous_key_for_simpos_margin_is_refused_with_the_remedy(
    capsys: pytest.CaptureFixture[str], key: str
) -> None:
    code, said = check(capsys, f"stages.dpo.loss={{name: simpo, {key}: 0.5}}")
    assert code == 2 and key in said and "the margin itself" in said and "gamma: ..." in said


@pytest.mark.usefixtures("shop")
def test_07_the_plan_prints_the_ratio_of_gamma_to_beta(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(capsys, "stages.dpo.loss={name: simpo, beta: 2.5, gamma: 0.5}")
    assert code == 0 and "gamma 0.5 is the margin itself; gamma/beta is 0.2" in said


def test_08_the_likelihoods_weight_is_explicit_and_0_leaves_exactly_no_gradient() -> None:
    trees = [sequences_of(2, 3)]
    likelihood = f64(-0.5, -0.5, 0.0, 0.0, 0.0)
    for name, at_margin in (("simpo", {"gamma": 0.0, "beta": 100.0}), ("cpo", {"beta": 100.0})):
        gradients = {}
        for weight in (0.0, 1.0, 3.0):
            logps = f64(-0.1, -0.1, -50.0, -50.0, -50.0, grad=True)  # so far apart that only a likelihood can pull
            out, _ = run(name, {**at_margin, "nll_weight": weight}, trees, logps)
            (gradients[weight],) = torch.autograd.grad(out.loss, logps)
        assert gradients[0.0].tolist() == [0.0] * 5
        assert torch.equal(gradients[1.0], likelihood) and torch.equal(gradients[3.0], 3 * likelihood)
    assert simpo.Config().nll_weight == 0.0 and simpo.needs(simpo.Config()).nll == "none"


# ------------------------------------------------------------------------------------------------- lengths and data


def test_09_a_token_of_probability_one_counts_in_a_length() -> None:
    out, _ = run("simpo", {"beta": 1.0, "gamma": 0.0}, [sequences_of(2, 1)], f64(0.0, -2.0, -1.0))
    assert out.loss.item() == pytest.approx(math.log(2)), "the mean of 0 and -2 is -1"


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("pair", {"prompt": "hi", "chosen": "", "rejected": "no"}),
        ("unpaired", {"prompt": "hi", "completion": "", "label": True}),
        ("conversation", {"prompt": "hi", "completion": ""}),
    ],
)
def test_09_an_empty_completion_is_refused_when_the_data_are_read(
    kind: str, row: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl(.|\n)*is empty"):
        prepared(tmp_path, [row], kind, _bos_tokenizer(tmp_path / "tokenizer", start=False))


def test_10_microbatches_of_one_equal_one_batch_the_last_partial_window_included() -> None:
    rng = np.random.default_rng(3)
    trees = [pair(rng, i) for i in range(5)]
    loss = configure("cpo", {"beta": 0.3})
    trees = [mark_nll(tree, loss.needs.nll) for tree in trees]
    logps = random_logps(trees, 4)
    ends = np.cumsum([0] + [sum(len(b) for b in tree.branches) for tree in trees])

    def update(first: int, last: int, size: int) -> tuple[float, torch.Tensor]:
        """Trees [first, last) as one update in microbatches of `size`."""
        counts, total = global_counts(trees[first:last]), torch.zeros((), dtype=torch.float64)
        for at in range(first, last, size):
            upto = min(at + size, last)
            part = logps[ends[at] : ends[upto]]
            total = total + loss(LossInputs(HeadOutputs(part), collate(trees[at:upto]), counts)).loss
        return total.item(), torch.autograd.grad(total, logps)[0]

    for first, last in ((0, 2), (2, 4), (4, 5), (0, 5)):  # windows of two, and what is left of the epoch
        value, gradient = update(first, last, last - first)
        split_value, split_gradient = update(first, last, 1)
        assert split_value == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(split_gradient, gradient, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("marks_start", [False, True])
def test_11_ids_are_concatenated_with_exactly_one_bos_and_a_scored_final_eos(tmp_path: Path, marks_start: bool) -> None:
    tokenizer = _bos_tokenizer(tmp_path / "tokenizer", start=marks_start)
    made = encoded(Pair("the sky" if marks_start else "<s>the sky", " is blue", " is green"), tokenizer)
    assert made.trunk.ids.tolist() == tokenizer.encode("the sky") and made.trunk.ids.tolist().count(1) == 1
    assert not made.trunk.mask.any()
    for branch in made.branches:
        assert 1 not in branch.ids and branch.ids[-1] == 2 and branch.mask.all()


def test_11_a_boundary_inside_what_would_be_one_token_stays_a_boundary(tmp_path: Path) -> None:
    tokenizer = _bos_tokenizer(tmp_path / "tokenizer", start=False)
    made = encoded(Pair("the sk", "y is blue", "y is green"), tokenizer)
    whole = [*made.trunk.ids, *made.branches[0].ids[:-1]]
    assert tokenizer.decode(whole) == tokenizer.decode(tokenizer.encode("the sky is blue"))
    assert whole != tokenizer.encode("the sky is blue"), "text was tokenised again"


# ------------------------------------------------------------------------------------------------- the forward


def tiny() -> PolicyModule:
    return PolicyModule(make_model("qwen3").eval())


def padded_logps(module: PolicyModule, sequences: list[list[int]], side: str) -> list[torch.Tensor]:
    """Log-probabilities of every token but the first, from one padded batch through the model's own forward."""
    width = max(len(s) for s in sequences)
    ids, mask = (torch.zeros(len(sequences), width, dtype=torch.long) for _ in range(2))
    places = [slice(width - len(s), width) if side == "left" else slice(0, len(s)) for s in sequences]
    for row, (sequence, place) in enumerate(zip(sequences, places, strict=True)):
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    module.model.set_attn_implementation("sdpa")
    logits = module.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()
    module.model.set_attn_implementation("align_packed")
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    laid = enumerate(zip(sequences, places, strict=True))
    return [logp[row, place.stop - len(sequence) : place.stop - 1] for row, (sequence, place) in laid]


@torch.no_grad()
def test_12_left_padded_right_padded_packed_and_shared_trunk_log_probs_are_equal() -> None:
    rng, module = np.random.default_rng(0), tiny()
    trees = [group(rng, i) for i in range(3)]
    alone = [
        replace(tree, id=100 * tree.id + k, branches=(branch,))
        for tree in trees
        for k, branch in enumerate(tree.branches)
    ]
    starts = [len(tree.trunk) for tree in alone]
    ids = [[*tree.trunk.token_ids.tolist(), *tree.branches[0].token_ids.tolist()] for tree in alone]
    layouts = {
        side: [row[n - 1 :] for row, n in zip(padded_logps(module, ids, side), starts, strict=True)]
        for side in ("left", "right")
    }
    for name, laid in (("packed", alone), ("shared trunk", trees)):
        batch = collate(laid)
        layouts[name] = [module(batch).logps[batch.sequence_ids == s] for s in range(batch.sequences)]
    for name, rows_ in layouts.items():
        for mine, right in zip(rows_, layouts["right"], strict=True):
            torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_13_the_trainers_log_probs_at_a_temperature_are_those_of_logits_over_it(temperature: float) -> None:
    plain = tiny()
    module = PolicyModule(plain.model, temperature=temperature)
    tree = group(np.random.default_rng(1), 0, size=1)
    ids = torch.as_tensor(np.concatenate([tree.trunk.token_ids, tree.branches[0].token_ids]))
    mine = module(collate([tree])).logps
    module.model.set_attn_implementation("sdpa")
    logits = module.model(input_ids=ids[None]).logits[0, len(tree.trunk) - 1 : -1]
    expected = (logits / temperature).log_softmax(-1).gather(-1, ids[len(tree.trunk) :, None])[:, 0]
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("where", ["rollout", "rollout.engine"])
@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p"])
def test_13_what_else_changes_the_sampling_distribution_is_refused(
    capsys: pytest.CaptureFixture[str], key: str, where: str
) -> None:
    code, said = check(capsys, f"stages.grpo.{where}.{key}=1")
    assert code == 2 and key in said and "changes the sampling distribution" in said


def test_14_dropout_is_off_by_default_and_in_every_reference_pass(base: Path) -> None:  # noqa: F811
    assert Adapter().dropout == 0.0
    trainer = PolicyTrainer(make_spec(base, "dpo", Adapter(rank=4, alpha=8, dropout=0.5), reference="start"))
    for parameter in trainer.parameters:
        parameter.data.normal_(0, 0.3)
    trainer.module.train()
    batch = collate(trees_for("dpo"))
    with torch.no_grad():
        noisy = [trainer.module(batch).logps for _ in range(2)]
    assert not torch.equal(*noisy), "dropout is on in the pass that learns"
    assert torch.equal(trainer.batch_logps(batch), trainer.batch_logps(batch)) and trainer.module.training
    first, second = (trainer.evaluate(trees_for("dpo")) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("loss", ["grpo", "dpo", "sft"])
def test_14_a_models_own_dropout_is_off_where_ratios_are_learnt_and_an_adapters_is_as_the_recipe_says(
    tmp_path: Path, loss: str
) -> None:
    make_model("qwen3", attention_dropout=0.5).save_pretrained(tmp_path / "model")
    spec = make_spec(tmp_path / "model", loss, reference="start" if loss == "dpo" else None)
    batch = collate(trees_for(loss))

    def repeats(dropout: float) -> bool:
        adapter = Adapter(rank=4, alpha=8, dropout=dropout)
        module = PolicyTrainer(replace(spec, adapter_config=adapter)).module.train()
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.3)
        with torch.no_grad():
            return torch.equal(module(batch).logps, module(batch).logps)

    assert repeats(0.0) == (loss != "sft")
    assert not repeats(0.5)


def test_14_before_an_update_the_ratio_is_exactly_1_in_the_same_packing_and_within_1e_4_in_another(
    base: Path,  # noqa: F811
) -> None:
    trainer = PolicyTrainer(make_spec(base, "grpo"))
    trees = trees_for("grpo")
    batch = collate(trees)
    loss = configure("grpo", {})
    outputs = trainer.module(batch, want=("entropy",))
    inputs = LossInputs(outputs, batch, global_counts(trees), proximal_logps=trainer.batch_logps(batch))
    ratio = loss(inputs).metrics["policy/ratio"]
    assert outputs.logps.requires_grad and torch.equal(outputs.logps.detach(), inputs.proximal_logps)
    assert ratio.sum == ratio.count
    sampled = [with_sampler(tree, trainer.logps([tree])[0]) for tree in trees]  # each tree computed alone
    assert trainer.step(sampled, step=0, progress=0.0)["mismatch/max_abs"] < 1e-4


def with_sampler(tree: Tree, logps: list[np.ndarray]) -> Tree:
    made = [replace(branch, behavior_logps=values) for branch, values in zip(tree.branches, logps, strict=True)]
    return replace(tree, branches=tuple(made))


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_15_at_step_0_dpo_is_ln_2_from_the_base_and_from_an_adapter(base: Path, tmp_path: Path, start: str) -> None:  # noqa: F811
    spec = make_spec(base, "dpo", reference="start")
    if start == "adapter":
        seed = PolicyTrainer(spec)
        for parameter in seed.parameters:
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        seed.write_model(tmp_path / "adapter")
        spec = replace(spec, adapter=str(tmp_path / "adapter"))
    trainer = PolicyTrainer(spec)
    metrics = trainer.step(trees_for("dpo"), step=0, progress=0.0)
    assert metrics["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert trainer.step(trees_for("dpo"), step=1, progress=0.1)["loss/total"] < math.log(2) - 1e-3


# ------------------------------------------------------------------------------------------------- GRPO


LOGITS, REFERENCE = f64(0.3, -1.0, 0.8, 2.0), f64(1.0, 0.1, -0.5, 0.4).log_softmax(0)


def expectation(estimator: str, sampler: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """An estimator's expected value over a vocabulary of four, and the expectation of its gradient to the logits, with
    tokens from `sampler` (log-probabilities; the policy itself where None), enumerated."""
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    old = policy.detach() if sampler is None else sampler
    terms = (policy - REFERENCE) if estimator == "k1" else kl_terms(policy, REFERENCE, old, estimator)
    value = (old.exp() * terms).sum()
    return value.detach(), torch.autograd.grad(value, logits)[0]


def exact(forward: bool) -> tuple[torch.Tensor, torch.Tensor]:
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    first, second = (REFERENCE, policy) if forward else (policy, REFERENCE)
    value = (first.exp() * (first - second)).sum()
    return value.detach(), torch.autograd.grad(value, logits)[0]


def test_16_kl_estimators_match_the_exact_value_or_gradient_on_a_tiny_vocabulary() -> None:
    close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-9)
    value, gradient = exact(forward=False)
    sampler = f64(0.9, 0.1, 0.3, -0.2).log_softmax(0)
    close(expectation("k1")[0], value)
    close(expectation("k3")[0], value)
    close(expectation("k2")[1], gradient)
    close(expectation("w_k3")[1], gradient)
    close(expectation("w_k3", sampler)[0], value)
    close(expectation("w_k3", sampler)[1], gradient)
    close(expectation("k3")[1], exact(forward=True)[1])
    close(expectation("k1")[1], torch.zeros(4, dtype=torch.float64))
    far = torch.tensor([-1e5, 0.0], requires_grad=True)
    for estimator in ("k2", "k3", "w_k3"):
        terms = kl_terms(far, torch.tensor([0.0, -1e5]), torch.zeros(2), estimator)
        assert bool(terms.isfinite().all()) and bool(torch.autograd.grad(terms.sum(), far)[0].isfinite().all())


def test_16_k1_is_refused_as_a_loss_term_with_what_to_use_instead() -> None:
    with pytest.raises(RecipeError, match=r"k1 is no loss term: its gradient has zero mean(.|\n)*w_k3"):
        configure("grpo", {"kl": 0.1, "kl_estimator": "k1"})


def completion(n: int = 3, finish: Any = "eos") -> Completion:
    return Completion(np.arange(n), np.full(n, -1.0, np.float32), np.zeros(n, np.int32), "", finish)


def groups_of(*finishes: tuple[Any, ...]) -> list[Group]:
    """Groups of one and the same prompt."""
    prompt = PromptItem(0, np.array([5, 6]), seed=0)
    return [
        Group(replace(prompt, group_id=10 + i), tuple(completion(finish=f) for f in each))
        for i, each in enumerate(finishes)
    ]


def table_of(scores: list[float]) -> ScoreTable:
    return ScoreTable(("r",), np.array(scores, np.float32)[:, None], ("reward",))


def test_17_the_same_prompt_twice_in_a_batch_is_two_groups() -> None:
    prompt = PromptItem(0, np.array([5, 6]), seed=0)
    cursor = PromptCursor([prompt], run_seed=0, stage_id="s", order_seed=0)
    drawn = cursor.take(0, 2)
    assert drawn[0].group_id != drawn[1].group_id and drawn[0].seed != drawn[1].seed
    groups = [Group(item, (completion(), completion())) for item in drawn]
    ids = np.repeat([item.group_id for item in drawn], 2)
    scores = np.array([[0.0], [1.0], [10.0], [11.0]], np.float32)
    objectives = Objectives(scale="none", whiten=False)
    advantages, _, _ = combine(scores, ids, ["r"], ["reward"], objectives, {}, 0)
    assert advantages.tolist() == [-0.5, 0.5, -0.5, 0.5], "as one group they would be -5.5, -4.5, 4.5 and 5.5"
    trees = to_trees(groups, advantages, np.zeros(4, bool))
    assert [tree.id for tree in trees] == [item.group_id for item in drawn]
    assert collate(trees).group_ids.tolist() == ids.tolist()


def test_18_truncated_completions_are_masked_kept_or_penalised_and_masked_ones_leave_the_denominator() -> None:
    groups = groups_of(("eos", "length"), ("eos", "eos"))
    scores = table_of([1.0, 0.0, 1.0, 0.0])
    advantages = np.array([1.0, -1.0, 1.0, -1.0], np.float32)
    counts = {}
    for how in ("mask", "keep", "penalise"):
        trees = to_trees(groups, advantages, untrained(groups, scores, how))
        counts[how] = global_counts(trees)
    assert (counts["mask"].sequences, counts["mask"].tokens) == (3, 9)
    assert counts["keep"] == counts["penalise"] and (counts["keep"].sequences, counts["keep"].tokens) == (4, 12)
    table, objectives = penalise_truncated(groups, scores, Objectives(), 0.5)
    assert table.scores[:, 1].tolist() == [0.0, 1.0, 0.0, 0.0] and table.kinds == ("reward", "cost")
    assert objectives.weights["truncated"] == 0.5

    trees = to_trees(groups, advantages, untrained(groups, scores, "mask"))
    behaviour = collate(trees).behavior_logps.double()
    for options, expected in (({}, -3 / 9), ({"aggregation": "sequence"}, -1 / 3)):  # advantages 1, 1, -1 are left
        out, batch = run("grpo", {**options, "log_entropy": False}, trees, behaviour)
        assert len(by_sequence(batch, behaviour)[1]) == 0
        assert out.loss.item() == pytest.approx(expected, abs=1e-6)


def test_19_cispos_cap_is_absolute_with_its_own_key_and_default() -> None:
    assert grpo.Config(surrogate="cispo").cispo_cap == 5.0 != 1 + grpo.Config().clip_high
    with pytest.raises(RecipeError, match="`clip_high` belongs to `surrogate: clip`"):
        configure("grpo", {"surrogate": "cispo", "clip_high": 0.28})
    tree = group(np.random.default_rng(0), 0, size=1)
    n = len(tree.branches[0])
    tree = with_advantage(tree, np.ones(n, np.float32), np.full(n, -8.0, np.float32))
    for cap, weight in ((5.0, 5.0), (2.0, 2.0), (50.0, math.e**3)):
        logps = torch.full((n,), -5.0, dtype=torch.float64, requires_grad=True)  # a ratio of e^3 = 20.1
        out, _ = run("grpo", {"surrogate": "cispo", "cispo_cap": cap, "log_entropy": False}, [tree], logps)
        (gradient,) = torch.autograd.grad(out.loss, logps)
        torch.testing.assert_close(gradient, torch.full_like(gradient, -weight / n), atol=1e-6, rtol=1e-6)


def with_advantage(tree: Tree, advantages: np.ndarray, behavior: np.ndarray) -> Tree:
    (branch,) = tree.branches
    return replace(tree, branches=(replace(branch, advantages=advantages, behavior_logps=behavior),))


# ------------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_20_a_non_finite_loss_or_gradient_updates_nothing_is_reported_and_stops_the_run_after_three(
    base: Path,  # noqa: F811
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = PolicyTrainer(make_spec(base, "grpo"))
    good = [replace(tree, origin=f"prompts.jsonl:{tree.id + 1}") for tree in trees_for("grpo", 2)]
    trees = good
    if what == "loss":
        branch = good[0].branches[0]
        bad = replace(branch, advantages=np.full(len(branch), np.nan, np.float32))
        trees = [replace(good[0], branches=(bad, *good[0].branches[1:])), good[1]]
    else:
        trainer.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    before = weights(trainer)
    metrics = trainer.step(trees, step=7, progress=0.1)
    assert metrics["optim/skipped"] == 1.0
    assert math.isfinite(metrics["loss/total"]) == (what == "gradient")
    assert not math.isfinite(metrics["optim/grad_norm"])
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert "step 7" in caplog.text and "prompts.jsonl:1, prompts.jsonl:2" in caplog.text
    trainer.step(trees, step=8, progress=0.1)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row(.|\n)*prompts\.jsonl:2"):
        trainer.step(trees, step=9, progress=0.1)


def test_20_a_good_step_between_starts_the_count_again(base: Path) -> None:  # noqa: F811
    trainer = PolicyTrainer(make_spec(base, "grpo"))
    good = trees_for("grpo", 1)
    bad = [replace(good[0], branches=tuple(poisoned(branch) for branch in good[0].branches))]
    moved, skipped = [], []
    for step, trees in enumerate([bad, bad, good, bad, bad]):
        before = weights(trainer)
        skipped.append(trainer.step(trees, step=step, progress=0.1)["optim/skipped"])
        moved.append(any(not torch.equal(value, before[name]) for name, value in weights(trainer).items()))
    assert skipped == [1.0, 1.0, 0.0, 1.0, 1.0] and moved == [False, False, True, False, False]


def poisoned(branch: Segment) -> Segment:
    return replace(branch, behavior_logps=np.full(len(branch), np.nan, np.float32))
