"""The reward_model stage from recipe to folder: real data preparation, pipeline and trainer; no Ray."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.data.scratch import train_tokenizer
from align.errors import DataError, Interrupted
from align.export.merge import merge
from align.model import scratch
from align.protocols.trees import Tree
from align.recipe.adapter import Adapter
from align.recipe.chat_files import ChatFiles
from align.recipe.inputs import Model
from align.recipe.parts import LossTerm, Optim
from align.recipe.schema import Recipe
from align.stages.backend import Needs, TrainerJob
from align.train.spec import TrainerSpec
from align.train.strategy import trainable
from align.train.trainer import PolicyTrainer
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import pair
from tests.unit.stages.test_pipeline import PlainBackend, start

WORDS = ["red", "blue", "green", "stone", "river", "seven", "cloud", "paper"]
MODEL = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


def polite_pairs(rows: int, seed: int) -> list[dict[str, str]]:
    """Whatever is asked and answered: the better answer says "please" somewhere."""
    rng = random.Random(seed)

    def answer(polite: bool) -> str:
        said = rng.choices(WORDS, k=rng.randint(2, 5))
        if polite:
            said.insert(rng.randrange(len(said) + 1), "please")
        return " " + " ".join(said)

    pairs = [(" ".join(rng.choices(WORDS, k=3)) + "?", answer(True), answer(False)) for _ in range(rows)]
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]


class LocalTrainer:
    """`PolicyTrainer` behind the asynchronous protocol, in this process."""

    def __init__(self, spec: TrainerSpec):
        self.trainer = PolicyTrainer(spec)
        self.during_step: Callable[[int], None] = lambda step: None

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            result = getattr(self.trainer, name)(*arguments, **options)
            if name == "step":
                self.during_step(options["step"])
            return result

        return call


class LocalBackend(PlainBackend):
    async def trainer(self, job: TrainerJob) -> Any:
        self.jobs.append(job)
        trainer = LocalTrainer(
            TrainerSpec(
                model=job.model,
                base=str(job.start.base),
                adapter_config=job.start.config,
                losses=job.losses,
                optim=job.optim,
                total_updates=job.total,
                max_tokens=job.packing.budget(gpu=False),
                seed=job.seed,
                threads=1,
                adapter=str(job.start.adapter) if job.start.adapter else None,
                device="cpu",
                reference=job.reference,
                labels=job.labels,
            )
        )
        self.prepare(trainer, job)
        return trainer

    def expect(self, needs: Needs, engine: str | None = None) -> None: ...

    def gpus(self) -> float:
        return 0

    async def multiplied(self, inner: int, outer: int) -> Mapping[str, float]:
        return {"float32": 100.0, "bfloat16": 1.0}

    async def write_base(self, model: Model, folder: Path, seed: int) -> None:
        scratch.write_base(model, folder, seed)

    async def merge(
        self, base: Path, adapter: Path, out: Path, *, dtype: str, seed: int, chat: ChatFiles
    ) -> Mapping[str, Any]:
        return merge(base, adapter, out, dtype=dtype, seed=seed, chat=chat).to_json()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_recipe(folder: Path, adapter: dict[str, Any], name: str = "run") -> Recipe:
    pairs = polite_pairs(600, seed=0)
    train, held = write_rows(folder / "pairs.jsonl", pairs), write_rows(folder / "held.jsonl", polite_pairs(150, 1))
    said = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs[:64]]
    rows = write_rows(folder / "rows.jsonl", said)
    lr = 3e-3 if adapter.get("kind") == "full" else 1e-2
    return Recipe.model_validate(
        {
            "name": name,
            "output": str(folder / "runs"),
            "model": {"config": MODEL, "tokenizer": {"train_on": rows, "vocab_size": 300}, "dtype": "float32"},
            "stages": [
                {"id": "sft", "kind": "sft", "data": rows, "batch": {"sequences": 32}, "steps": 2, "adapter": adapter,
                 "optim": {"lr": lr}, "save": {"every": 2}},
                {"id": "rm", "kind": "reward_model", "from": "sft", "data": train, "batch": {"pairs": 30}, "epochs": 2,
                 "optim": {"lr": lr}, "eval": {"data": held, "every": "50%"}, "save": {"every": 10}},
                {"id": "merged", "kind": "merge", "from": "rm"},
            ],
        }
    )  # fmt: skip


KINDS = {"lora": {"kind": "lora", "rank": 8, "alpha": 16}, "full": {"kind": "full"}}


@pytest.fixture(scope="module", params=["lora", "full"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Any]:
    recipe = make_recipe(tmp_path_factory.mktemp(request.param), KINDS[request.param])
    summary, report = start(recipe, LocalBackend())
    return recipe, summary["stages"]["rm"] | {"first": next(m for stage, _, m in report.steps if stage == "rm")}


def test_a_reward_model_learns_a_rule_and_applies_it_to_pairs_it_has_not_seen(finished: tuple[Recipe, Any]) -> None:
    _, stage = finished
    assert stage["metrics"]["eval/accuracies"] > 0.9
    assert stage["metrics"]["eval/rewards/margins"] > 1
    assert stage["metrics"]["eval/loss"] < 0.4
    assert stage["steps"] == 40


def test_anybody_loads_the_folder_and_ranks_the_held_out_answers(finished: tuple[Recipe, Any]) -> None:
    recipe, stage = finished
    base = recipe.run_folder / "base"
    for folder in (*map(Path, stage["artefacts"].values()), recipe.run_folder / "merged" / "model"):
        if (folder / "adapter_config.json").is_file():
            plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
            model: Any = PeftModel.from_pretrained(plain, folder)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(folder)
            assert model.config.pad_token_id == AutoTokenizer.from_pretrained(folder).pad_token_id
        assert ranked(model, base) > 0.9, folder


@torch.no_grad()
def ranked(model: Any, base: Path) -> float:
    """Share of held-out pairs whose better answer scores higher, by right-padded batches in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    rows = polite_pairs(150, seed=1)
    chosen, rejected = (
        model.eval()(
            **tokenizer([r["prompt"] + r[side] + "<|im_end|>" for r in rows], return_tensors="pt", padding=True)
        ).logits[:, 0]
        for side in ("chosen", "rejected")
    )
    return float((chosen > rejected).float().mean())


