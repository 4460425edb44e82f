"""However parameters are spread over ranks, it is one training; what is saved and published does not depend on it.

Two real processes over gloo work through all of it once, and this process through the same alone. The long form, with
every case and 20 steps, is `python -m tests.prove ranks`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.errors import NonFiniteError, RanksError, Unsupported
from align.protocols.trainer import Publication
from align.recipe.sharding import Sharding
from align.train.ranks import Ranks
from align.train.strategy import make_strategy, trainable
from align.train.trainer import PolicyTrainer
from tests.sharded import CASES, STRATEGIES, apart, on_ranks, spec_of, train, trees_of, write_bases

pytestmark = pytest.mark.slow  # ranks that import deepspeed

FEW = 2
RUNS = [
    ("sft", "zero1"),
    ("sft", "zero3-offload"),
    ("sft-tied-full", "zero2"),
    ("sft-tied-full", "zero3"),
    ("sft-lora-on-head", "zero3"),
    ("sft-full-checkpointing", "zero3"),
    ("dpo", "zero3"),
    ("kto", "zero3"),
    ("reward-model", "zero3"),
    ("grpo-full", "zero2-offload"),
    ("grpo-of-one", "zero3"),
    ("pictures", "zero3"),
    ("pictures-towers", "zero2"),
]
CROSSED = ("zero1", "zero3", "replicated")


def together(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What each of two ranks does."""
    found: dict[str, Any] = {
        run: train(folder, CASES[run[0]], run[1], ranks, range(FEW), saved=folder / "saved" / "-".join(run))
        for run in RUNS
    }
    for strategy in CROSSED:  # from one rank to two, and on to the next strategy
        found["from one", strategy] = train(
            folder, CASES["sft"], strategy, ranks, range(FEW, 2 * FEW), resumed=folder / "saved" / "one"
        )
    found["from two"] = train(
        folder, CASES["sft"], "zero2", ranks, range(FEW, 2 * FEW), resumed=folder / "saved" / "sft-zero3-offload"
    )
    found["bad"] = {strategy: bad_steps(folder, strategy, ranks) for strategy in ("zero2", "zero3")}
    found["published"] = {case: publish(folder, case, "zero3", ranks) for case in ("adapter", "merged", "full")}
    lost = PolicyTrainer(spec_of(folder, CASES["sft"], STRATEGIES["zero3"]), ranks=ranks)
    ranks.barrier()
    if ranks.rank == 1:
        begun = time.monotonic()
        with pytest.raises(RanksError) as caught:
            lost.evaluate(trees_of(folder, CASES["sft"], 0))
        found["lost"] = time.monotonic() - begun, str(caught.value)
    return found


def bad_steps(folder: Path, strategy: str, ranks: Ranks) -> dict[str, Any]:
    """A step, then three of which one rank sees that they are not finite."""
    case = CASES["grpo"]
    trainer = PolicyTrainer(spec_of(folder, case, STRATEGIES[strategy]), ranks=ranks)
    good = trees_of(folder, case, 0)
    trainer.step(good, step=0, progress=0.0)
    nan = replace(good[0].branches[0], advantages=np.full(len(good[0].branches[0]), np.nan, np.float32))
    bad = [replace(good[0], branches=(nan, *good[0].branches[1:])), *good[1:]]
    before = [(value.clone(), own) for _, value, own in trainer.strategy.state()]
    error = ""
    try:
        for step in range(1, 5):
            trainer.step(bad, step=step, progress=0.1)
    except NonFiniteError as raised:
        error = str(raised)
    after = [(value.clone(), own) for _, value, own in trainer.strategy.state()]
    same = all(
        torch.equal(a, b) and all(torch.equal(one[key], other[key]) for key in one)
        for (a, one), (b, other) in zip(before, after, strict=True)
    )
    trainer.strategy.close()
    return {"error": error, "same": same, "moments": all(own for _, own in after)}


