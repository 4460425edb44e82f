"""What a reward plugin sees: `@reward`, `Sample`, `Score`, `Context`, `Objective`, and the errors it can cause.

    @reward
    def brevity(samples):
        return [1.0 / (1.0 + len(s.completion.split())) for s in samples]

A plugin gets a list of samples and returns one result per sample, in order: a number, None (not applicable), a `Score`
with named objectives, or an exception for a sample that cannot be scored. Parameters after `samples` are the plugin's
own arguments, set by `args:` in the recipe; one that is called `ctx` receives the `Context` instead.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast, get_args, overload


class PluginError(Exception):
    """A plugin was not found, cannot be loaded, or does not fit the recipe. `where` and `remedy` may be None."""

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        super().__init__(what)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}" + (f"\n  -> {self.remedy}" if self.remedy else "")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.where, self.remedy)


class RewardError(PluginError):
    """A plugin failed more often than it may; the message shows the first errors."""


def _rebuild(cls: type[PluginError], what: str, where: str | None, remedy: str | None) -> PluginError:
    return cls(what, where=where, remedy=remedy)


# --------------------------------------------------------------------------------------------- what goes in and out


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion to be scored.

    messages: the prompt as role/content dicts (one message of role "text" for a plain-text prompt).
    completion: the decoded text without special tokens, or of a reward with `text="raw"` as it was generated, without
    the token that ends it; raw: that text in any case, None where both are the same.
    token_ids: exactly the ids that are trained on; truncated: cut off by max_tokens.
    group_id: the prompt's draw, shared by its G completions; sample_id: the completion's number in its group.
    row: every column of the data row, shared by the group. media: of each medium that the policy was shown, in order,
    {"type": "image", "video" or "audio", "path": the file that shows it as the policy saw it}.
    policy_version: version of the policy that sampled the last token (-1: unknown).
    turns: of an episode, the messages behind the prompt as they went (replies, tool calls, answers); completion is then
    its last reply, token_ids all that was sampled. state: what its environment said of itself at the end.
    """

    completion: str
    messages: Sequence[Mapping[str, Any]] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    token_ids: Sequence[int] = ()
    truncated: bool = False
    group_id: int = 0
    sample_id: int = 0
    media: Sequence[Mapping[str, str]] = ()
    policy_version: int = -1
    raw: str | None = None
    turns: Sequence[Mapping[str, Any]] = ()
    state: Any = None


@dataclass(frozen=True, slots=True)
class Score:
    """What a plugin says of a sample. values: by objective name (or one number where the plugin has one objective);
    None means not applicable.

    info: anything JSON can hold; it is kept beside the sample.
    """

    values: Mapping[str, float | None] | float | None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Objective:
    """kind "cost": smaller is better. range: the values allowed, both ends included; outside is an error, never
    clipped."""

    kind: Literal["reward", "cost"] = "reward"
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("reward", "cost"):
            raise PluginError(f"an objective's kind is 'reward' or 'cost', not {self.kind!r}")
        if self.range is not None:
            low, high = self.range
            if not low < high:
                raise PluginError(f"an objective's range is (low, high) with low < high, not {self.range!r}")
            object.__setattr__(self, "range", (float(low), float(high)))


@dataclass(frozen=True, slots=True)
class Failure:
    """A score that could not be had.

    index: position in the scored list; objective None: all objectives of the plugin. cause: raised | timeout |
    crashed | protocol (its process sent what is no answer) | wrong_length | wrong_type | not_finite | out_of_range |
    unknown_objective | missing_objective.
    """

    plugin: str
    objective: str | None
    index: int
    group_id: int
    sample_id: int
    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class FailedCall:
    """A call that gave no scores, whether or not another call for its samples then did.

    samples: how many; groups: whose. cause: as of Failure. again: what followed: asked again "alone" in its process,
    "as a whole", "in parts", or "no": its samples are failures.
    """

    plugin: str
    samples: int
    groups: tuple[int, ...]
    cause: str
    message: str
    again: str


