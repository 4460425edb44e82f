"""Which adapter kinds, engines and ways of publishing go together: the one table, asked by the check and by a run.

An adapter travels alone where the engine serves adapters; whole weights travel where there is no adapter (full
fine-tuning), where it is not all that is trained (a part of the model is trained whole beside it), where engines would
leave some of it out (LoRA on the tower of images: vLLM ignores it unless told otherwise), or where the recipe wants
them merged (`rollout.weights: merged`: adapter kernels are several times slower than the base on a CPU). What was
trained on weights in four bits is merged into those weights, unpacked: on the base in full precision the adapter is
another policy, and every importance ratio would correct a difference that need not be.
"""

from __future__ import annotations

from typing import Literal

from align.errors import RecipeError, Unsupported
from align.recipe.adapter import Adapter
from align.recipe.engines import facts_of, those
from align.recipe.optimizers import OPTIMIZERS
from align.recipe.parts import Rollout
from align.recipe.sharding import STRATEGIES

Publish = Literal["adapter", "weights"]
# LoRA on language alone; with magnitudes; on weights in four bits; on a tower too; beside whole parts; none
Trained = Literal["lora", "dora", "quantised", "tower", "mixed", "full"]

# (what is trained, rollout.weights) -> what engines receive, or why not and what to do. The same for both engines.
_PUBLISH: dict[tuple[Trained, str], Publish | tuple[str, str]] = {
    ("lora", "auto"): "adapter",
    ("lora", "adapter"): "adapter",
    ("lora", "merged"): "weights",
    ("dora", "auto"): "weights",
    ("dora", "merged"): "weights",
    ("dora", "adapter"): (
        "engines serve no adapter with magnitudes (DoRA)",
        "leave `rollout.weights` out, or use merged",
    ),
    ("quantised", "auto"): "weights",
    ("quantised", "merged"): "weights",
    ("quantised", "adapter"): (
        "engines would put it on the base in full precision, and it is trained on weights in four bits",
        "leave `rollout.weights` out, or use merged: what the trainer computes with is sent",
    ),
    ("tower", "auto"): "weights",
    ("tower", "adapter"): "adapter",
    ("tower", "merged"): "weights",
    ("mixed", "auto"): "weights",
    ("mixed", "merged"): "weights",
    ("mixed", "adapter"): (
        "the parts that are trained whole (`adapter.tune`) are not in the adapter",
        "leave `rollout.weights` out, or use merged",
    ),
    ("full", "auto"): "weights",
    ("full", "merged"): "weights",
    ("full", "adapter"): ("a full fine-tune has no adapter to send", "leave `rollout.weights` out, or use merged"),
}
BASE_BESIDE_ADAPTER = "base"  # model folder inside an adapter's: the base with the parts that were trained whole


def trained(adapter: Adapter) -> Trained:
    """The row of the table that an adapter belongs to."""
    if adapter.kind == "full":
        return "full"
    if adapter.mixed:
        return "mixed"
    if adapter.quant is not None or adapter.kind == "dora":
        return "quantised" if adapter.quant is not None else "dora"
    return "tower" if set(adapter.parts("lora")) - {"language"} else "lora"


def check_adapter(adapter: Adapter) -> None:
    """Raise Unsupported for an adapter that this version cannot train, RecipeError for one that contradicts itself."""
    with_lora = adapter.parts("lora")
    if adapter.quant is not None and adapter.mixed:
        whole = adapter.parts("full")[0]
        raise Unsupported(
            f"`adapter.tune.{whole}: full` with weights in four bits: the base that is written with the parts trained "
            "whole would be packed a second time, to other weights",
            where=f"adapter.tune.{whole}",
            remedy="set it to lora or frozen, or use `kind: lora`",
        )
    if adapter.kind == "full" and with_lora:
        raise RecipeError(
            f"`adapter.tune.{with_lora[0]}: lora` with `adapter.kind: full`, which makes no adapter",
            where=f"adapter.tune.{with_lora[0]}",
            remedy="write `kind: lora`; `tune` then says which parts are trained whole beside it",
        )
    if adapter.kind == "full" and not adapter.parts("full"):
        raise RecipeError(
            "`adapter.tune` freezes every part of the model",
            where="adapter.tune",
            remedy="set one of vision, projector and language to full",
        )
    if adapter.kind != "full" and not with_lora:
        raise RecipeError(
            f"`adapter.kind: {adapter.kind}`, and `adapter.tune` puts LoRA on no part of the model",
            where="adapter.tune",
            remedy="write `kind: full` to train whole parts and nothing else, or set a part to lora",
        )


