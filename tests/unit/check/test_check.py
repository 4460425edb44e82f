"""`align check`: the plan it prints, what it never does, and how it agrees with what a run does."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from align.check.machine import Machine
from align.check.memory.sizes import read_config, sizes_of
from align.check.plan import Plan
from align.check.stage_checks import StageChecks
from align.check.validate import validate
from align.cli.main import main
from align.errors import DataError, PlacementError, UserError
from align.recipe.adapter import Adapter
from align.recipe.load import load_document
from tests.unit.check.workshop import Workshop, conversation

MACHINE = Machine(cores=8, gpus=0, memory=16 << 30)


def plan_of(shop: Workshop, *overrides: str, machine: Machine = MACHINE, every_row: bool = False) -> Plan:
    recipe, document = load_document(shop.recipe, overrides)
    return validate(recipe, shop.folder, document=document, machine=machine, every_row=every_row)


def test_a_sound_recipe_is_planned_stage_by_stage(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    for words in (
        "small, seed 3, 5 stages",
        "sft (sft)",
        "trains all weights",
        "6 steps of 4 sequences",  # 12 rows, 3 batches an epoch, 2 epochs
        "LoRA of rank 8",
        "reference: start",
        "3 steps of 4 pairs",  # 10 rows
        "x vllm, receive ",
        "5 steps of 2 groups x 4",
        "reward brevity: brevity (reward); 64 a call, 5 s, 2 retries, on_error mask, at most 2 % errors",
        "evaluates sft, grpo",
        "memory, trainer: about",
        "all right",
    ):
        assert words in out, f"{words!r} is not in:\n{out}"
    assert not (workshop.folder / "runs").exists()


def test_how_rewards_run_is_resolved_and_what_cannot_be_is_refused(workshop: Workshop) -> None:
    overrides = ["placement.rewards.count=2"]
    overrides += [f"stages.grpo.rewards.brevity.{word}" for word in ("processes=3", "rate=600/min", "cache=true")]
    stage = next(s for s in plan_of(workshop, *overrides).stages if s.id == "grpo")
    assert any(line.endswith("3 processes, rate 600/min, cached") for line in stage.lines), stage.lines
    assert [role.name for role in stage.roles][-2:] == ["rewards-0-0", "rewards-0-1"]
    with pytest.raises(UserError, match="rate is 'fast'"):
        plan_of(workshop, "stages.grpo.rewards.brevity.rate=fast")
    with pytest.raises(UserError, match=r"use `placement\.rewards\.count`"):
        plan_of(workshop, "placement.rewards.ranks=2")


def test_check_imports_no_torch_and_takes_less_than_five_seconds(workshop: Workshop) -> None:
    code = (
        "import sys; from align.cli.main import main; code = main(['check', 'recipe.yaml']); "
        "heavy = [m for m in ('torch', 'transformers', 'ray', 'vllm', 'datasets') if m in sys.modules]; "
        "print(heavy); sys.exit(code or len(heavy))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    # processor seconds, the described plugins' included: wall time here depends on who else uses the cores
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5.0


@pytest.mark.slow
def test_only_the_first_thousand_rows_are_read_unless_all_are_asked_for(workshop: Workshop) -> None:
    bad = {"messages": [{"role": "user", "content": "no answer"}]}
    workshop.write("sft.jsonl", [conversation(n % 12) for n in range(1100)] + [bad])
    plan = plan_of(workshop)
    assert plan.stages[0].steps is None  # how many there are is not known
    with pytest.raises(UserError, match=r"sft.jsonl:1101|assistant"):
        plan_of(workshop, every_row=True)


def test_the_plan_has_the_hash_of_every_plugin_as_a_run_compares_them(workshop: Workshop) -> None:
    before = plan_of(workshop).plugins
    assert set(before) == {"numeric", f"{workshop.folder}/judge.py:brevity"}
    assert all(len(digest) == 64 for digest in before.values())
    with workshop.folder.joinpath("judge.py").open("a") as file:
        file.write("# changed\n")
    after = plan_of(workshop).plugins
    assert after["numeric"] == before["numeric"] and after != before


def test_on_a_cluster_the_size_of_this_machine_does_not_count(workshop: Workshop) -> None:
    recipe, document = load_document(workshop.recipe, ["placement.trainer.gpus=4"])
    with pytest.raises(PlacementError, match="4 GPUs are asked for"):
        validate(recipe, workshop.folder, document=document, machine=MACHINE)
    validate(recipe, workshop.folder, document=document, machine=MACHINE, cluster=True)


def test_resources_of_nodes_are_for_a_cluster(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    named = "placement.rollout.resources={sample: 1}"
    with pytest.raises(UserError, match="'sample', a resource that nodes of a cluster are given"):
        plan_of(workshop, named)
    assert main(["check", "recipe.yaml", named]) == 0
    shown = capsys.readouterr().out
    assert "1 sample (" in shown and "for a cluster (`align run --address`), not checked" in shown


def test_trainer_and_engines_share_the_cores_by_default(workshop: Workshop) -> None:
    grpo = plan_of(workshop, "stages.grpo.rollout.workers=3").stages[2]
    assert [role.name for role in grpo.roles] == ["trainer", "rollout-0", "rollout-1", "rollout-2", "rewards-0"]
    assert sum(role.cpus for role in grpo.roles) <= MACHINE.cores + 1e-6
    assert grpo.roles[0].threads == MACHINE.cores


def test_ranks_of_the_trainer_divide_its_cores_and_are_counted(workshop: Workshop) -> None:
    ranks = "placement.trainer.ranks"
    plan = plan_of(workshop, f"{ranks}=2").stages[2]
    assert [role.name for role in plan.roles] == ["trainer", "trainer-1", "rollout-0", "rewards-0"]
    assert [role.threads for role in plan.roles[:2]] == [MACHINE.cores // 2] * 2
    assert sum(role.cpus for role in plan.roles) <= MACHINE.cores + 1e-6
    assert "each of 2 trainer ranks" in plan.memory
    five = plan_of(workshop, f"{ranks}=4", machine=Machine(16, 4, 64 << 30)).stages[2]
    assert [role.gpus for role in five.roles[:5]] == [0.5] * 5, "two to a GPU at most, where one each are not there"


def test_an_asynchronous_stage_says_how_far_it_runs_ahead_and_its_parts_halve_the_threads(workshop: Workshop) -> None:
    plan = plan_of(workshop, "stages.grpo.staleness=2", "stages.grpo.dynamic_sampling={max_factor: 2.5}").stages[2]
    threads = {role.name: role.threads for role in plan.roles}
    assert threads == {"trainer": MACHINE.cores // 2, "rollout-0": 1, "rewards-0": 1}, "a small model is sampled by one"
    text = "\n".join(plan.lines)
    assert "asynchronous: 6 groups on their way, at most 2 versions behind; a step waits" in text
    assert "groups without signal are replaced, at most 5 are sampled for 2" in text
    late = plan_of(workshop, "stages.grpo.staleness=1", "stages.grpo.overdue=drop").stages[2]
    assert any("dropped, which favours short completions" in line for line in late.lines)
    assert any(line.startswith("synchronous:") for line in plan_of(workshop).stages[2].lines)


def test_gpus_are_given_to_those_who_compute(workshop: Workshop) -> None:
    roles = plan_of(workshop, machine=Machine(8, 2, 16 << 30)).stages[2].roles
    assert {role.name: role.gpus for role in roles} == {"trainer": 1, "rollout-0": 1, "rewards-0": 0}


def test_full_fine_tuning_sends_whole_weights(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "recipe.yaml", "stages.dpo.adapter={kind: full}"]) == 0
    out = capsys.readouterr().out
    assert "receive whole weights" in out and "a frozen second copy" in out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("minibatches=2",), "updates: 2 a step, each of 1 group; every group once"),
        (("updates_per_batch=3",), "updates: 3 a step, each of 2 groups; every group 3 times"),
        (("updates_per_batch=2", "minibatches=2"), "updates: 4 a step, each of 1 group; every group 2 times"),
        ((), "note: the weight of each token to the sampler is truncated above 2 (`correction`)"),
        (
            ("loss={name: grpo, correction: {level: sequence, mode: mask, cap: 3, floor: 0.5}}",),
            "note: the weight of each sequence to the sampler is masked below 0.5 and above 3 (`correction`)",
        ),
        (("loss={name: grpo, correction: off}",), "note: `correction: off`: ratio and clip range are to the sampler"),
    ],
)
def test_the_plan_says_how_often_a_batch_is_trained_on_and_what_corrects_its_age(
    workshop: Workshop, overrides: tuple[str, ...], words: str
) -> None:
    lines = plan_of(workshop, *(f"stages.grpo.{change}" for change in overrides)).stages[2].lines
    assert any(line.startswith(words) for line in lines), lines
    assert overrides or not any(line.startswith("updates:") for line in lines), "one update needs no line"


def test_a_users_own_loss_is_tried_in_a_child_and_checked(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.write("own.py", "from align.losses.sft import Config, loss, needs\n")
    assert main(["check", "recipe.yaml", "stages.sft.loss=own.py"]) == 0
    workshop.write("own.py", "import os\nos._exit(7)\n")
    assert main(["check", "recipe.yaml", "stages.sft.loss=own.py"]) == 2
    assert "ended with status 7" in capsys.readouterr().err


def test_a_local_model_is_read_without_its_weights(
    workshop: Workshop, tiny_model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model_folder()
    text = workshop.recipe.read_text()
    workshop.write("recipe.yaml", f"name: small\nmodel: {{path: {folder}}}\n{text[text.index('stages:') :]}")
    assert main(["check", "recipe.yaml"]) == 0
    assert "qwen3" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_attention_heads": 4}])
def test_estimated_parameters_are_those_of_the_model(
    tiny_model_folder: Callable[..., Path], changes: dict[str, object]
) -> None:
    folder = tiny_model_folder(**changes)
    header = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    shapes = [v["shape"] for k, v in json.loads(header[8 : 8 + size]).items() if k != "__metadata__"]
    counted = sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes)
    sizes = sizes_of(read_config(folder))
    assert sizes is not None
    head_norms = 2 * 2 * 32  # Qwen 3 has two norms of head size in each of two blocks: not in the estimate
    assert sizes.parameters == counted - head_norms


def test_adapter_parameters_are_rank_times_in_and_out() -> None:
    config = {"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    sizes = sizes_of({**config, "num_key_value_heads": 1, "vocab_size": 50})
    assert sizes is not None
    assert sizes.adapter_parameters(Adapter(rank=2, targets=("q_proj",))) == 3 * 2 * (8 + 8)
    assert sizes.adapter_parameters(Adapter(rank=2, targets=("q_proj", "down_proj"))) == 3 * 2 * (16 + 40)
    assert sizes.kv_bytes("bfloat16") == 2 * 3 * 4 * 2


def test_adapter_parameters_are_counted_for_paths_and_expressions_as_for_names() -> None:
    config = {"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    sizes = sizes_of({**config, "num_key_value_heads": 1, "vocab_size": 50})
    assert sizes is not None
    one = 2 * (8 + 8)
    paths = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2))
    assert sizes.adapter_parameters(Adapter(rank=2, targets=paths)) == 2 * one
    assert sizes.adapter_parameters(Adapter(rank=2, targets=("self_attn.q_proj",))) == 3 * one
    assert sizes.adapter_parameters(Adapter(rank=2, targets=r".*layers\.[01]\..*q_proj")) == 2 * one


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 97},
        {"model_type": "opt", "max_position_embeddings": 64, "hidden_size": 16, "ffn_dim": 32, "vocab_size": 97},
        {"model_type": "mpt", "max_seq_len": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 97},
    ],
    ids=lambda config: config["model_type"],
)
def test_rows_are_held_to_the_positions_of_a_model_whose_memory_nobody_counts(config: dict[str, Any]) -> None:
    assert sizes_of(config) is None
    checks: Any = StageChecks(*(SimpleNamespace(config=config) for _ in range(3)), sizes=None)
    with pytest.raises(DataError, match=r"1 rows are longer than the model's 64 positions .*70"):
        checks.positions(SimpleNamespace(report=SimpleNamespace(lengths=np.array([10, 64, 70]))))
    checks.positions(SimpleNamespace(report=SimpleNamespace(lengths=np.array([10, 64]))))


def test_an_architecture_that_cannot_be_counted_is_said_so(workshop: Workshop) -> None:
    assert sizes_of({"model_type": "mamba", "vocab_size": 10}) is None
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"):
        text = workshop.recipe.read_text()
        workshop.write("recipe.yaml", "\n".join(line for line in text.split("\n") if f" {key}:" not in line))
    lines = plan_of(workshop).stages[0].lines
    assert any("memory: not estimated" in line for line in lines)


@pytest.mark.parametrize(
    ("gpus", "overrides", "words"),
    [
        (0, (), "attention auto (sdpa)"),
        (1, (), "attention auto (varlen)"),
        (1, ("model.dtype=float32",), "attention auto (sdpa)"),
        (1, ("model.attention=flex",), "attention flex"),
    ],
)
def test_the_plan_says_which_attention_is_meant(workshop: Workshop, gpus: int, overrides: tuple, words: str) -> None:
    model = plan_of(workshop, *overrides, machine=Machine(cores=8, gpus=gpus, memory=16 << 30)).model
    assert words in model
    assert ("dtype auto (float32 or bfloat16: measured" in model) == (gpus == 0)


@pytest.mark.parametrize(
    ("gpus", "overrides", "words"),
    [
        (0, ("model.attention=varlen",), "needs an NVIDIA GPU"),
        (0, ("model.attention=flex",), "needs an NVIDIA GPU"),
        (1, ("model.attention=varlen", "model.dtype=float32"), "computes in half precision"),
    ],
)
def test_an_attention_that_the_machine_or_the_dtype_rules_out_is_refused(
    workshop: Workshop, gpus: int, overrides: tuple, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        plan_of(workshop, *overrides, machine=Machine(cores=8, gpus=gpus, memory=16 << 30))