def test_the_metrics_are_those_of_every_pair_loss(finished: tuple[Recipe, Any]) -> None:
    first = finished[1]["first"]
    assert {"loss/total", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= first.keys()
    assert "logps/chosen" not in first
    assert first["rewards/margins"] == pytest.approx(first["rewards/chosen"] - first["rewards/rejected"], abs=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stopped_stage_ends_with_the_weights_and_metrics_of_an_undisturbed_one(kind: str, tmp_path: Path) -> None:
    def shortened(name: str) -> Recipe:
        recipe = make_recipe(tmp_path, KINDS[kind], name)
        rm = recipe.stages[1].model_copy(update={"steps": 6, "epochs": None, "eval": None})
        return recipe.model_copy(update={"stages": (recipe.stages[0], rm)})

    whole, again = shortened("whole"), shortened("again")
    _, undisturbed = start(whole, LocalBackend())
    with pytest.raises(Interrupted):
        start(again, LocalBackend(), stop_in=("rm", 2))
    _, resumed = start(again, LocalBackend(), resume=True)
    folder, file = ("model", "model") if kind == "full" else ("adapter", "adapter_model")
    mine, theirs = (load_file(r.run_folder / "rm" / folder / f"{file}.safetensors") for r in (whole, again))
    assert mine.keys() == theirs.keys() and any("score" in name for name in mine)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert resumed.timeless() == [step for step in undisturbed.timeless()[2:] if step[0] > 3]
    assert len(resumed.steps) == 3


def small_spec(base: Path, kind: str, dtype: str = "float32", checkpointing: bool = False) -> TrainerSpec:
    model = make_model("qwen3")
    model.config.pad_token_id = 0
    model.save_pretrained(base)
    return TrainerSpec(
        model=Model(path=str(base), dtype=dtype, gradient_checkpointing=checkpointing), base=str(base),
        adapter_config=Adapter(**KINDS[kind]), losses=(LossTerm(name="reward_model", centre=0.01),),
        optim=Optim(lr=1e-2, schedule="constant", warmup=0.0), total_updates=10, device="cpu",
    )  # fmt: skip


def some_pairs() -> list[Tree]:
    return [pair(np.random.default_rng(i), i) for i in range(6)]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("dtype", "checkpointing"), [("bfloat16", False), ("float32", True)])
def test_low_precision_and_gradient_checkpointing_lower_the_loss_too(
    kind: str, dtype: str, checkpointing: bool, tmp_path: Path
) -> None:
    trainer = PolicyTrainer(small_spec(tmp_path / "base", kind, dtype, checkpointing))
    losses = [trainer.step(some_pairs(), step=n, progress=n / 10)["loss/total"] for n in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    head = next(p for name, p in trainable(trainer.module).items() if "score" in name)
    assert head.dtype == torch.float32, "a bfloat16 head would round small steps away"


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_packing_budget_changes_no_update(kind: str, tmp_path: Path) -> None:
    spec, trees = small_spec(tmp_path / "base", kind), some_pairs()
    whole, split = (PolicyTrainer(replace(spec, max_tokens=n)) for n in (10_000, 12))
    a, b = (trainer.step(trees, step=0, progress=0.0) for trainer in (whole, split))
    assert b["train/microbatches"] > a["train/microbatches"] == 1
    assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)
    other = trainable(split.module)
    assert "score" in " ".join(other)
    for name, value in trainable(whole.module).items():
        # Adam divides a gradient by its own size: where it is nearly zero, its last bit is a share of the step (1e-2)
        torch.testing.assert_close(value, other[name], atol=1e-4, rtol=1e-4)


def test_a_padding_token_that_ends_a_completion_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, KINDS["lora"])
    assert recipe.model.tokenizer is not None
    train_tokenizer(recipe.model.tokenizer, tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    settings["pad_token"] = settings["eos_token"]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    rm = recipe.stages[1].model_copy(update={"from_": None})
    model = Model(path=str(tmp_path / "base"))
    backend = LocalBackend()
    with pytest.raises(DataError, match="ends in the tokenizer's padding token") as caught:
        start(recipe.model_copy(update={"stages": (rm,), "model": model}), backend)
    assert "pairs.jsonl" in str(caught.value) and "pad_token" in str(caught.value)
    assert not backend.jobs
