"""The arithmetic of the memory plan: against hand-made sums, and activations against what autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.check.machine import Machine
from align.check.memory.advice import Asked, changes, verdict
from align.check.memory.plan import Work, _kept, engine, trainer
from align.check.memory.sizes import Sizes, sizes_of
from align.check.validate import validate
from align.data.packing import global_counts
from align.errors import UserError
from align.recipe.adapter import Adapter, Quant
from align.recipe.inputs import Model
from align.recipe.load import load_document
from align.recipe.support import check_sharded
from align.train.metrics import MetricSums
from align.train.trainer import PolicyTrainer
from tests.bench.memory_plan import conversations
from tests.unit.check.workshop import Workshop
from tests.unit.core.families import make_family
from tests.unit.train.test_trainer import make_spec

CONFIG: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008
GIB = 2**30


def llama() -> Sizes:
    sizes = sizes_of(CONFIG)
    assert sizes is not None
    return sizes


def test_weights_in_four_bits_are_half_a_byte_and_their_scales() -> None:
    assert Quant().bytes_per_weight == pytest.approx(0.5 + (1 + 4 / 256) / 64)  # 4.127 bits: 2305.14314, section 3
    assert Quant(double=False).bytes_per_weight == 0.5 + 4 / 64
    parts = trainer(llama(), Adapter(kind="qlora"), Work("bfloat16", 2048)).parts
    outside = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096
    assert parts["weights"] == pytest.approx(32 * LAYER * Quant().bytes_per_weight + 2 * outside)
    assert parts["adapter"] == parts["gradients"] == parts["optimizer"] / 2


def test_qlora_of_a_7b_shape_is_planned_within_nine_gigabytes_at_2048_tokens() -> None:
    work = Work("bfloat16", 2048, gpu=True, checkpointing=True)
    assert trainer(llama(), Adapter(kind="qlora"), work).total < 9e9
    assert trainer(llama(), Adapter(kind="lora"), work).total > 14e9


def test_zero_divides_what_its_stage_spreads() -> None:
    adapter, one = Adapter(kind="full"), Work("float32", 128)
    whole = trainer(llama(), adapter, one).parts
    for stage in (1, 2, 3):
        parts = trainer(llama(), adapter, replace(one, strategy=f"zero{stage}", ranks=4)).parts
        assert parts["optimizer"] == whole["optimizer"] * 12 / 8 / 4  # DeepSpeed's flat copy beside two moments
        assert parts["gradients"] == whole["gradients"] / (4 if stage >= 2 else 1)
        assert parts["weights"] == whole["weights"] / (4 if stage == 3 else 1)


def test_moments_in_eight_bits_take_a_quarter() -> None:
    found = {name: trainer(llama(), Adapter(kind="full"), Work("float32", 1, optimizer=name)) for name in OPTIMIZERS}
    eight, whole = found["adamw_8bit"].parts["optimizer"], found["adamw"].parts["optimizer"]
    assert whole / 4 < eight < whole / 3.9


OPTIMIZERS: Any = ("adamw", "adamw_8bit")


def test_an_engine_takes_what_completions_need_or_what_it_was_given() -> None:
    needed = engine(llama(), "bfloat16", sequences=3, length=100)
    assert needed.total - needed.parts["weights"] == 3 * 100 * 2 * 32 * 4096 * 2
    assert engine(llama(), "bfloat16", sequences=3, length=100, reserved=5.0).parts["KV cache, as reserved"] == 5


@pytest.mark.parametrize(
    ("family", "adapter", "dtype", "checkpointing"),
    [
        ("llama", "lora", "float32", False),
        ("llama", "lora", "float32", True),
        ("qwen3", "qlora", "float32", False),
        ("llama", "qlora", "bfloat16", False),
        ("llama", "dora", "float32", False),
        ("qwen3", "full", "float32", False),
    ],
)
def test_activations_are_what_autograd_keeps(
    family: str, adapter: str, dtype: str, checkpointing: bool, tmp_path: Path
) -> None:
    settings = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 97}
    model = make_family(family, **settings)
    model.save_pretrained(tmp_path)
    spec = replace(
        make_spec(tmp_path, "sft", Adapter.model_validate({"kind": adapter, "rank": 1})),
        model=Model.model_validate({"path": str(tmp_path), "dtype": dtype, "gradient_checkpointing": checkpointing}),
    )
    subject = PolicyTrainer(spec)
    trees = conversations(2048, 97, length=512)
    batch, _ = subject.packer.microbatches(trees)[0]
    own = {parameter.untyped_storage().data_ptr() for parameter in subject.module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    subject.module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        subject._loss(batch, global_counts(trees), MetricSums(), subject._batch_stats(trees))
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    sizes = sizes_of(model.config.to_dict())
    assert sizes is not None
    work = Work(dtype, 2048, checkpointing=checkpointing)
    planned = _kept(sizes, spec.adapter_config, work)
    rows = 2 * sizes.hidden  # the head's, planned beside its tiles
    assert found == pytest.approx(2048 * (planned + rows) * (4 if dtype == "float32" else 2), rel=0.1)


# ------------------------------------------------------------------------------------------------------- what fits


def asked(kind: str = "lora", **work: Any) -> Asked:
    settings = {"tokens": 16384, "gpu": True} | work
    return Asked(llama(), Adapter.model_validate({"kind": kind}), Work("bfloat16", **settings), longest=1000)


def test_what_fits_needs_no_advice() -> None:
    assert verdict(asked(), 10**12, "its GPU") is None


@pytest.mark.parametrize(
    ("kind", "gib", "words"),
    [
        ("lora", 40, "`model.gradient_checkpointing: true` would make it"),
        ("lora", 10, "`adapter.kind: qlora`"),
        ("full", 60, "`model.gradient_checkpointing: true` and `placement.trainer: {ranks: 4, strategy: zero3}` would"),
    ],
)
def test_the_change_that_makes_it_fit_is_proposed(kind: str, gib: int, words: str) -> None:
    said = verdict(asked(kind), gib * GIB, "its GPU")
    assert said is not None and words in said and f"has {gib}.0 GiB" in said


def test_every_proposed_change_saves_and_nothing_is_proposed_where_nothing_helps() -> None:
    start = asked("full")
    for words, change in changes(start):
        assert change(start).total < start.total, words
    said = verdict(asked("qlora", checkpointing=True, tokens=1000), GIB, "its GPU")
    assert said is not None and "no setting makes it fit" in said


def test_a_stage_that_does_not_fit_the_machine_is_said_with_what_makes_it_fit(workshop: Workshop) -> None:
    recipe, document = load_document(workshop.recipe, ())
    small = Machine(cores=2, gpus=0, memory=40 << 20)
    plan = validate(recipe, workshop.folder, document=document, machine=small)
    lines = [line for stage in plan.stages for line in stage.lines if line.startswith("note: ")]
    assert any("in all; here are 40.0 MiB" in line for line in lines), lines
    assert any("the trainer needs about" in line for line in lines), lines


def test_a_gpu_that_two_processes_share_is_divided_between_them(workshop: Workshop) -> None:
    recipe, document = load_document(workshop.recipe, ())
    stages = []
    for memory in (64 << 20, 1 << 20):
        machine = Machine(cores=8, gpus=1, memory=16 << 30, gpu_memory=memory)
        stages.append(validate(recipe, workshop.folder, document=document, machine=machine).stages[2])
    assert stages[0].memory["each engine"].total == pytest.approx(0.9 * 0.5 * (64 << 20))  # what vLLM takes
    assert not any("of a GPU has" in line for line in stages[0].lines)
    assert any("its 0.5 of a GPU has 512 KiB" in line for line in stages[1].lines), stages[1].lines


def test_the_plan_says_what_is_packed_and_refuses_what_cannot_be(workshop: Workshop) -> None:
    machine = Machine(cores=2, gpus=0, memory=16 << 30)
    stages = []
    for adapter in ("{rank: 8}", "{rank: 8, kind: qlora, rslora: true}"):
        recipe, document = load_document(workshop.recipe, [f"stages.dpo.adapter={adapter}"])
        stages.append(validate(recipe, workshop.folder, document=document, machine=machine).stages[1:3])
    (dpo, _), (packed, grpo) = stages
    assert "LoRA on weights in four bits (nf4) of rank 8, alpha 32 (rsLoRA)" in packed.lines[0]
    assert packed.memory["trainer"].parts["weights"] < dpo.memory["trainer"].parts["weights"]
    assert any("receive whole weights" in line for line in grpo.lines)
    experts = ["model.config.num_experts=4", "stages.dpo.adapter={kind: qlora}"]
    recipe, document = load_document(workshop.recipe, experts)
    with pytest.raises(UserError, match="4 experts a block are stacked"):
        validate(recipe, workshop.folder, document=document, machine=machine)


def test_what_zero_cannot_spread_is_refused() -> None:
    check_sharded(Adapter(kind="qlora"), "adamw", "zero2")
    check_sharded(Adapter(kind="qlora"), "adamw_8bit", "zero0")
    for adapter, optimizer, strategy in ((Adapter(kind="qlora"), "adamw", "zero3"), (Adapter(), "adamw_8bit", "zero1")):
        with pytest.raises(UserError, match=strategy):
            check_sharded(adapter, optimizer, strategy)
