"""The recipe's `objectives:`: how the scores of a completion become one advantage."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from align.plugins import is_users
from align.recipe.strict import Finite, NotNegative, Strict


class Constraint(Strict):
    """The mean of an objective, in its own sign and units, is held at or below `max`, or at or above `min`.

    lr: by how much the multiplier lambda rises in a step whose mean is one standard deviation beyond the limit.
    proportional: how much is added to it in that step alone. It damps the swing of policy and multiplier around the
    limit, and answers a violation at once (a PI controller, 2007.03964). lambda_max: where both together stop."""

    max: Finite | None = None
    min: Finite | None = None
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    proportional: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    lambda_max: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0

    @model_validator(mode="after")
    def _one_limit(self) -> Constraint:
        if (self.max is None) == (self.min is None):
            raise ValueError("a constraint has one limit: give `max` (the mean stays at or below it) or `min`")
        return self

    @property
    def limit(self) -> float:
        return float(self.min if self.max is None else self.max)  # type: ignore[arg-type]


class Gate(Strict):
    """An objective counts only in samples whose score of `when` is at least, or at most, so much. In the others it is
    missing (`mask`) or has a given score, before anything is normalised. Where the score of `when` is missing itself,
    so is the objective's."""

    when: str
    at_least: Finite | None = None
    at_most: Finite | None = None
    otherwise: Literal["mask"] | Finite = "mask"

    @model_validator(mode="after")
    def _a_threshold(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate needs `at_least` or `at_most`, the scores of `when` that open it")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"no score is at least {self.at_least:g} and at most {self.at_most:g}")
        return self


OPTIONS = ("constraints", "mu", "reference_point", "decay")
"""Options of `objectives` that only some combiners read."""


@dataclass(frozen=True)
class Combiner:
    """made_by: `package.module:function` or `package.module`, see `align.objectives.combiners`. reads: of `OPTIONS`.
    needs: of those, what must be given. whiten: whether advantages are whitened where the recipe says nothing."""

    made_by: str
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    whiten: bool = False


COMBINERS: Mapping[str, Combiner] = {
    "weighted_sum": Combiner("align.objectives.combiners:weighted_sum"),
    "decoupled": Combiner("align.objectives.combiners:decoupled", whiten=True),
    "lagrangian": Combiner("align.objectives.lagrangian", ("constraints", "decay"), needs=("constraints",)),
    "chebyshev": Combiner("align.objectives.chebyshev", ("mu", "reference_point", "decay")),
    "hypervolume": Combiner("align.objectives.hypervolume", ("reference_point", "decay")),
}
"""A further one is a file in `align/objectives/`, and a line here; a user's own needs none."""


def _known(name: str) -> str:
    if name not in COMBINERS and not is_users(name):
        near = difflib.get_close_matches(name, COMBINERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name!r} is no combiner: {hint}use {', '.join(COMBINERS)}, or your own as file.py:name")
    return name


class Objectives(Strict):
    """How scores become advantages. Names are those of objectives; numbers about one are in its own sign and units.

    combine: how several objectives become one (`align.objectives`), or one's own way to, `file.py:name`. weights: 1
        where not given, 0 for one that is constrained. schedule: instead, a weight that is linear between
        [step, weight] points, constant beyond them.
    baseline: what a score is compared with: the mean of its group, of the others in its group (leave_one_out), or of
        the whole batch. scale: what the difference is divided by; for lagrangian, chebyshev and hypervolume `std` is a
        running standard deviation, the unit of their limits and points too. `mean`: the mean of its group (MaxRL,
        2602.02710): the fewer succeed, the more each teaches; of scores that are 0 or more.
    min_std: no standard deviation, and no such mean, below it is divided by, in units of the scores. whiten: the
        advantages, over the batch; None: where the combiner is defined so (decoupled).
    reference_point: of chebyshev the ideal that objectives should come near (the best seen, where not given); of
        hypervolume the point that all of them must beat. mu: how smooth chebyshev's minimum is, in standard deviations.
    decay: of the running means and standard deviations, per step.
    """

    combine: Annotated[str, AfterValidator(_known)] = "weighted_sum"
    weights: dict[str, NotNegative] = Field(default_factory=dict)
    schedule: dict[str, Annotated[tuple[tuple[int, NotNegative], ...], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    gates: dict[str, Gate] = Field(default_factory=dict)
    constraints: dict[str, Constraint] = Field(default_factory=dict)
    reference_point: dict[str, Finite] = Field(default_factory=dict)
    mu: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    baseline: Literal["group", "leave_one_out", "batch"] = "group"
    scale: Literal["std", "mean", "none"] = "std"
    min_std: NotNegative = 0.01
    whiten: bool | None = None

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Objectives:
        if self.combine not in COMBINERS:  # the user's own says what it reads where it is loaded
            return self
        facts = COMBINERS[self.combine]
        if unread := self.unread(facts.reads):
            readers = " or ".join(name for name, one in COMBINERS.items() if unread[0] in one.reads)
            raise ValueError(f"`{unread[0]}` belongs to `combine: {readers}`; here it is {self.combine}")
        for option in facts.needs:
            if not getattr(self, option):
                raise ValueError(f"`combine: {self.combine}` needs `{option}`, such as {{tokens: {{max: 40}}}}")
        return self

    @model_validator(mode="after")
    def _a_mean_to_divide_by(self) -> Objectives:
        if self.scale == "mean" and (self.combine not in ("weighted_sum", "decoupled") or self.baseline != "group"):
            raise ValueError(
                "`scale: mean` divides by the mean of a group: it goes with `baseline: group`, and with `combine: "
                "weighted_sum` or `decoupled`"
            )
        return self

    def unread(self, reads: Sequence[str]) -> list[str]:
        """Options that are given and that a combiner which reads only these has no use for."""
        fields = {option: type(self).model_fields[option] for option in OPTIONS if option not in reads}
        defaults = {option: one.get_default(call_default_factory=True) for option, one in fields.items()}
        return [option for option, default in defaults.items() if getattr(self, option) != default]  # dumps spell out

    @model_validator(mode="after")
    def _schedules_rise_in_steps(self) -> Objectives:
        for name, points in self.schedule.items():
            steps = [step for step, _ in points]
            if any(later <= earlier for earlier, later in pairwise([-1, *steps])):
                raise ValueError(f"the steps of `schedule.{name}` must be 0 or more and increase: {steps}")
            if name in self.weights:
                raise ValueError(f"{name!r} has a constant weight and a schedule; give one of them")
        return self

    @model_validator(mode="after")
    def _gates_end_somewhere(self) -> Objectives:
        for name in self.gates:
            seen = [name]
            while seen[-1] in self.gates:
                seen.append(self.gates[seen[-1]].when)
                if seen[-1] in seen[:-1]:
                    path = " when ".join(seen)
                    raise ValueError(f"`gates` go in a circle: {path}; a gate looks at another objective")
        return self
