"""Where each number of a simulation is from: a flag, else a finished run, else the recipe or a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from align.errors import RunFolderError
from align.recipe.capabilities import SamplingStage
from align.recipe.engines import facts_of
from align.recipe.schema import Recipe
from align.recipe.support import publish_mode
from align.simulate.lengths import Empirical, Lengths, LogNormal
from align.simulate.measured import Measured, slots_of, trained_completions
from align.simulate.workload import NEVER, EngineModel, Publishing, Workload
from align.stages.stage_start import adapter_of

Source = Literal["flag", "run", "recipe", "default"]

# Stand-ins of the order of a 7B model with a GPU for each engine: measure your own, or give flags.
SPEED = 50.0  # tokens/s of one sequence alone
OF_ALL_SLOTS = 0.4  # an engine's peak, of slots times that
TRAINED_PER_S = 10_000.0  # tokens
LOOP_S = 0.0004  # per group: tests/bench/results/*-orchestration.json

UNITS = {
    "engines": "engines",
    "engine_slots": "sequences at once in an engine",
    "engine_speed": "tokens/s of one sequence alone in an engine",
    "engine_peak": "tokens/s of an engine with all slots filled",
    "prompt_s": "s to compute a prompt, once for its group",
    "length_mean": "tokens of a completion, mean before max_tokens cuts",
    "length_sigma": "standard deviation of the logarithm of the length",
    "reward_s": "s from a scoring call to its answer",
    "environment_s": "s that a group waits for its environment",
    "train_s": "s of training a step",
    "publish_s": "s until every engine holds a version",
    "loop_s": "s of the loop itself a step",
    "silent": "share of groups without signal",
    "failure_s": "s until an engine fails, mean",
    "restart_s": "s until a failed engine serves again",
}
"""Every input that a flag may give, and what it is."""


@dataclass(frozen=True)
class Input:
    value: float
    source: Source


Inputs = dict[str, Input]


def gather(recipe: Recipe, stage: SamplingStage, flags: Mapping[str, float | None], run: Measured | None) -> Inputs:
    """Every number of `UNITS`, with its source. flags: by the same names, None where not given. A run's times of a turn
    are those of its own batch and trainer; they are taken in proportion to the recipe's.

    Raises RunFolderError where the run cannot tell what its engines take and no flag does.
    """
    slots = flags.get("engine_slots")
    measured = _measured(recipe, stage, run, int(slots or slots_of(stage)), flags) if run is not None else {}
    found: Inputs = {}

    def settle(name: str, otherwise: float, source: Source = "default") -> float:
        flag = flags.get(name)
        if flag is not None:
            found[name] = Input(flag, "flag")
        elif name in measured:
            found[name] = Input(measured[name], "run")
        else:
            found[name] = Input(otherwise, source)
        return found[name].value

    settle("engines", stage.rollout.workers, "recipe")
    filled = settle("engine_slots", slots_of(stage), "recipe")
    speed = settle("engine_speed", SPEED)
    settle("engine_peak", max(1.0, OF_ALL_SLOTS * filled) * speed)
    settle("prompt_s", 0.02)
    length = settle("length_mean", stage.rollout.max_tokens / 4)
    settle("length_sigma", 0.8)
    settle("reward_s", 1.0)
    if stage.worlds:
        settle("environment_s", 1.0)
    settle("train_s", trained_completions(stage) * min(length, stage.rollout.max_tokens) / TRAINED_PER_S)
    settle("publish_s", 2.0)
    settle("loop_s", LOOP_S * stage.batch.groups)
    settle("silent", 0.0)
    settle("failure_s", NEVER)
    settle("restart_s", 60.0)
    return found


def _measured(
    recipe: Recipe, stage: SamplingStage, run: Measured, slots: int, flags: Mapping[str, float | None]
) -> dict[str, float]:
    """What the run says of the inputs."""
    tokens = np.maximum(1.0, np.concatenate(run.lengths))
    known = {
        "length_mean": float(tokens.mean()),
        "length_sigma": float(np.log(tokens).std()),
        "reward_s": run.reward_s,
        "environment_s": run.environment_s,
        "train_s": run.train_s * trained_completions(stage) / run.trained * run.ranks / recipe.placement.trainer.ranks,
        "publish_s": run.publish_s,
        "loop_s": run.loop_s * stage.batch.groups / run.groups,
        "silent": run.silent,
    }
    if run.fixed_s is not None and run.per_sequence_s is not None and run.prompt_s is not None:
        engine = EngineModel(slots, run.fixed_s, run.per_sequence_s, run.prompt_s)
        return known | {"engine_speed": engine.alone, "engine_peak": engine.peak, "prompt_s": engine.prompt_s}
    if flags.get("engine_speed") is None or flags.get("engine_peak") is None:
        raise RunFolderError(
            "the run's stage was asynchronous: its turns do not tell what an engine takes",
            where="--from",
            remedy="give a run with `staleness: 0`, or --engine-speed and --engine-peak beside this one",
        )
    return known


def workload(recipe: Recipe, stage: SamplingStage, inputs: Inputs, run: Measured | None) -> Workload:
    """The stage as the recipe sizes it, with these inputs. Raises RecipeError where they fit no engine, or what the
    recipe asks for cannot be published."""
    number = {name: one.value for name, one in inputs.items()}
    engine = EngineModel.of(
        number["engine_speed"],
        number["engine_peak"],
        int(number["engine_slots"]),
        prompt_s=number["prompt_s"],
        whole_batches=facts_of(stage.rollout.name).whole_batches,
    )
    return Workload(
        groups=stage.batch.groups,
        group_size=stage.batch.group_size,
        engines=int(number["engines"]),
        engine=engine,
        lengths=_lengths(recipe, stage, inputs, run),
        reward_s=number["reward_s"] + number.get("environment_s", 0.0),
        train_s=number["train_s"],
        publish_s=number["publish_s"],
        loop_s=number["loop_s"],
        publishing=publishing(recipe, stage),
        overdue=stage.overdue,
        refill=stage.dynamic_sampling.max_factor - 1 if stage.dynamic_sampling else 0.0,
        silent=number["silent"],
        between_failures_s=number["failure_s"],
        restart_s=number["restart_s"],
        seed=recipe.seed,
    )


def publishing(recipe: Recipe, stage: SamplingStage) -> Publishing:
    """What engines do while a version reaches them. One that samples whole batches stops between two, whatever it is
    sent."""
    adapter = publish_mode(adapter_of(recipe, stage), stage.rollout) == "adapter"
    return "adapter" if adapter or facts_of(stage.rollout.name).whole_batches else stage.rollout.publish


def is_empirical(inputs: Inputs) -> bool:
    """Whether lengths are a run's own, drawn again, and not log-normal."""
    return {inputs["length_mean"].source, inputs["length_sigma"].source} == {"run"}


def _lengths(recipe: Recipe, stage: SamplingStage, inputs: Inputs, run: Measured | None) -> Lengths:
    limit, size = stage.rollout.max_tokens, stage.batch.group_size
    if run is not None and is_empirical(inputs):
        return Empirical(run.lengths, limit, size, recipe.seed)
    return LogNormal(inputs["length_mean"].value, inputs["length_sigma"].value, limit, size, recipe.seed)
