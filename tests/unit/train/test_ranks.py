"""Two ranks are one rank: the same loss, gradients, metrics and weights, for every loss, LoRA and full.

Real processes over gloo. They are started once and work through all cases; this process works through the same cases on
its own meanwhile.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import start_processes

from align.data.microbatches import assign, plan_microbatches, plan_ranks
from align.errors import NonFiniteError, RanksError
from align.losses.base import Metric
from align.protocols.trees import Segment, Tree
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model
from align.recipe.parts import LossTerm, Optim
from align.stages.updates import carrying
from align.train.metrics import MetricSums
from align.train.ranks import Ranks
from align.train.spec import TrainerSpec
from align.train.state import random_state
from align.train.strategy import trainable
from align.train.trainer import PolicyTrainer
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import conversation, group, pair, unpaired

LORA, FULL = Adapter(rank=4, alpha=8), Adapter(kind="full")
KINDS = {"lora": LORA, "full": FULL}
MAKE = {"sft": conversation, "kto": unpaired, "grpo": group}  # the others take pairs

# name of the case: (loss, options, number of trees). 7 trees are uneven over two ranks; 1 is a group cut between its
# branches, or a conversation or pair that leaves a rank idle; 2 and 3 are a last, partial window.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "sft": ("sft", {}, 7),
    "sft-dft": ("sft", {"variant": "dft"}, 7),
    "dpo": ("dpo", {}, 7),
    "dpo-ipo": ("dpo", {"variant": "ipo"}, 7),
    "dpo-aot": ("dpo", {"variant": "aot"}, 7),
    "dpo-aot_unpaired": ("dpo", {"variant": "aot_unpaired"}, 7),
    "dpo-wpo": ("dpo", {"weighting": "wpo", "ld_alpha": 0.5}, 7),
    "kto": ("kto", {}, 7),
    "kto-of-two": ("kto", {}, 2),
    "kto-of-three": ("kto", {}, 3),
    "kto-apo": ("kto", {"variant": "apo_zero_unpaired"}, 7),
    "orpo": ("orpo", {}, 7),
    "simpo": ("simpo", {"nll_weight": 1.0}, 7),
    "cpo": ("cpo", {}, 7),
    "reward-model": ("reward_model", {"centre": 0.05}, 7),
    "grpo-token": ("grpo", {"kl": 0.1, "entropy_bonus": 0.01}, 5),
    "grpo-sequence": ("grpo", {"kl": 0.1, "aggregation": "sequence"}, 5),
    "grpo-constant": ("grpo", {"kl": 0.1, "aggregation": "constant", "constant_length": 16}, 5),
    "grpo-top-entropy": ("grpo", {"top_entropy": 0.3, "kl": 0.1}, 5),
    "grpo-gspo": ("grpo", {"kl": 0.1, "aggregation": "sequence", "ratio": "sequence"}, 5),
    "grpo-corrected": ("grpo", {"correction": {"level": "sequence", "mode": "mask", "floor": 0.05}, "kl": 0.1}, 5),
    "grpo-of-one": ("grpo", {"kl": 0.1}, 1),
    "sft-of-one": ("sft", {}, 1),
    "dpo-of-one": ("dpo", {}, 1),
}
LORA_ONLY = (
    "sft-dft",
    "dpo-wpo",
    "kto-apo",
    "grpo-gspo",
    "grpo-corrected",
)  # more of a loss that is run in full anyway
RUNS = [(c, kind) for c in CASES for kind in KINDS if kind == "lora" or not ("-of-" in c or c in LORA_ONLY)]
REFERENCED = ("dpo", "kto", "grpo")
OWN = ("time/", "comm/", "train/microbatches", "tokens/trained")  # of how it was computed


def make_spec(base: Path, loss: str, kind: Adapter, **options: Any) -> TrainerSpec:
    return TrainerSpec(
        model=Model(path=str(base), dtype="float32"),
        base=str(base),
        adapter_config=kind,
        losses=(LossTerm(name=loss, **options),),
        # a large eps: the update is then a smooth function of the gradient, so weights are compared, not signs
        optim=Optim(lr=1e-2, schedule="constant", warmup=0.0, eps=1e-2, max_grad_norm=0.5),
        total_updates=10,
        max_tokens=60,
        reference="start" if loss in REFERENCED else None,
        threads=1,
    )


def trees_of(loss: str, n: int, seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    return [MAKE.get(loss, pair)(rng, i) for i in range(n)]


def perturb(trainer: PolicyTrainer) -> None:
    """Away from the reference, by the same amount everywhere."""
    generator = torch.Generator().manual_seed(6)  # for which the z of every KTO case is above 0
    with torch.no_grad():
        for p in trainer.parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def weights(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable(trainer.module).items()}


def run_case(base: Path, case: str, kind: str, ranks: Ranks) -> dict[str, Any]:
    loss, options, n = CASES[case]
    trainer = PolicyTrainer(make_spec(base, loss, KINDS[kind], **options), ranks=ranks)
    perturb(trainer)
    trees = trees_of(loss, n)
    grads: list[torch.Tensor] = []
    assert trainer.optimizer is not None
    trainer.optimizer.register_step_pre_hook(
        lambda *_: grads.extend(p.grad.clone() for p in trainer.parameters if p.grad is not None)
    )
    found = {"evaluated": trainer.evaluate(trees), "logps": trainer.logps(trees) if loss != "reward_model" else []}
    found["metrics"] = trainer.step(trees, step=0, progress=0.0)
    return found | {"grads": grads, "weights": weights(trainer)}


def run_proximal(base: Path, ranks: Ranks) -> list[dict[str, float]]:
    """Two updates against the policy before the first: on five groups, and on one that is cut between its branches."""
    metrics = []
    for n in (5, 1):
        trainer = PolicyTrainer(make_spec(base, "grpo", LORA), ranks=ranks)
        perturb(trainer)
        trees = trees_of("grpo", n)
        trees = [carrying(tree, logps) for tree, logps in zip(trees, trainer.logps(trees), strict=True)]
        metrics += [trainer.step(trees, step=step, progress=step / 10) for step in range(2)]
    return metrics


def run_bad_steps(base: Path, ranks: Ranks) -> dict[str, Any]:
    """One tree of four is not finite: only one rank sees it."""
    trainer = PolicyTrainer(make_spec(base, "grpo", LORA), ranks=ranks)
    good = trees_of("grpo", 4)
    broken = replace(good[0].branches[0], advantages=np.full(len(good[0].branches[0]), np.nan, np.float32))
    bad = [replace(good[0], branches=(broken, *good[0].branches[1:])), *good[1:]]
    before, metrics = weights(trainer), []
    try:
        for step in range(5):
            metrics.append(trainer.step(bad, step=step, progress=0.0))
    except NonFiniteError as error:
        return {"metrics": metrics, "error": str(error), "before": before, "after": weights(trainer)}
    raise AssertionError("three bad steps in a row end the run")


def run_resume(base: Path, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Dropout on, a checkpoint in the middle; then a second trainer from that checkpoint."""
    spec = make_spec(base, "sft", LORA.model_copy(update={"dropout": 0.2}))

    def go(trainer: PolicyTrainer, steps: Sequence[int]) -> list[dict[str, float]]:
        return [trainer.step(trees_of("sft", 7, seed=s), step=s, progress=s / 10) for s in steps]

    straight = PolicyTrainer(spec, ranks=ranks)
    go(straight, (0, 1))
    if ranks.rank == 0:
        folder.mkdir()
    ranks.barrier()
    straight.save(folder)
    saved = weights(straight)
    expected = go(straight, (2, 3))
    resumed = PolicyTrainer(spec, ranks=ranks)
    resumed.restore(folder)
    state = random_state()["cpu"]
    got = go(resumed, (2, 3))
    return {
        "expected": expected, "got": got, "straight": weights(straight), "resumed": weights(resumed), "saved": saved,
        "random": state,
    }  # fmt: skip


