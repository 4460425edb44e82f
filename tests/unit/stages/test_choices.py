"""What `auto` means: chosen once, said, kept; and nothing of it in a run that began before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from align.recipe.capabilities import SamplingStage
from align.recipe.load import load_recipe
from align.recipe.schema import Recipe
from align.recipe.support import publish_mode
from align.stages.backend import Backend
from align.stages.choices import merged, settle
from align.stages.runfolder import RunFolder
from align.stages.stage_start import Origin, adapter_of

RECIPE = """\
name: tiny
model: {{path: owner/name{model}}}
stages:
  - {{id: sft, kind: sft, data: data.jsonl, adapter: {{kind: {kind}}}}}
  - id: grpo
    kind: online
    from: sft
    data: data.jsonl
    steps: 1
    staleness: {staleness}
    rollout: {rollout}
    rewards: [{{use: numeric}}]
"""


class Machine:
    """A backend that multiplies at these speeds, and counts how often it is asked."""

    def __init__(self, float32: float, bfloat16: float, gpus: float = 0):
        self.speeds, self.number, self.asked = {"float32": float32, "bfloat16": bfloat16}, gpus, list[Any]()

    def gpus(self) -> float:
        return self.number

    async def multiplied(self, inner: int, outer: int) -> Mapping[str, float]:
        self.asked.append((inner, outer))
        return self.speeds


class Run:
    def __init__(self, **state: Any):
        self.state: dict[str, Any] = {"stages": {}, **state}
        self.written: list[str] = []

    def write(self) -> None:
        self.written.append(json.dumps(self.state))


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    config = {"vision_config": {"hidden_size": 9}, "text_config": {"hidden_size": 576, "intermediate_size": 1536}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Origin(tmp_path, None)


def recipe_of(
    folder: Path, *, model: str = "", kind: str = "lora", staleness: int = 0, rollout: str = "{name: vllm}"
) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, kind=kind, staleness=staleness, rollout=rollout))
    return load_recipe(path, (), cwd=folder)


def settled(recipe: Recipe, run: Run, origin: Origin, machine: Machine) -> tuple[Recipe, list[str]]:
    said: list[str] = []
    found = asyncio.run(settle(recipe, cast(RunFolder, run), origin, cast(Backend, machine), said.append))
    return found, said


def weights(recipe: Recipe, origin: Origin) -> str:
    stage = recipe.stage("grpo")
    assert isinstance(stage, SamplingStage)
    return publish_mode(adapter_of(recipe, stage, origin), stage.rollout)


@pytest.mark.parametrize(
    ("bfloat16", "dtype"), [(300.0, "bfloat16"), (151.0, "bfloat16"), (149.0, "float32"), (0.7, "float32")]
)
def test_the_dtype_is_what_multiplies_faster_by_more_than_it_costs(
    tmp_path: Path, origin: Origin, bfloat16: float, dtype: str
) -> None:
    machine, run = Machine(100.0, bfloat16), Run()
    found, said = settled(recipe_of(tmp_path), run, origin, machine)
    assert found.model.dtype == dtype and machine.asked == [(576, 1536)], "the language model's own widths"
    assert said[0] == f"model.dtype: auto is {dtype} here: 100 GFLOP/s in float32 and {bfloat16:g} GFLOP/s in bfloat16"
    assert json.loads(run.written[-1])["chosen"]["gflops"] == machine.speeds


def test_a_resumed_run_keeps_its_dtype_on_a_machine_that_would_choose_another(tmp_path: Path, origin: Origin) -> None:
    run, recipe = Run(), recipe_of(tmp_path)
    settled(recipe, run, origin, Machine(100, 300))
    other = Machine(100, 1, gpus=4)
    found, said = settled(recipe, Run(**json.loads(run.written[-1])), origin, other)
    assert found.model.dtype == "bfloat16" and other.asked == [] and said[0].startswith("model.dtype: auto is bfloat16")
    assert weights(found, origin) == "weights"


def test_a_run_that_began_before_choices_were_made_goes_on_as_it_began(tmp_path: Path, origin: Origin) -> None:
    recipe, run, machine = recipe_of(tmp_path), Run(stages={"sft": {"state": "finished"}}), Machine(100, 300)
    found, said = settled(recipe, run, origin, machine)
    assert (found, said, machine.asked) == (recipe, [], [])


def test_what_is_written_is_not_chosen_and_nothing_is_measured_for_it(tmp_path: Path, origin: Origin) -> None:
    recipe = recipe_of(tmp_path, model=", dtype: float32", rollout="{name: vllm, weights: adapter}")
    machine = Machine(100, 300)
    found, said = settled(recipe, Run(), origin, machine)
    assert (found, said, machine.asked) == (recipe, [], [])


def test_where_there_are_gpus_each_role_goes_by_its_device(tmp_path: Path, origin: Origin) -> None:
    recipe, machine = recipe_of(tmp_path), Machine(100, 300, gpus=1)
    assert settled(recipe, Run(), origin, machine) == (recipe, []) and machine.asked == []


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, "weights"),
        ({"staleness": 1}, "adapter"),  # a request finishes on the version that it began with
        ({"rollout": "{name: transformers}"}, "adapter"),
        ({"rollout": "{name: vllm, weights: adapter}"}, "adapter"),
        ({"kind": "dora"}, "weights"),
        ({"kind": "full"}, "weights"),
    ],
)
def test_without_a_gpu_a_synchronous_stage_sends_merged_weights_where_adapters_are_slow(
    tmp_path: Path, origin: Origin, options: dict[str, Any], sent: str
) -> None:
    recipe = recipe_of(tmp_path, **options)
    found, said = settled(recipe, Run(), origin, Machine(1, 1))
    assert weights(found, origin) == sent
    changed = weights(recipe, origin) != sent
    assert [line.startswith("grpo: rollout.weights: auto is merged here") for line in said[1:]] == [True] * changed
    assert merged(recipe, origin).stages == found.stages, "the check plans what a run will do"
    assert recipe == recipe_of(tmp_path, **options)
