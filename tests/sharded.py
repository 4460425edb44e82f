"""One training, on any number of ranks and by any strategy: what tests and proofs of sharding compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.spawn import start_processes

from align.protocols.trees import Tree
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model
from align.recipe.parts import LossTerm, Optim
from align.recipe.sharding import Offload, Sharding
from align.train.ranks import Ranks
from align.train.spec import TrainerSpec
from align.train.trainer import PolicyTrainer
from tests.unit.core.pictures import Workshop, open_workshop
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import conversation, group, pair, unpaired

SHOP = "pictures/shop.pt"
STEPS = 20  # of a whole run, the length of the schedule
LORA, FULL = Adapter(rank=4, alpha=8), Adapter(kind="full")
ON_HEAD = Adapter(rank=4, alpha=8, targets=("q_proj", "down_proj", "lm_head"))
PICTURES = Adapter(rank=4, alpha=8, targets=r".*language_model.*_proj")
TOWERS = Adapter(kind="full", tune={"vision": "full", "projector": "full"})
# nothing of these tiny models would be spread if small parameters were kept whole
STRATEGIES = {
    "replicated": Sharding(),
    "zero1": Sharding(name="zero1"),
    "zero2": Sharding(name="zero2"),
    "zero3": Sharding(name="zero3", keep_whole=0),
    "zero2-offload": Sharding(name="zero2", offload=Offload(optimizer="cpu")),
    "zero3-offload": Sharding(name="zero3", offload=Offload(optimizer="cpu", parameters="cpu"), keep_whole=0),
    "zero3-keeping": Sharding(name="zero3", keep_whole=300),
}
SPREAD = ("replicated", "zero1", "zero2", "zero3")
MAKE = {"sft": conversation, "dpo": pair, "reward_model": pair, "kto": unpaired, "grpo": group}


@dataclass(frozen=True)
class Case:
    """trees: how many at a step, uneven over two ranks; base: which of the models that `write_bases` wrote."""

    loss: str
    adapter: Adapter = LORA
    trees: int = 7
    base: str = "tied"
    options: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    strategies: tuple[str, ...] = SPREAD


CASES = {
    "sft": Case("sft", strategies=(*SPREAD, "zero2-offload", "zero3-offload", "zero3-keeping")),
    "sft-tied-full": Case("sft", FULL, strategies=(*SPREAD, "zero3-offload")),
    "sft-untied-full": Case("sft", FULL, base="untied"),
    "sft-lora-on-head": Case("sft", ON_HEAD),
    "sft-checkpointing": Case("sft", checkpointing=True),
    "sft-full-checkpointing": Case("sft", FULL, checkpointing=True),
    "dpo": Case("dpo"),
    "dpo-full": Case("dpo", FULL),
    "kto": Case("kto"),
    "reward-model": Case("reward_model"),
    "grpo": Case("grpo", trees=5, options={"kl": 0.1, "entropy_bonus": 0.01}),
    "grpo-full": Case("grpo", FULL, trees=5, options={"kl": 0.1, "entropy_bonus": 0.01}),
    "grpo-of-one": Case("grpo", trees=1, options={"kl": 0.1}),
    "pictures": Case("dpo", PICTURES, base="pictures"),
    "pictures-towers": Case("dpo", TOWERS, base="pictures", strategies=("replicated", "zero1", "zero2")),
}


def write_bases(folder: Path) -> None:
    """Tiny models; of each its own folder."""
    for name, tied in (("tied", True), ("untied", False)):
        model = make_model("qwen3", tie_word_embeddings=tied)
        model.config.pad_token_id = 0  # a reward model wants one
        model.save_pretrained(folder / name)
    torch.save(open_workshop("qwen2_vl", folder / "pictures"), folder / SHOP)


@cache
def shop_of(folder: Path) -> Workshop:
    shop: Workshop = torch.load(folder / SHOP, weights_only=False)  # noqa: TID251 (our own)
    return shop


def spec_of(folder: Path, case: Case, sharding: Sharding, **changes: Any) -> TrainerSpec:
    base = shop_of(folder).folder if case.base == "pictures" else folder / case.base
    spec = TrainerSpec(
        model=Model(path=str(base), dtype="float32", gradient_checkpointing=case.checkpointing),
        base=str(base),
        adapter_config=case.adapter,
        losses=(LossTerm(name=case.loss, **case.options),),
        # a large eps: the update is then a smooth function of the gradient, so weights are compared, not signs
        optim=Optim(lr=1e-2, schedule="cosine", warmup=0.1, eps=1e-2, weight_decay=0.01, max_grad_norm=0.5),
        total_updates=STEPS,
        max_tokens=60,
        reference="start" if case.loss in ("dpo", "kto", "grpo") else None,
        threads=1,
        sharding=sharding,
    )
    return replace(spec, **changes)


def trees_of(folder: Path, case: Case, step: int) -> list[Tree]:
    if case.base == "pictures":
        return one_picture(shop_of(folder), step)
    rng = np.random.default_rng(step)
    return [MAKE[case.loss](rng, i) for i in range(case.trees)]


def one_picture(shop: Workshop, step: int) -> list[Tree]:
    """Pairs of text and one on a picture: at every other step no pair has one."""
    rng = np.random.default_rng(step)
    first = shop.segment(rng, 6, 2) if step % 2 == 0 else shop.segment(rng, 12)
    trunks = [first, *(shop.segment(rng, 40) for _ in range(3))]
    return [Tree(n, trunk, tuple(shop.segment(rng, k, scored=True) for k in (4, 3))) for n, trunk in enumerate(trunks)]


def train(
    folder: Path, case: Case, strategy: str, ranks: Ranks, steps: Sequence[int], saved: Path | None = None,
    resumed: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Losses, gradient norms and final weights of `steps`, from the checkpoint `resumed` on; then saved to `saved`."""
    trainer = PolicyTrainer(spec_of(folder, case, STRATEGIES[strategy]), ranks=ranks)
    if resumed is not None:
        trainer.restore(resumed)
    metrics = [trainer.step(trees_of(folder, case, step), step=step, progress=step / STEPS) for step in steps]
    if saved is not None:
        if ranks.rank == 0:
            saved.mkdir(parents=True)
        ranks.barrier()
        trainer.save(saved)
    weights = {name: value.clone() for name, value, _ in trainer.strategy.state()}
    found = {
        "losses": [one["loss/total"] for one in metrics],
        "norms": [one["optim/grad_norm"] for one in metrics],
        "weights": weights,
        "evaluated": trainer.evaluate(trees_of(folder, case, 0))["loss/total"],
    }
    trainer.close()
    return found


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The largest differences of two runs: of losses, of gradient norms (relative), of weights."""
    assert one["weights"].keys() == other["weights"].keys() and len(one["losses"]) == len(other["losses"]) > 0
    pairs = zip(one["norms"], other["norms"], strict=True)
    return {
        "losses": max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)),
        "norms": max(abs(a - b) / max(a, b) for a, b in pairs),
        "weights": max(float((value - other["weights"][name]).abs().max()) for name, value in one["weights"].items()),
        "evaluated": abs(one["evaluated"] - other["evaluated"]),
    }


def on_ranks(size: int, folder: Path, job: Callable[[Ranks], Any], limit_s: float = 300.0) -> list[Any]:
    """What `job`, a picklable function, answers on each of `size` processes that form one group. Each ends when it
    is done, and does not wait for the others."""
    meeting = folder / f"meet-{os.urandom(4).hex()}"
    meeting.mkdir(parents=True)
    processes = start_processes(_rank, (meeting, size, job), nprocs=size, join=False, start_method="spawn")
    try:
        while not processes.join(timeout=limit_s):
            pass
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(meeting / f"{rank}.pt", weights_only=False) for rank in range(size)]  # noqa: TID251 (our own)


def _rank(rank: int, meeting: Path, size: int, job: Callable[[Ranks], Any]) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(rank, size, init_method=f"file://{meeting}/store", limit_s=120.0)
    torch.save(job(ranks), meeting / f"{rank}.pt")
    os._exit(0)  # what DeepSpeed leaves for the interpreter's end is not worth waiting for