def run_traffic(base: Path, ranks: Ranks) -> dict[str, Any]:
    """What one update of sft with LoRA sent: no pre-pass, so gradients, metrics and the norm are all there is."""
    trainer = PolicyTrainer(make_spec(base, "sft", LORA), ranks=ranks)
    before = Counter(ranks.sent)
    metrics = trainer.step(trees_of("sft", 4), step=0, progress=0.0)
    sent = Counter(ranks.sent)
    sent.subtract(before)
    return {"sent": +sent, "metrics": metrics, "gradients": [p.nbytes for p in trainer.parameters]}


def run_odds(base: Path, folder: Path, ranks: Ranks) -> dict[str, Any]:
    started = weights(PolicyTrainer(replace(make_spec(base, "sft", LORA), seed=ranks.rank), ranks=ranks))
    trainer = PolicyTrainer(make_spec(base, "sft", LORA), ranks=ranks)
    sums = MetricSums()
    r = float(ranks.rank)
    sums.add({"a": Metric(torch.tensor(1.0 + r), 1.0 + r), "b": Metric(torch.tensor(r), reduce="max")})
    if ranks.rank == 1:
        sums.add({"c": Metric(torch.tensor(5.0), reduce="sum"), "d": Metric(torch.tensor(math.nan), reduce="max")})
    else:
        sums.add({"d": Metric(torch.tensor(1.0), reduce="max")})
    ranks.require_equal(trainer.parameters)
    with pytest.raises(RanksError, match="drifted apart"):
        ranks.require_equal([torch.tensor([0.5]), torch.tensor([1.0 + 1e-6 * ranks.rank])])
    return {
        "started": started,
        "published": trainer.publish(folder, 3),
        "joined": sums.result(ranks.objects),
        "ragged": ranks.gather(torch.arange(3 * ranks.rank)),
        "half": _sum_of_half(ranks),
    }


