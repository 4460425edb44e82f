"""What a trainer is told. No torch here: the driver builds it and sends it to an actor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from align.recipe.adapter import Adapter, Part, Rate
from align.recipe.chat_files import ChatFiles
from align.recipe.inputs import Model
from align.recipe.labels import Labels
from align.recipe.parts import LossTerm, Optim, Packing
from align.recipe.sharding import Sharding


@dataclass(frozen=True)
class TrainerSpec:
    """All a trainer needs to know; plain data, so that it travels to any process.

    base: model folder; adapter: peft folder the stage starts from, or None. total_updates: optimizer updates of the
    whole stage, the length of the schedule. temperature: that of the rollouts. reference: where reference
    log-probabilities come from ("path" is an actor of its own, handed over as a callable; with "cached" the trees carry
    them and nothing is kept for them here).
    rates: learning rate and weight decay of parts of the model, where they are not `optim`'s.
    max_tokens, max_patches: of a microbatch. media_cache_mb: features of images that are kept where nothing of the
    vision tower learns.
    as_trained: of a reference of its own, how the policy is trained that it is the reference of: it computes in that
    one's arithmetic, so that equal weights give equal values.
    publish, engine_dtype: how and in which dtype engines receive the policy. labels: of a score head, where a loss
    needs scores; None: one score, as of a reward model. chat: written beside the weights that others load. sharding:
    how parameters are spread over the trainer's ranks.
    """

    model: Model
    base: str
    adapter_config: Adapter
    losses: tuple[LossTerm, ...]
    optim: Optim
    total_updates: int
    adapter: str | None = None
    rates: Mapping[Part, Rate] = field(default_factory=dict)
    max_tokens: int = 16384
    max_patches: int = 65536
    media_cache_mb: int = 1024
    temperature: float = 1.0
    reference: Literal["start", "base", "path", "cached"] | None = None
    publish: Literal["adapter", "weights"] = "adapter"
    engine_dtype: str = "float32"
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    trainable: bool = True
    labels: Labels | None = None
    chat: ChatFiles | None = None
    as_trained: Adapter | None = None
    sharding: Sharding = field(default_factory=Sharding)


def scoring_spec(
    base: Path,
    labels: Labels | None,
    *,
    dtype: str,
    device: str,
    gpu: bool,
    packing: Packing | None = None,
    adapter: Path | None = None,
    adapter_config: Adapter | None = None,
    trust_remote_code: bool = False,
) -> TrainerSpec:
    """A forward over packed rows without optimizer, for a model with a score head: of a folder, or of one and an
    adapter on it."""
    packing = packing or Packing()
    return TrainerSpec(
        model=Model.model_validate({"path": str(base), "dtype": dtype, "trust_remote_code": trust_remote_code}),
        base=str(base),
        adapter=str(adapter) if adapter else None,
        adapter_config=adapter_config or Adapter(),
        losses=(LossTerm(name="classify"),),
        optim=Optim(),
        total_updates=1,
        max_tokens=packing.budget(gpu),
        max_patches=packing.patches(gpu),
        device=device,
        trainable=False,
        labels=labels,
    )


def reference_spec(policy: TrainerSpec, base: Path, adapter: Path | None, config: Adapter) -> TrainerSpec:
    """A reference with weights of its own (`reference: {path: ...}`), which computes as the policy does: where its
    weights are the policy's first, so are its values, to the last bit."""
    return replace(
        policy,
        base=str(base),
        adapter=str(adapter) if adapter else None,
        adapter_config=config,
        as_trained=policy.adapter_config,
        losses=(),
        reference=None,
        trainable=False,
    )
