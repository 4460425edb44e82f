"""What `auto` means on this machine: chosen when a run begins, said, and kept in run.json for every resume.

`model.dtype: auto` is bfloat16 on a GPU. On a CPU it is what multiplies faster, measured on a layer of the model's own
width: bfloat16 is three times float32 on one processor and a hundredth of it on another. bfloat16 rounds more, so a
draw goes to float32.

`rollout.weights: auto` sends the merged weights where an engine's adapter kernels are slow and nothing is lost by it: a
synchronous stage on a machine without a GPU. Engines of an asynchronous stage keep their adapters, since a request then
finishes on the version that it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from align.recipe.capabilities import SamplingStage, StageBase
from align.recipe.chat_files import read_settings
from align.recipe.engines import facts_of
from align.recipe.schema import Recipe
from align.recipe.support import trained
from align.stages.backend import Backend
from align.stages.runfolder import RunFolder
from align.stages.stage_start import Origin, adapter_of

CHOSEN = "chosen"  # its key in run.json
WORTH = 1.5  # times float32, for bfloat16 to be chosen

T = TypeVar("T", bound=StageBase)


async def settle(
    recipe: Recipe, run: RunFolder, origin: Origin, backend: Backend, say: Callable[[str], None]
) -> Recipe:
    """The recipe with what `auto` means in this run. A run that began before choices were made keeps what it began
    with: on a CPU float32, and adapters."""
    if CHOSEN not in run.state:
        run.state[CHOSEN] = {} if run.state["stages"] else await _chosen(recipe, origin, backend)
        run.write()
    found: Mapping[str, Any] = run.state[CHOSEN]
    if recipe.model.dtype == "auto" and "dtype" in found:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": found["dtype"]})})
        say(f"model.dtype: auto is {found['dtype']} here: {_words(found['gflops'])}")
    if found.get("merged"):
        for stage in recipe.stages:
            if merges(recipe, stage, origin):
                assert isinstance(stage, SamplingStage)
                title = facts_of(stage.rollout.name).title
                say(f"{stage.id}: rollout.weights: auto is merged here: {title}'s adapter kernels are slow on a CPU")
        recipe = merged(recipe, origin)
    return recipe


async def _chosen(recipe: Recipe, origin: Origin, backend: Backend) -> dict[str, Any]:
    if backend.gpus():
        return {}
    found: dict[str, Any] = {"merged": True}
    if recipe.model.dtype == "auto":
        gflops = await backend.multiplied(*_sides(origin.base))
        faster = gflops["bfloat16"] >= WORTH * gflops["float32"]
        found |= {"dtype": "bfloat16" if faster else "float32", "gflops": gflops}
    return found


def merged(recipe: Recipe, origin: Origin | None) -> Recipe:
    """The recipe with merged weights for every stage whose `rollout.weights: auto` means them without a GPU."""

    def one(stage: T) -> T:
        if not merges(recipe, stage, origin):
            return stage
        assert isinstance(stage, SamplingStage)
        return stage.model_copy(update={"rollout": stage.rollout.model_copy(update={"weights": "merged"})})

    return recipe.model_copy(update={"stages": tuple(one(stage) for stage in recipe.stages)})


def merges(recipe: Recipe, stage: StageBase, origin: Origin | None) -> bool:
    """Whether `auto` means merged weights in this stage, on a machine without a GPU."""
    if not isinstance(stage, SamplingStage) or stage.rollout.weights != "auto" or stage.staleness > 0:
        return False
    return facts_of(stage.rollout.name).slow_adapters_on_cpu and trained(adapter_of(recipe, stage, origin)) == "lora"


def _sides(base: Path) -> tuple[int, int]:
    """Width of the model and of its feed-forward layers, as far as its configuration says them."""
    config = read_settings(base / "config.json")
    text = config.get("text_config") or config
    width = next((int(text[key]) for key in ("hidden_size", "n_embd", "d_model") if text.get(key)), 1024)
    return width, int(text.get("intermediate_size") or 4 * width)


def _words(gflops: Mapping[str, float]) -> str:
    return " and ".join(f"{speed:g} GFLOP/s in {name}" for name, speed in gflops.items())