def _sum_of_half(ranks: Ranks) -> torch.Tensor:
    tensors = [torch.full((3,), 1.0 + ranks.rank, dtype=torch.bfloat16), torch.full((2, 2), 0.5)]
    ranks.sum(tensors)
    return torch.cat([t.float().reshape(-1) for t in tensors])


def work(rank: int, base: Path, folder: Path, size: int) -> None:
    """What a rank does, from meeting the others to its results on disk."""
    ranks = Ranks.join(rank, size, init_method=f"file://{folder}/meet", limit_s=60.0)
    found: dict[str, Any] = {"cases": {}}
    for case, kind in RUNS:
        found["cases"][case, kind] = run_case(base, case, kind, ranks)
    found["proximal"] = run_proximal(base, ranks)
    found["bad"] = run_bad_steps(base, ranks)
    found["resume"] = run_resume(base, folder / "checkpoint", ranks)
    found["traffic"] = run_traffic(base, ranks)
    found["odds"] = run_odds(base, folder / "published", ranks)
    if rank == 1:
        found["lost"] = partner_lost(ranks)
    torch.save(found, folder / f"rank{rank}.pt")
    os._exit(0)  # rank 0 goes without a word


def partner_lost(ranks: Ranks) -> tuple[float, str]:
    started = time.monotonic()
    with pytest.raises(RanksError) as caught:
        ranks.gather(torch.zeros(2))
    return time.monotonic() - started, str(caught.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    model = make_model("qwen3")
    model.config.pad_token_id = 0  # a reward model wants one
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(base: Path, folder: Path) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """What two ranks found, and the cases as this process alone finds them."""
    processes = start_processes(work, (base, folder, 2), nprocs=2, join=False, start_method="spawn")
    threads = torch.get_num_threads()
    try:
        alone = {(case, kind): run_case(base, case, kind, Ranks()) for case, kind in RUNS}
        while not processes.join(timeout=120):
            pass
    finally:
        torch.set_num_threads(threads)
        for process in processes.processes:
            process.kill()
    both = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]  # noqa: TID251 (our own)
    return both, alone


def comparable(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(OWN)}


