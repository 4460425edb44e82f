"""`align simulate`: how fast would an online stage run, and what with?

With which staleness, and which split of the devices: on a virtual clock, without torch.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.cli.arguments import add_recipe
from align.errors import Unsupported
from align.recipe.capabilities import SamplingStage
from align.recipe.load import load_document
from align.recipe.schema import Recipe
from align.report.table import text_table
from align.simulate.advice import Split, best_split, smallest_sufficient, splits
from align.simulate.inputs import UNITS, Inputs, gather, is_empirical, workload
from align.simulate.measured import Measured, online_stage, read_run
from align.simulate.stage import Outcome, simulate
from align.simulate.workload import Workload

STEPS, LEAST_STEPS, MOST_GROUPS = 40, 5, 100_000
ASSUMED = (
    "engines and trainer have processors of their own; steps alone, without evaluations and checkpoints",
    "an engine's step takes a fixed time and as much again for each sequence, whatever its length so far",
)
OF_EPISODES = "an episode samples all its turns at once, and waits for its environment after them"
SCALED = "training time is inversely proportional to the trainer's devices; an engine has one device"


NUMBERS = {
    "length-mean": "tokens of a completion (log-normal)",
    "length-sigma": "standard deviation of the logarithm of the length; 0: all alike",
    "engine-speed": "tokens/s of one sequence that has an engine to itself",
    "engine-peak": "tokens/s of an engine with all slots filled",
    "prompt-s": "seconds an engine takes for a prompt, once for its group",
    "reward-s": "seconds from a scoring call to its answer",
    "environment-s": "seconds that a group of episodes waits for its environment, all turns together",
    "train-s": "seconds of training a step",
    "publish-s": "seconds until every engine holds a version",
    "loop-s": "seconds of the loop itself a step",
    "silent": "share of groups without signal, for dynamic_sampling",
    "failure-s": "mean seconds until an engine fails (default: none does)",
    "restart-s": "seconds until a failed engine serves again",
}
_ABOVE_0 = {"length-mean", "engine-speed", "engine-peak", "failure-s"}


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--stage", metavar="ID", help="an online stage; where there is one alone, that")
    parser.add_argument("--from", dest="run", metavar="RUN", help="a finished run's folder: take its measurements")
    parser.add_argument("--staleness", type=_stalenesses, default=[0, 1, 2], metavar="0,1,2", help="those to try")
    parser.add_argument("--steps", type=_whole, metavar="N", help="to count, after the first few (default: 40)")
    engines = parser.add_mutually_exclusive_group()
    engines.add_argument("--engines", type=_whole, metavar="N", help="default: the recipe's rollout.workers")
    engines.add_argument("--devices", type=_whole, metavar="N", help="try ways to divide so many among both sides")
    parser.add_argument("--engine-slots", type=_whole, metavar="N", help="sequences that an engine samples at once")
    for name, meaning in NUMBERS.items():
        parser.add_argument(f"--{name}", type=_number(name), metavar="X", help=meaning)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(arguments: argparse.Namespace) -> int:
    """Simulate a stage at each staleness and print a table and a recommendation. Raises UserError with a remedy.

    arguments: recipe, overrides, and what `add` adds.
    """
    recipe, document = load_document(arguments.recipe, arguments.overrides)
    stage = online_stage(recipe, arguments.stage, document.name)
    if not stage.worlds and arguments.environment_s is not None:
        raise Unsupported(
            "no completion waits for an environment: the stage has none",
            where=f"stages.{stage.id}",
            remedy="leave --environment-s out",
        )
    measured = read_run(Path(arguments.run), arguments.stage) if arguments.run else None
    inputs = gather(recipe, stage, {name: getattr(arguments, name) for name in UNITS}, measured)
    work = workload(recipe, stage, inputs, measured)
    steps = arguments.steps or max(LEAST_STEPS, min(STEPS, MOST_GROUPS // work.groups))

    def outcomes(of: Workload) -> list[Outcome]:
        return [simulate(of, staleness, turns=steps) for staleness in arguments.staleness]

    divided: list[Split] = []
    if arguments.devices:
        ranks = recipe.placement.trainer.ranks
        divided = splits(work, arguments.devices, outcomes, measured_with=ranks)
        found = list(best_split(divided).outcomes)
    else:
        found = outcomes(work)
    report = Report(recipe, stage, inputs, measured, found, divided, steps)
    print(json.dumps(report.to_json(), indent=2) if arguments.json else "\n".join(report.lines()))
    return 0


def _number(name: str) -> Callable[[str], float]:
    above, most = name in _ABOVE_0, 1.0 if name == "silent" else math.inf
    wanted = "a number above 0" if above else "a number from 0 to 1" if most == 1 else "a number of at least 0"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value > 0 if above else value >= 0) or not math.isfinite(value) or value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _stalenesses(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2")
    return sorted({int(part) for part in parts})


class Report:
    """What was simulated, from what, and what came of it; for a person (`lines`) or a program (`to_json`)."""

    def __init__(
        self,
        recipe: Recipe,
        stage: SamplingStage,
        inputs: Inputs,
        run: Measured | None,
        outcomes: Sequence[Outcome],
        divided: Sequence[Split],
        steps: int,
    ):
        self.recipe, self.stage, self.inputs, self.run = recipe, stage, inputs, run
        self.outcomes, self.divided, self.steps = outcomes, divided, steps
        self.recommended = smallest_sufficient(outcomes)

    # ------------------------------------------------------------------------------------------------ for a person

    def lines(self) -> list[str]:
        batch = self.stage.batch
        out = [
            f"{self.recipe.name}, stage {self.stage.id}: {batch.groups} groups x {batch.group_size}, "
            f"{self.steps} steps at each staleness",
            "",
            *self._input_lines(),
            "",
        ]
        if self.divided:
            rows = [["trainer", "engines", "staleness", "step s", "steps/min", "engines busy", "trainer busy"]]
            rows += [[str(split.trainers), *_split_cells(split)] for split in self.divided]
            best = best_split(self.divided)
            out += [*text_table(rows), "", f"with {best.trainers} for the trainer and {best.engines} engines:", ""]
        out += [*text_table(self._rows()), ""]
        out += [f"recommended: {words}" for words in self._advice()]
        assumed = [*ASSUMED, *[OF_EPISODES] * bool(self.stage.worlds), *[SCALED] * bool(self.divided)]
        return out + [f"assumed: {line}" for line in assumed]

    def _inputs(self) -> Inputs:
        """Those that were used: of divided devices, engines are what is left."""
        return {name: one for name, one in self.inputs.items() if not (self.divided and name == "engines")}

    def _input_lines(self) -> list[str]:
        shown = self._inputs()
        if math.isinf(self.inputs["failure_s"].value):
            del shown["failure_s"], shown["restart_s"]
        lines = text_table([[name, f"{one.value:.6g}", one.source, UNITS[name]] for name, one in shown.items()])
        if self.run is not None and is_empirical(self.inputs):
            lines.append(f"lengths are those of the run's {len(self.run.lengths)} groups, drawn again")
        return lines

    def _rows(self) -> list[list[str]]:
        head = ["staleness", "step s", "steps/min", "gain", "tokens/s", "engines busy", "of peak", "trainer busy"]
        rows = [[*head, "mean age", "ages", "dropped", "reissued"]]
        for one in self.outcomes:
            gain = one.steps_per_minute / self.outcomes[0].steps_per_minute
            rows.append(
                [
                    str(one.staleness),
                    f"{one.step_s:.4g}",
                    f"{one.steps_per_minute:.4g}",
                    f"{gain:.2f}x",
                    f"{one.tokens_per_second:,.0f}",
                    _percent(one.engines_busy),
                    _percent(one.engines_of_peak),
                    _percent(one.trainer_busy),
                    f"{one.mean_age:.2f}",
                    " ".join(f"{age}:{_percent(share)}" for age, share in one.ages.items()),
                    f"{one.totals['groups/dropped']:.0f}",
                    f"{one.totals['rollout/reissued']:.0f}",
                ]
            )
        return rows

    def _advice(self) -> list[str]:
        best = max(self.outcomes, key=lambda one: one.steps_per_minute)
        chosen = self.recommended
        why = "the fastest" if chosen is best else f"the smallest within 5 % of the fastest ({best.staleness})"
        words = [f"staleness {chosen.staleness}, {why}"]
        if self.divided:
            split = best_split(self.divided)
            words.append(f"{split.trainers} devices for the trainer, {split.engines} engines")
        return words

    # ------------------------------------------------------------------------------------------------ for a program

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "stage": self.stage.id,
            "groups": self.stage.batch.groups,
            "group_size": self.stage.batch.group_size,
            "steps": self.steps,
            "inputs": {
                name: {"value": one.value if math.isfinite(one.value) else None, "source": one.source}
                for name, one in self._inputs().items()
            },
            "lengths": "empirical" if is_empirical(self.inputs) else "log-normal",
            "outcomes": [_outcome(one) for one in self.outcomes],
            "recommended": {"staleness": self.recommended.staleness},
            "assumed": [*ASSUMED, SCALED] if self.divided else [*ASSUMED],
        }
        if self.divided:
            best = best_split(self.divided)
            found["splits"] = [
                {"trainers": split.trainers, "engines": split.engines, **_outcome(split.recommended)}
                for split in self.divided
            ]
            found["recommended"] |= {"trainers": best.trainers, "engines": best.engines}
        return found


def _outcome(one: Outcome) -> dict[str, Any]:
    return {
        "staleness": one.staleness,
        "step_s": one.step_s,
        "steps_per_minute": one.steps_per_minute,
        "tokens_per_second": one.tokens_per_second,
        "engines_busy": one.engines_busy,
        "engines_of_peak": one.engines_of_peak,
        "trainer_busy": one.trainer_busy,
        "mean_age": one.mean_age,
        "ages": {str(age): share for age, share in one.ages.items()},
        "waited": one.waited,
        "totals": one.totals,
    }


def _split_cells(split: Split) -> list[str]:
    one = split.recommended
    times = (f"{one.step_s:.4g}", f"{one.steps_per_minute:.4g}")
    return [str(split.engines), str(one.staleness), *times, _percent(one.engines_busy), _percent(one.trainer_busy)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
