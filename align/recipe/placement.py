"""Where processes of a run go: ranks, cores, GPUs, nodes of a cluster, and what becomes of lost ones."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from align.recipe.sharding import Sharding, ShardingField
from align.recipe.strict import PositiveInt, Strict


def _own_resources(value: dict[str, float]) -> dict[str, float]:
    for name in value.keys() & {"CPU", "GPU", "memory", "object_store_memory"}:
        raise ValueError(f"{name!r} is counted by Ray itself: `cpus` and `gpus` ask for processors")
    return value


CustomResources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_own_resources)]


class Share(Strict):
    """resources: of a node beside CPUs and GPUs, for each process: `{train: 1}` asks for a node that was started with
    `ray start --resources '{"train": 4}'`."""

    resources: CustomResources = Field(default_factory=dict)
    ranks: PositiveInt = 1
    cpus: Annotated[float, Field(ge=0)] | None = None
    gpus: Annotated[float, Field(ge=0)] | None = None
    threads: PositiveInt | None = None


class TrainerShare(Share):
    """ranks: processes that train one policy together; strategy: how its parameters are spread over them."""

    strategy: ShardingField = Sharding()


class RewardShare(Share):
    """count: reward actors, spread over the nodes of a cluster; each runs every plugin for its part of the groups."""

    count: PositiveInt = 1


class Placement(Strict):
    """max_restarts: times that a run goes on from its last checkpoint after it lost a trainer rank or its node; by
    default 3 on a cluster that it joined, and 0 on one machine. replacement_s: how long a place for what was lost is
    waited for, until another node has room or a new one joins."""

    max_restarts: Annotated[int, Field(ge=0)] | None = None
    replacement_s: Annotated[float, Field(gt=0)] = 600.0
    trainer: TrainerShare = TrainerShare()
    reference: Share = Share()
    rollout: Share = Share()
    rewards: RewardShare = RewardShare()

    @property
    def custom(self) -> list[str]:
        """Resources that the recipe names: they are of nodes of a cluster, and no machine has them by itself."""
        shares = (self.trainer, self.reference, self.rollout, self.rewards)
        return sorted({name for share in shares for name in share.resources})