def check_sharded(adapter: Adapter, optimizer: str, strategy: str) -> None:
    """Raise Unsupported for what the strategy cannot spread."""
    spreads, why = STRATEGIES[strategy].spreads, OPTIMIZERS[optimizer].whole
    if "moments" in spreads and why:
        divided = " or ".join(name for name, one in OPTIMIZERS.items() if not one.whole)
        raise Unsupported(
            f"`optim.name: {optimizer}` with {strategy}: {why}",
            where="optim.name",
            remedy=f"use {divided}, whose moments the ranks divide, or leave `placement.trainer.strategy` out",
        )
    if "parameters" in spreads and adapter.quant is not None:
        raise Unsupported(
            f"weights in four bits with {strategy}: they cannot be spread over ranks",
            where="placement.trainer.strategy",
            remedy="use zero2: a base in four bits is small, and stays whole on every rank",
        )


def is_sound(adapter: Adapter) -> bool:
    """Whether `check_adapter` lets it pass."""
    try:
        check_adapter(adapter)
    except (Unsupported, RecipeError):
        return False
    return True


def refuse_parts_of_text(adapter: Adapter) -> None:
    """Raise Unsupported where `tune` asks of a model of text for other than what `kind` says."""
    usual = Adapter(kind=adapter.kind).modes
    wanted = [part for part, mode in adapter.modes.items() if mode != usual[part]]
    if wanted:
        raise Unsupported(
            f"`adapter.tune.{wanted[0]}` chooses among the parts of models that see; this one reads text alone",
            where=f"adapter.tune.{wanted[0]}",
            remedy="leave it out; `kind` says how it is trained, `targets` and `exclude` choose modules",
        )


def publish_mode(adapter: Adapter, rollout: Rollout) -> Publish:
    """What the engines of an online stage receive. Raises RecipeError or Unsupported for combinations that fail."""
    check_adapter(adapter)
    how = trained(adapter)
    verdict = _PUBLISH[how, rollout.weights]
    if isinstance(verdict, tuple):
        raise RecipeError(
            f"`rollout.weights: {rollout.weights}` with `adapter.kind: {adapter.kind}`: {verdict[0]}",
            where="rollout.weights",
            remedy=verdict[1],
        )
    facts = facts_of(rollout.name)
    option = facts.tower_option
    if how == "tower" and verdict == "adapter" and option is not None and not rollout.engine.get(option):
        raise Unsupported(
            "`rollout.weights: adapter` with LoRA on the vision tower or the projector, which "
            f"{facts.title} ignores by default",
            where="rollout.weights",
            remedy=f"leave it out (merged weights are sent), or set `rollout.engine.{option}: true` where "
            f"{facts.title} serves it for this family",
        )
    if rollout.publish == "in_flight" and (verdict == "adapter" or not facts.in_flight):
        why = "adapters" if verdict == "adapter" else f"`rollout.name: {rollout.name}`"
        raise Unsupported(
            f"`rollout.publish: in_flight` with {why}: requests finish on the version that they began with",
            where="rollout.publish",
            remedy="leave it out; it is for whole weights (full fine-tuning, `rollout.weights: merged`) on "
            + " or ".join(those(lambda one: one.in_flight)),
        )
    largest = facts.largest_rank
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
        words = f"{getattr(reference, 'path', reference)}, in an actor of its own"
        if adapter.quant is not None and not getattr(reference, "adapter", None):
            words += (
                "; its weights are not packed in four bits as the policy's base is, so the two differ before the first "
                "step (`reference: base` is the packed base itself)"
            )
        return words
    if adapter.kind == "full":
        return f"{reference}: a frozen second copy of the weights beside the policy"
    copy = f" and a frozen copy of {' and '.join(adapter.parts('full'))}" if adapter.mixed else ""
    if reference == "start" and continues_adapter:
        return f"start: a frozen copy of the starting adapter on the same base{copy}"
    return f"{reference}: the same base with its adapter off{copy}"