class Context:
    """What a call knows beside its samples.

    args: the plugin's arguments as resolved from the recipe. deadline: `time.monotonic()` seconds after which the call
    is ended.
    """

    def __init__(self, *, plugin: str, run_seed: int, args: Mapping[str, Any], deadline: float, samples: int):
        self.plugin = plugin
        self.args = dict(args)
        self.deadline = deadline
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}
        self._run_seed = run_seed
        self._samples = samples

    def seed(self, sample: Sample, objective: str = "") -> int:
        """63-bit seed of (run, plugin, sample, objective): the same however samples were batched or retried."""
        key = f"{self._run_seed}|{self.plugin}|{objective}|{sample.group_id}|{sample.sample_id}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1

    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    def log_metric(self, name: str, value: float) -> None:
        """Averaged over the step and logged as reward/<plugin>/<name>."""
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"metric {name!r} is {number}: log finite numbers, or nothing")
        total = self.metrics.setdefault(name, [0.0, 0.0])
        total[0] += number
        total[1] += 1.0

    def log_column(self, name: str, values: Sequence[Any]) -> None:
        """One JSON-able value per sample of this call, kept beside the samples."""
        if len(values) != self._samples:
            raise ValueError(f"column {name!r} has {len(values)} values for {self._samples} samples")
        self.columns[name] = list(values)


# ---------------------------------------------------------------------------------------------------- the decorator

Scope = Literal["sample", "batch", "group"]
TextForm = Literal["stripped", "raw"]
_Plain = Literal["fail", "mask", "drop_group"]
_FLOOR = re.compile(r"floor\(\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\)")


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """What becomes of a failed score: stop the run, leave it out, replace it by `value`, or drop its whole group."""

    kind: Literal["fail", "mask", "floor", "drop_group"]
    value: float = math.nan

    @staticmethod
    def parse(text: str) -> ErrorPolicy:
        """ "fail", "mask", "drop_group" or "floor(<number>)"; PluginError otherwise."""
        if text in get_args(_Plain):
            return ErrorPolicy(cast(_Plain, text))
        floor = _FLOOR.fullmatch(text.strip())
        if floor is None:
            raise PluginError(
                f"on_error is {text!r}", remedy="use fail, mask, drop_group, or floor(value) such as floor(-1)"
            )
        return ErrorPolicy("floor", float(floor.group(1)))


_RATE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(?:/\s*(s|min|h))?\s*")


def per_second(rate: float | str) -> float:
    """Samples per second of a rate: a number, or text such as "10/s", "600/min", "1000/h". PluginError otherwise."""
    found = _RATE.fullmatch(str(rate))
    number = float(found[1]) / {"s": 1, "min": 60, "h": 3600}[found[2] or "s"] if found else 0.0
    if not number > 0:
        raise PluginError(f"rate is {rate!r}", remedy="give samples per second, or text such as 600/min or 1000/h")
    return number


@dataclass(frozen=True, slots=True)
class Options:
    """How a plugin is run; see `reward` for the meaning of each. objectives None: one, named like the plugin. scope
    None: "sample", or "batch" for a function of another trainer, see `signatures`."""

    objectives: Mapping[str, Objective] | None = None
    scope: Scope | None = None
    text: TextForm = "stripped"
    batch: int = 64
    concurrency: int = 256
    timeout_s: float = 20.0
    retries: int = 2
    on_error: str = "mask"
    max_error_rate: float = 0.02
    isolation: Literal["process"] = "process"
    memory_mb: int | None = None
    processes: int = 1
    rate: float | str | None = None
    cache: bool = False
    version: str = "1"
    validate: Callable[..., None] | None = None
    gold: Callable[..., str | None] | None = None
    prepare: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        problems = [
            (self.objectives is not None and not self.objectives, "objectives is empty: name at least one"),
            (
                self.scope is not None and self.scope not in get_args(Scope),
                f"scope is 'sample', 'batch' or 'group', not {self.scope!r}",
            ),
            (self.text not in get_args(TextForm), f"text is 'stripped' or 'raw', not {self.text!r}"),
            (self.isolation != "process", f"isolation is {self.isolation!r}; plugins run as 'process' only"),
            (self.batch < 1, f"batch is at least 1 sample, not {self.batch}"),
            (self.concurrency < 1, f"concurrency is at least 1 sample, not {self.concurrency}"),
            (not self.timeout_s > 0, f"timeout_s is more than 0 seconds, not {self.timeout_s}"),
            (self.retries < 0, f"retries is at least 0, not {self.retries}"),
            (not 0 <= self.max_error_rate <= 1, f"max_error_rate is between 0 and 1, not {self.max_error_rate}"),
            (self.memory_mb is not None and self.memory_mb < 64, f"memory_mb is at least 64, not {self.memory_mb}"),
            (self.processes < 1, f"processes is at least 1, not {self.processes}"),
        ]
        for wrong, message in problems:
            if wrong:
                raise PluginError(message)
        ErrorPolicy.parse(self.on_error)
        if self.rate is not None:
            per_second(self.rate)


