"""Steps that trained nothing: why, how often, and when the user is told."""

from __future__ import annotations

from collections.abc import Mapping

from align.protocols.trainer import Metrics

EVERY = 4  # a further line at 1, 4, 16, 64, ... such steps


def why_idle(metrics: Metrics) -> str | None:
    """The reason where no update of a turn had a signal (`align.train.signal`) and the weights stayed; else None."""
    if "train/idle" not in metrics or metrics["train/idle"] < metrics.get("train/updates", 1.0):
        return None
    if metrics.get("completion/mean_length") == 0:
        return "every completion is empty, the policy ends its turn at once: train it to answer first (an sft stage)"
    if metrics.get("completion/masked") == 1.0:
        if metrics.get("completion/truncated") == 1.0:
            return (
                "every completion was cut off by `rollout.max_tokens`, and `truncated: mask` leaves these out: raise "
                "max_tokens, or set `truncated` to keep or penalise"
            )
        if metrics.get("advantage/missing") == 1.0:
            return "no completion has a score: see failures.jsonl in the stage's rewards/"
        return "every completion was left out: cut off, empty, without a score, or of a dropped group"
    if "groups/total" in metrics and metrics.get("groups/dead") == metrics["groups/total"]:
        return "every advantage is 0: the completions of each prompt scored alike"
    return (
        "what the loss pulls at cancels or is 0: both sides of the pairs (or all completions of a group) are the same, "
        "or the loss is at its bound"
    )


def told(count: int) -> bool:
    """Whether the step that is the `count`-th of its kind is worth a line: the first is, and ever fewer after it."""
    while count > 1 and count % EVERY == 0:
        count //= EVERY
    return count == 1


def words(stage_id: str, step: int, count: int, reason: str) -> str:
    """While it happens."""
    so_far = f" ({count} such steps so far)" if count > 1 else ""
    return f"{stage_id}: step {step} trained nothing{so_far}: {reason}"


def closing_lines(stage_id: str, steps: int, idle: Mapping[str, int]) -> list[str]:
    """At the end of a stage of `steps` steps. idle: how many trained nothing, by reason."""
    count = sum(idle.values())
    if not count:
        return []
    if count == steps:
        first = f"nothing was trained in any of its {steps} steps, the weights are those it began with"
    else:
        first = f"{count} of {steps} steps trained nothing"
    return [f"{stage_id}: {first}", *(f"{stage_id}:   {n} x {reason}" for reason, n in idle.items())]