def publish(folder: Path, what: str, strategy: str, ranks: Ranks) -> Publication:
    case = CASES["sft-tied-full" if what == "full" else "sft"]
    spec = spec_of(folder, case, STRATEGIES[strategy], publish="adapter" if what == "adapter" else "weights")
    trainer = PolicyTrainer(spec, ranks=ranks)
    trainer.step(trees_of(folder, case, 0), step=0, progress=0.0)
    published = trainer.publish(folder / f"published-{what}-{strategy}-{ranks.size}", 3)
    trainer.close()
    return published


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sharding")
    write_bases(found)
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """Every case as this process alone trains it; of sft, a checkpoint, and what comes after it."""
    threads = torch.get_num_threads()
    found = {
        case: train(folder, CASES[case], "replicated", Ranks(), range(FEW)) for case in dict(RUNS) if case != "sft"
    }
    found["sft"] = train(folder, CASES["sft"], "replicated", Ranks(), range(FEW), saved=folder / "saved" / "one")
    found["later"] = train(
        folder, CASES["sft"], "replicated", Ranks(), range(FEW, 2 * FEW), resumed=folder / "saved" / "one"
    )
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def two(folder: Path, alone: Any) -> list[dict[Any, Any]]:
    return on_ranks(2, folder, partial(together, folder))


def agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    differences = apart(one, other)
    assert differences["losses"] < 1e-6 and differences["evaluated"] < 1e-6, differences
    assert differences["weights"] < 1e-5 and differences["norms"] < 1e-5, differences


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_two_ranks_by_any_strategy_are_one_process(two: Any, alone: Any, run: tuple[str, str]) -> None:
    first, second = two[0][run], two[1][run]
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    agree(first, alone[run[0]])


@pytest.mark.parametrize("strategy", CROSSED)
def test_a_checkpoint_of_one_rank_is_continued_by_two(two: Any, alone: Any, strategy: str) -> None:
    agree(two[0]["from one", strategy], alone["later"])


def test_a_checkpoint_crosses_stages_of_zero(two: Any, alone: Any) -> None:
    agree(two[0]["from two"], alone["later"])


@pytest.mark.parametrize("strategy", ["zero1", "zero3-offload"])
def test_a_checkpoint_of_two_ranks_is_continued_by_one(two: Any, alone: Any, folder: Path, strategy: str) -> None:
    saved = folder / "saved" / f"sft-{strategy}"
    agree(train(folder, CASES["sft"], "replicated", Ranks(), range(FEW, 2 * FEW), resumed=saved), alone["later"])
    assert (saved / "adapter" / "adapter_model.safetensors").is_file()


def test_what_is_not_finite_on_one_rank_changes_neither_weights_nor_moments(two: Any) -> None:
    for rank in two:
        for strategy, found in rank["bad"].items():
            assert "3 steps in a row" in found["error"], strategy
            assert found["same"] and found["moments"], strategy


def test_a_rank_whose_partner_ended_says_so_at_once(two: Any) -> None:
    seconds, message = two[1]["lost"]
    assert seconds < 20 and "rank 1 of 2 lost the others" in message and "another rank failed first" in message


@pytest.mark.parametrize("what", ["adapter", "merged", "full"])
def test_engines_get_from_spread_weights_what_they_get_from_whole_ones(two: Any, folder: Path, what: str) -> None:
    from safetensors.torch import load_file

    theirs = two[0]["published"][what]
    assert theirs == two[1]["published"][what]
    ours = publish(folder, what, "replicated", Ranks())
    file = "adapter_model.safetensors" if what == "adapter" else "model.safetensors"
    mine, other = load_file(Path(ours.path) / file), load_file(Path(theirs.path) / file)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)
    assert theirs.kind == ours.kind and theirs.rank == ours.rank and len(theirs.digest) == len(ours.digest)


@pytest.mark.parametrize("case", ["pictures-towers", "padded"])
def test_zero3_refuses_what_ranks_do_not_run_in_step(folder: Path, case: str) -> None:
    spec = spec_of(folder, CASES["sft" if case == "padded" else case], Sharding(name="zero3"))
    trainer = PolicyTrainer(replace(spec, sharding=Sharding()))
    if case == "padded":
        trainer.module.use("padded", "sdpa")
    with pytest.raises(Unsupported, match="zero3"):
        make_strategy(spec.sharding, trainer.module, trainer._make_optimizer, Ranks(), 1.0)
    assert trainable(trainer.module)