F = TypeVar("F", bound=Callable[..., Any])


@overload
def reward(function: F) -> F: ...
@overload
def reward(
    *,
    objectives: Mapping[str, Objective] | None = ...,
    scope: Scope | None = ...,
    text: TextForm = ...,
    batch: int = ...,
    concurrency: int = ...,
    timeout_s: float = ...,
    retries: int = ...,
    on_error: str = ...,
    max_error_rate: float = ...,
    isolation: Literal["process"] = ...,
    memory_mb: int | None = ...,
    processes: int = ...,
    rate: float | str | None = ...,
    cache: bool = ...,
    version: str = ...,
    validate: Callable[..., None] | None = ...,
    gold: Callable[..., str | None] | None = ...,
    prepare: Callable[..., None] | None = ...,
) -> Callable[[F], F]: ...


def reward(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Mark a function as a reward plugin. It stays a plain function that can be called in a test.

    Args:
        objectives: name -> Objective. Default: one objective with the function's name.
        scope: "sample" (default): a score depends on its sample alone, and a call may hold any. "group": each call gets
            all completions of one prompt. "batch": each call gets those of several prompts, none of them in part; so
            are functions of TRL and ms-swift called unless told otherwise.
        text: what `Sample.completion` is: "stripped" of special tokens, or "raw", for a reward that looks at such.
        batch: samples per call, at most; a group that is larger and may not be cut is a call of its own.
            concurrency: samples in flight, for an `async def`.
        timeout_s: seconds a call may take; past it the process is killed and the batch bisected.
        retries: further attempts for a sample (or, of the other scopes, a group) that is alone and still fails. A
            value that was returned but is not acceptable (NaN, out of range, one for a call of several...) is not asked
            for again.
        on_error: "mask" | "fail" | "drop_group" | "floor(value)". A failure is never an implicit 0.
        max_error_rate: share of a step's samples that may fail before the run stops; above 0, one sample may always
            fail, or one group where groups fail as a whole.
        isolation: "process", the only one. memory_mb: data memory of each; default half of the machine's for all.
        processes: how many, for a plugin that computes; they share `concurrency`.
        rate: samples that may be begun per second ("600/min" per minute), for a judge that one request a sample asks.
        cache: a score depends on prompt, completion, row and arguments alone, and need not be had twice; see
            `rewards.cache`.
        version: change it when the meaning of the scores changes.
        validate, gold, prepare: each receives those of the plugin's arguments that it has a parameter for.
        validate: called by `align check`; raises ValueError where the arguments make no sense.
        gold: row -> a completion that answers it and must score best, or None where the row has none.
        prepare: called in the plugin's process before the first sample; raises PluginError where the plugin cannot
            work on this machine, and nothing starts.

    Raises:
        PluginError: an option has an impossible value.
    """
    settled = Options(**options)

    def mark(f: Callable[..., Any]) -> Callable[..., Any]:
        f.__reward__ = settled  # type: ignore[attr-defined]
        return f

    return mark if function is None else mark(function)
