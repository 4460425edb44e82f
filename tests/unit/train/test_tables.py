"""Strategies and optimizers are found by name in one table each, and an optimizer is made of what a strategy placed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align.errors import Unsupported
from align.recipe import optimizers, sharding
from align.recipe.adapter import Adapter, Rate
from align.recipe.inputs import Model
from align.recipe.optimizers import Optimizer
from align.recipe.parts import LossTerm, Optim
from align.recipe.sharding import Sharding, Strategy
from align.train.optim import make_optimizer
from align.train.ranks import Ranks
from align.train.spec import TrainerSpec
from align.train.strategy import Replicated, make_strategy
from align.train.trainer import PolicyTrainer
from tests.unit.core.families import make_family


class Moved(Replicated):
    """Puts other tensors in the place of the parameters, as FSDP2 does, before the optimizer is made."""

    name = "moved"

    def __init__(self, sharding: Sharding, module: Any, optimizer: Callable[[], Any], *rest: Any):
        for inner in module.modules():
            for name, parameter in list(inner._parameters.items()):
                if parameter is not None and parameter.requires_grad:
                    inner._parameters[name] = torch.nn.Parameter(parameter.detach().clone())
        super().__init__(sharding, module, optimizer, *rest)


def signs(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    """Plain gradient descent: no moments."""
    return torch.optim.SGD(groups, lr=optim.lr or 0.0)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Any], None]:
    """Add one line to a table."""

    def add(module: Any, table: str, name: str, entry: Any) -> None:
        monkeypatch.setattr(module, table, {**getattr(module, table), name: entry})
        for other in ("align.train.strategy", "align.train.optim", "align.recipe.parts"):
            monkeypatch.setattr(f"{other}.{table}", getattr(module, table), raising=False)

    return add


def spec_of(folder: Path, sharding: Sharding) -> TrainerSpec:
    make_family("qwen3").save_pretrained(folder)
    return TrainerSpec(
        model=Model(path=str(folder), dtype="float32"),
        base=str(folder),
        adapter_config=Adapter(kind="full"),
        losses=(LossTerm(name="sft"),),
        optim=Optim(lr=1e-2),
        total_updates=2,
        sharding=sharding,
    )


def test_a_strategy_that_no_table_names_is_refused_and_not_replicated(tmp_path: Path) -> None:
    trainer = PolicyTrainer(spec_of(tmp_path / "model", Sharding()))
    unknown = Sharding.model_construct(name="fsdp2")
    with pytest.raises(Unsupported, match="there is no strategy 'fsdp2'"):
        make_strategy(unknown, trainer.module, trainer._make_optimizer, Ranks(), 1.0)
    with pytest.raises(ValueError, match="FSDP is not offered"):
        Sharding(name="fsdp2")


def test_an_optimizer_holds_the_parameters_that_its_strategy_placed(tmp_path: Path, line: Any) -> None:
    line(sharding, "STRATEGIES", "moved", Strategy(f"{__name__}:Moved"))
    trainer = PolicyTrainer(spec_of(tmp_path / "model", Sharding(name="moved")))
    assert trainer.describe()["strategy"] == "moved"
    assert trainer.optimizer is not None
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(held) > 2 and held == {id(p) for p in trainer.module.parameters() if p.requires_grad}


def test_an_optimizer_is_one_function_and_one_line(line: Any) -> None:
    with pytest.raises(ValueError, match="'descent' is no optimizer: use adamw or adamw_8bit"):
        Optim(name="descent")
    line(optimizers, "OPTIMIZERS", "descent", Optimizer(f"{__name__}:signs", 0.0))
    weight, bias = (torch.nn.Parameter(torch.ones(n)) for n in ((3, 2), (3,)))
    optim = Optim(name="descent", lr=0.5, weight_decay=0.1)
    made = make_optimizer({"language": [weight, bias]}, optim, {"language": Rate(0.5, 0.1)})
    (weight.sum() + bias.sum()).backward()
    made.step()
    assert torch.equal(bias, torch.full((3,), 0.5)) and torch.equal(weight, torch.full((3, 2), 0.45))
    with pytest.raises(ValueError, match="`betas` has no effect on `name: descent`"):
        Optim(name="descent", betas=(0.8, 0.9))
