"""Which adapter kinds, engines and ways of publishing go together: the one table, asked by the check and by a run.

An adapter travels alone where the engine serves adapters; whole weights travel where there is no adapter (full
fine-tuning), or where the recipe wants them merged (`rollout.weights: merged`: adapter kernels are several times slower
than the base on a CPU).
"""

from __future__ import annotations

from typing import Literal

from align.errors import RecipeError, Unsupported
from align.recipe.schema import Adapter, Rollout, Tune

Publish = Literal["adapter", "weights"]

# (adapter kind, rollout.weights) -> what engines receive, or why not and what to do. The same for both engines.
_PUBLISH: dict[tuple[str, str], Publish | tuple[str, str]] = {
    ("lora", "auto"): "adapter",
    ("lora", "adapter"): "adapter",
    ("lora", "merged"): "weights",
    ("full", "auto"): "weights",
    ("full", "merged"): "weights",
    ("full", "adapter"): ("a full fine-tune has no adapter to send", "leave `rollout.weights` out, or use merged"),
}
_KINDS_NOT_BUILT = {
    "qlora": "use `kind: lora`; `model.dtype: bfloat16` halves the base's memory",
    "dora": "use `kind: lora`",
}
LARGEST_SERVED_RANK = {"vllm": 512}  # vllm.config.lora.MaxLoRARanks


def check_adapter(adapter: Adapter) -> None:
    """Raise Unsupported for an adapter that this version cannot train."""
    if adapter.kind in _KINDS_NOT_BUILT:
        raise Unsupported(
            f"`adapter.kind: {adapter.kind}` is not offered by this version",
            where="adapter.kind",
            remedy=_KINDS_NOT_BUILT[adapter.kind],
        )
    if adapter.tune != Tune():
        raise Unsupported(
            "`adapter.tune` chooses among the parts of vision-language models, which this version does not train",
            where="adapter.tune",
            remedy="leave it out; `targets` and `exclude` choose modules of a language model",
        )


def is_offered(adapter: Adapter) -> bool:
    """Whether `check_adapter` lets it pass."""
    return adapter.kind not in _KINDS_NOT_BUILT and adapter.tune == Tune()


def publish_mode(adapter: Adapter, rollout: Rollout) -> Publish:
    """What the engines of an online stage receive. Raises RecipeError or Unsupported for combinations that fail."""
    check_adapter(adapter)
    verdict = _PUBLISH[adapter.kind, rollout.weights]
    if isinstance(verdict, tuple):
        raise RecipeError(
            f"`rollout.weights: {rollout.weights}` with `adapter.kind: {adapter.kind}`: {verdict[0]}",
            where="rollout.weights",
            remedy=verdict[1],
        )
    if rollout.publish == "in_flight" and (verdict == "adapter" or rollout.name != "vllm"):
        why = "adapters" if verdict == "adapter" else f"`rollout.name: {rollout.name}`"
        raise Unsupported(
            f"`rollout.publish: in_flight` with {why}: requests finish on the version that they began with",
            where="rollout.publish",
            remedy="leave it out; it is for whole weights (full fine-tuning, `rollout.weights: merged`) on vllm",
        )
    largest = LARGEST_SERVED_RANK.get(rollout.name)
    if verdict == "adapter" and largest is not None and adapter.rank > largest:
        raise Unsupported(
            f"{rollout.name} serves adapters up to rank {largest}, not {adapter.rank}",
            where="adapter.rank",
            remedy="lower `adapter.rank`, or set `rollout.weights: merged`",
        )
    return verdict


def reference_words(adapter: Adapter, reference: object, continues_adapter: bool) -> str:
    """How reference log-probabilities are had, for the plan. reference: as resolved; None where no loss needs one."""
    if reference is None:
        return "none"
    if reference == "cached":
        return "cached: computed once from what the stage starts from, before its first step, and stored"
    if reference not in ("start", "base"):
        return f"{getattr(reference, 'path', reference)}, in an actor of its own"
    if adapter.kind == "full":
        return f"{reference}: a frozen second copy of the weights beside the policy"
    if reference == "start" and continues_adapter:
        return "start: a frozen copy of the starting adapter on the same base"
    return f"{reference}: the same base with its adapter off"