@pytest.mark.parametrize(("case", "kind"), RUNS)
def test_two_ranks_give_the_loss_gradients_metrics_and_weights_of_one(results: Any, case: str, kind: str) -> None:
    first, second = (rank["cases"][case, kind] for rank in results[0])
    alone = results[1][case, kind]
    for name in ("evaluated", "metrics"):
        got, expected = comparable(first[name]), comparable(alone[name])
        assert got == comparable(second[name])
        assert got["loss/total"] == pytest.approx(expected["loss/total"], rel=1e-6, abs=1e-6)
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(first["grads"]) == len(alone["grads"]) > 0
    scale = max(float(g.abs().max()) for g in alone["grads"])
    assert scale > 0
    for mine, theirs in zip(first["grads"], alone["grads"], strict=True):
        assert float((mine - theirs).abs().max()) / scale < 1e-5
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def test_the_ratio_of_two_ranks_is_exactly_one_before_an_update_and_that_of_one_rank_after(
    results: Any, base: Path
) -> None:
    first, second = (rank["proximal"] for rank in results[0])
    alone = run_proximal(base, Ranks())
    for mine, other, expected in zip(first, second, alone, strict=True):
        assert comparable(mine) == comparable(other) == pytest.approx(comparable(expected), rel=1e-4, abs=1e-5)
    assert [m["policy/ratio"] == 1.0 for m in first] == [True, False, True, False]


def test_the_zero_point_of_kto_is_not_zero_in_these_cases(results: Any) -> None:
    for case, kind in RUNS:
        if case in ("kto", "kto-of-two", "kto-of-three"):
            point = results[1][case, kind]["metrics"]["policy/reference_point"]
            assert point > 0.01, "a z of 0 would prove nothing about the pre-pass"


def test_log_probabilities_come_back_in_the_order_given(results: Any) -> None:
    for key, alone in results[1].items():
        for got in (rank["cases"][key]["logps"] for rank in results[0]):
            for mine, theirs in zip(itertools.chain(*got), itertools.chain(*alone["logps"]), strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_what_is_not_finite_on_one_rank_is_refused_on_all(results: Any) -> None:
    for found in (rank["bad"] for rank in results[0]):
        assert [m["optim/skipped"] for m in found["metrics"]] == [1.0, 1.0]
        assert "3 steps in a row" in found["error"]
        assert all(torch.equal(value, found["after"][name]) for name, value in found["before"].items())


def test_a_run_on_two_ranks_resumes_bit_for_bit_with_the_dropout_of_each_rank(results: Any) -> None:
    first, second = (rank["resume"] for rank in results[0])
    for found in (first, second):
        assert [comparable(m) for m in found["got"]] == [comparable(m) for m in found["expected"]]
        assert all(torch.equal(value, found["resumed"][name]) for name, value in found["straight"].items())
    assert not torch.equal(first["random"], second["random"])
    assert all(torch.equal(value, second["resumed"][name]) for name, value in first["resumed"].items())


def test_a_checkpoint_of_two_ranks_is_restored_by_one(results: Any, base: Path, folder: Path) -> None:
    trainer = PolicyTrainer(make_spec(base, "sft", LORA.model_copy(update={"dropout": 0.2})))
    trainer.restore(folder / "checkpoint")
    saved = results[0][0]["resume"]["saved"]
    assert all(torch.equal(value, saved[name]) for name, value in weights(trainer).items())
    assert (folder / "checkpoint" / "adapter" / "adapter_model.safetensors").is_file()


def test_ranks_begin_with_the_weights_of_rank_0_publish_one_version_and_notice_a_drift(results: Any) -> None:
    first, second = (rank["odds"] for rank in results[0])
    assert all(torch.equal(value, second["started"][name]) for name, value in first["started"].items())
    assert first["published"] == second["published"] and first["published"].version == 3


def test_an_update_sends_what_a_ring_sends_of_the_trained_gradients_and_says_so(results: Any) -> None:
    for found in (rank["traffic"] for rank in results[0]):
        assert set(found["sent"]) == {"all_reduce", "all_gather"}
        flags = 4 * len(found["gradients"])  # a float32 each: whether any rank has a gradient
        assert found["sent"]["all_reduce"] == 2 * (2 - 1) * (sum(found["gradients"]) + flags) / 2
        assert found["metrics"]["comm/bytes"] == found["sent"].total()
        assert 0 < found["metrics"]["time/communicate"] < found["metrics"]["time/train"]
        assert found["sent"]["all_gather"] < 2000  # metrics and the gradient norm


def test_a_process_on_its_own_sends_nothing(base: Path) -> None:
    ranks = Ranks()
    trainer = PolicyTrainer(make_spec(base, "sft", LORA), ranks=ranks)
    metrics = trainer.step(trees_of("sft", 4), step=0, progress=0.0)
    assert ranks.traffic() == (0, 0.0) and not {"comm/bytes", "time/communicate"} & set(metrics)


def test_metrics_join_by_sum_mean_and_max_and_ragged_tensors_by_rank(results: Any) -> None:
    for odds in (rank["odds"] for rank in results[0]):
        assert {k: v for k, v in odds["joined"].items() if k != "d"} == {"a": 1.0, "b": 1.0, "c": 5.0}
        assert math.isnan(odds["joined"]["d"])
        assert odds["ragged"].tolist() == [0, 1, 2]
        assert odds["half"].tolist() == [3.0] * 3 + [1.0] * 4


def test_a_rank_whose_partner_ended_says_so_at_once(results: Any) -> None:
    seconds, message = results[0][1]["lost"]
    assert seconds < 20 and "rank 1 of 2 lost the others" in message and "another rank failed first" in message


# ------------------------------------------------------------------------------------------------------ balancing


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_fullest_bin_is_within_grahams_bound_of_the_best_possible(sizes: list[int], bins: int) -> None:
    shares = assign(sizes, bins)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    best = min(
        max(sum(s for s, b in zip(sizes, where, strict=True) if b == bin) for bin in range(bins))
        for where in itertools.product(range(bins), repeat=len(sizes))
    )
    assert max(sum(sizes[i] for i in share) for share in shares) <= (4 / 3 - 1 / (3 * bins)) * best + 1e-9


def bare_tree(id: int, trunk: int, branches: Sequence[int]) -> Tree:
    def part(n: int) -> Segment:
        return Segment(np.arange(n) + id, np.ones(n, dtype=bool))

    return Tree(id, part(trunk), tuple(part(n) for n in branches))


some_trees = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 12), max_size=5)), min_size=1, max_size=12
).map(lambda shapes: [bare_tree(i, trunk, branches) for i, (trunk, branches) in enumerate(shapes)])


