"""Where each number of a simulation is from: a flag, else a finished run, else the recipe or a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from align.errors import RunFolderError
from align.recipe.schema import OnlineStage, Recipe
from align.recipe.support import publish_mode
from align.simulate.lengths import Empirical, Lengths, LogNormal
from align.simulate.measured import Measured, slots_of, trained_completions
from align.simulate.workload import NEVER, EngineModel, Publishing, Workload
from align.stages.handover import adapter_of

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


def gather(recipe: Recipe, stage: OnlineStage, flags: Mapping[str, float | None], run: Measured | None) -> Inputs:
    """Every number of `UNITS`, with its source. flags: by the same names, None where not given. A run's times of a turn
    are those of its own batch and trainer; they are taken in proportion to the recipe's.

    Raises RunFolderError where the run cannot tell what its engines take and no flag does.
    """
    found: Inputs = {}

    def settle(name: str, measured: float | None, otherwise: float, source: Source = "default") -> float:
        flag = flags.get(name)
        if flag is not None:
            found[name] = Input(flag, "flag")
        elif run is not None and measured is not None:
            found[name] = Input(measured, "run")
        else:
            found[name] = Input(otherwise, source)
        return found[name].value

    settle("engines", None, stage.rollout.workers, "recipe")
    slots = int(settle("engine_slots", None, slots_of(stage), "recipe"))
    engine = _measured_engine(run, slots, flags)
    speed = settle("engine_speed", engine and engine.alone, SPEED)
    settle("engine_peak", engine and engine.peak, max(1.0, OF_ALL_SLOTS * slots) * speed)
    settle("prompt_s", engine and engine.prompt_s, 0.02)
    mean, sigma = _log_normal(run)
    settle("length_sigma", sigma, 0.8)
    length = settle("length_mean", mean, stage.rollout.max_tokens / 4)
    settle("reward_s", run and run.reward_s, 1.0)
    trained, ranks = trained_completions(stage), recipe.placement.trainer.ranks
    tokens = trained * min(length, stage.rollout.max_tokens)
    train_s = run and run.train_s * (trained / run.trained) * (run.ranks / ranks)
    settle("train_s", train_s, tokens / TRAINED_PER_S)
    settle("publish_s", run and run.publish_s, 2.0)
    settle("loop_s", run and run.loop_s * stage.batch.groups / run.groups, LOOP_S * stage.batch.groups)
    settle("silent", run and run.silent, 0.0)
    settle("failure_s", None, NEVER)
    settle("restart_s", None, 60.0)
    return {name: found[name] for name in UNITS}


def workload(recipe: Recipe, stage: OnlineStage, inputs: Inputs, run: Measured | None) -> Workload:
    """The stage as the recipe sizes it, with these inputs. Raises RecipeError where they fit no engine, or what the
    recipe asks for cannot be published."""
    number = {name: one.value for name, one in inputs.items()}
    engine = EngineModel.of(
        number["engine_speed"],
        number["engine_peak"],
        int(number["engine_slots"]),
        prompt_s=number["prompt_s"],
        whole_batches=stage.rollout.name == "transformers",
    )
    return Workload(
        groups=stage.batch.groups,
        group_size=stage.batch.group_size,
        engines=int(number["engines"]),
        engine=engine,
        lengths=_lengths(recipe, stage, inputs, run),
        reward_s=number["reward_s"],
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


def publishing(recipe: Recipe, stage: OnlineStage) -> Publishing:
    """What engines do while a version reaches them. An engine of transformers stops between two batches, whatever it
    is sent."""
    adapter = publish_mode(adapter_of(recipe, stage), stage.rollout) == "adapter"
    return "adapter" if adapter or stage.rollout.name == "transformers" else stage.rollout.publish


def is_empirical(inputs: Inputs) -> bool:
    """Whether lengths are a run's own, drawn again, and not log-normal."""
    return {inputs["length_mean"].source, inputs["length_sigma"].source} == {"run"}


def _lengths(recipe: Recipe, stage: OnlineStage, inputs: Inputs, run: Measured | None) -> Lengths:
    limit, size = stage.rollout.max_tokens, stage.batch.group_size
    if run is not None and is_empirical(inputs):
        return Empirical(run.lengths, limit, size, recipe.seed)
    return LogNormal(inputs["length_mean"].value, inputs["length_sigma"].value, limit, size, recipe.seed)


def _log_normal(run: Measured | None) -> tuple[float | None, float | None]:
    """(mean, sigma) of a run's lengths."""
    if run is None:
        return None, None
    tokens = np.maximum(1.0, np.concatenate(run.lengths))
    return float(tokens.mean()), float(np.log(tokens).std())


def _measured_engine(run: Measured | None, slots: int, flags: Mapping[str, float | None]) -> EngineModel | None:
    if run is None:
        return None
    if run.fixed_s is None or run.per_sequence_s is None or run.prompt_s is None:
        if flags.get("engine_speed") is None or flags.get("engine_peak") is None:
            raise RunFolderError(
                "the run's stage was asynchronous: its turns do not tell what an engine takes",
                where="--from",
                remedy="give a run with `staleness: 0`, or --engine-speed and --engine-peak beside this one",
            )
        return None
    return EngineModel(slots, run.fixed_s, run.per_sequence_s, run.prompt_s)
