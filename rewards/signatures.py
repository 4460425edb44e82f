"""Reward functions written for TRL or ms-swift, called as those trainers call them.

trl: `f(prompts=, completions=, completion_ids=, trainer_state=, log_extra=, log_metric=, **columns)`; conversational
    prompts come with completions as [{"role": "assistant", "content": text}], plain ones with strings; of episodes as
    all their turns, with `environments`. TRL 1.16,
    GRPOTrainer._calculate_rewards.
swift: `f(completions, **columns)` with strings, and `messages` with the completion as last turn; functions and the
    ORM classes, which are made once with `args` (swift/rewards/orm.py).

Those trainers call with all completions of each prompt, and many functions compare them: so they are called here,
unless the recipe or `@reward` says `scope: sample`. None stays "not applicable". A function without **kwargs gets those
of the names that it takes. `trainer_state` is None: a plugin sees samples, not the trainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from rewards.api import Context, PluginError, Sample
from rewards.plugin import Plugin, PluginSpec, make_plugin, read_parameters

Columns = dict[str, Any]


def adapt(function: Any, spec: PluginSpec, *, source: str | None, sha256: str | None) -> Plugin:
    """A Plugin from a TRL or ms-swift reward. PluginError where it is not callable."""
    build = {"trl": _trl_columns, "swift": _swift_columns}[spec.signature]
    made = inspect.isclass(function)
    target = _instance(function, spec) if made else function
    if not callable(target):
        raise PluginError(f"a reward is callable, {target!r} is not", where=spec.use)
    body = target if inspect.isroutine(target) else type(target).__call__
    accepted = _accepted(target)
    fixed = {} if made else dict(spec.args)

    def call(samples: Sequence[Sample], ctx: Context, **_: Any) -> Any:
        given: Columns = {**build(samples, ctx), **fixed}
        first = (given.pop("completions"),) if spec.signature == "swift" else ()
        if accepted is not None:
            given = {k: v for k, v in given.items() if k in accepted}
        return target(*first, **given)

    given_by_us = build((), Context(plugin="", run_seed=0, args={}, deadline=0.0, samples=0))
    asked, _ = read_parameters(target, skip=(*given_by_us, *fixed))
    if spec.signature == "swift":  # the completions come first, whatever they are called
        asked = asked[next(iter(inspect.signature(target).parameters), "") not in given_by_us :]
    parameters, open_args = read_parameters(function, skip=("self",))
    if not made:  # a parameter of the function may be a column of the data: only its name can be checked
        parameters = tuple(p for p in parameters if p.name in spec.args)
    plugin = make_plugin(
        function,
        spec,
        call=call,
        parameters=parameters,
        open_args=open_args,
        is_async=inspect.iscoroutinefunction(body),
        source=source,
        sha256=sha256,
    )
    return replace(plugin, columns=tuple(p.name for p in asked if p.required))


def _instance(kind: Callable[..., Any], spec: PluginSpec) -> Any:
    try:
        return kind(**spec.args)
    except TypeError as error:
        raise PluginError(f"cannot be made with args {dict(spec.args)!r}: {error}", where=spec.use) from error


def _accepted(target: Callable[..., Any]) -> set[str] | None:
    """The names that a callable takes; None where it takes all."""
    parameters = inspect.signature(target).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def _row_columns(samples: Sequence[Sample]) -> Columns:
    names = dict.fromkeys(name for s in samples for name in s.row)
    return {name: [s.row.get(name) for s in samples] for name in names}


def _is_plain(sample: Sample) -> bool:
    return len(sample.messages) == 1 and sample.messages[0].get("role") == "text"


def _trl_columns(samples: Sequence[Sample], ctx: Context) -> Columns:
    columns = _row_columns(samples)
    for name in ("prompt", "completion", "completion_ids"):
        columns.pop(name, None)
    prompts = [s.messages[0]["content"] if _is_plain(s) else list(s.messages) for s in samples]
    completions = [s.completion if _is_plain(s) else list(s.turns) or [_answer(s)] for s in samples]
    return {
        **columns,
        **_environments(samples),
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [list(s.token_ids) for s in samples],
        "trainer_state": None,
        "log_extra": ctx.log_column,
        "log_metric": ctx.log_metric,
    }


def _environments(samples: Sequence[Sample]) -> Columns:
    """Of episodes, what TRL hands on as the environments: objects with their public attributes as they were at the end,
    in a process that is gone."""
    if not any(s.turns for s in samples):
        return {}
    states = [s.state if isinstance(s.state, Mapping) else {} for s in samples]
    return {
        "environments": [SimpleNamespace(**{str(name): value for name, value in state.items()}) for state in states]
    }


def _swift_columns(samples: Sequence[Sample], ctx: Context) -> Columns:
    return {
        **_row_columns(samples),
        "completions": [s.completion for s in samples],
        "messages": [[*_chat(s), _answer(s)] for s in samples],
        "response_token_ids": [list(s.token_ids) for s in samples],
        "is_truncated": [s.truncated for s in samples],
        "trainer_state": None,
    }


def _chat(sample: Sample) -> list[Any]:
    if _is_plain(sample):
        return [{"role": "user", "content": sample.messages[0]["content"]}]
    return list(sample.messages)


def _answer(sample: Sample) -> dict[str, str]:
    return {"role": "assistant", "content": sample.completion}