@settings(deadline=None)
@given(some_trees, st.integers(1, 60), st.booleans(), st.integers(1, 5), st.randoms())
def test_ranks_share_every_branch_once_evenly_and_in_any_order(
    trees: list[Tree], budget: int, together: bool, ranks: int, random: Any
) -> None:
    plan = plan_ranks(trees, budget, keep_together=together, ranks=ranks)
    assert len(plan) == ranks and len({len(share) for share in plan}) == 1
    counted = [part.trees for share in plan for part in share if part.counted]
    branches = sorted((t.id, id(b)) for part in counted for t in part for b in t.sequences)
    assert branches == sorted((t.id, id(b)) for t in trees for b in t.sequences)
    if together:
        assert sorted(t.id for part in counted for t in part) == [t.id for t in trees]
    assert all(len(part) == 1 or sum(t.tokens for t in part) <= budget for part in counted)
    if ranks == 1:
        assert counted == plan_microbatches(trees, budget, keep_together=together)
    # a rank is idle only where there are not enough trees, or branches where trees may be cut
    pieces = len(trees) if together else sum(len(t.sequences) for t in trees)
    assert all(share[0].counted for share in plan) or pieces < ranks

    shuffled = trees[:]
    random.shuffle(shuffled)
    again = plan_ranks(shuffled, budget, keep_together=together, ranks=ranks)
    assert [[(part.counted, shape_of(part.trees)) for part in share] for share in again] == [
        [(part.counted, shape_of(part.trees)) for part in share] for share in plan
    ]


def shape_of(trees: list[Tree]) -> list[tuple[int, int, int]]:
    return [(tree.id, len(tree.branches), tree.tokens) for tree in trees]


@settings(deadline=None)
@given(some_trees, st.integers(2, 4))
def test_no_rank_is_further_from_the_mean_than_the_largest_microbatch(trees: list[Tree], ranks: int) -> None:
    plan = plan_ranks(trees, 40, keep_together=True, ranks=ranks)
    loads = [sum(t.tokens for part in share if part.counted for t in part.trees) for share in plan]
    largest = max(sum(t.tokens for t in part.trees) for share in plan for part in share)
    assert max(loads) - min(loads) <= largest
