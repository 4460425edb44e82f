"""A reference model in its own process: `PolicyTrainer` without an optimizer, asked for packed batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align.actors.cluster import die_with_parent
from align.actors.policy import load_libraries
from align.shared_files import require_shared
from align.train.spec import TrainerSpec

if TYPE_CHECKING:
    from torch import Tensor

    from align.types import TokenBatch


class ReferenceActor:
    """Lives in a Ray worker. Packed batches arrive by object reference from the policy's actor, which waits."""

    def __init__(self) -> None:
        die_with_parent()

    def start(self, spec: TrainerSpec, token: Path) -> None:
        """token: see `require_shared`."""
        require_shared(token, spec.base, spec.adapter)
        load_libraries()
        from align.train.trainer import PolicyTrainer

        assert not spec.trainable, "a reference has no optimizer"
        self.trainer = PolicyTrainer(spec)

    def batch_logps(self, batch: TokenBatch) -> Tensor:
        """f32[N]: log-probabilities of the batch's scored tokens."""
        return self.trainer.batch_logps(batch)
