"""TRL's SFTTrainer and DPOTrainer for text, on the ids that our trainer is given. What is timed: `peer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.protocols.trees import Tree
from tests.bench import peer


class Sft(peer.Peer):
    """SFTTrainer on rows of text whose ids are given. Of other lengths than one, rows stand by length."""

    def __init__(
        self, folder: Path, trees: Sequence[Tree], mode: str, *, device: str, checkpointing: bool, liger: bool = False
    ):
        super().__init__(folder, mode, device, checkpointing, liger=liger)
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        class Given(SFTTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset  # the ids are given

        self.trainer = Given(
            model=self._model(),
            args=SFTConfig(**self._arguments(), per_device_train_batch_size=1, max_length=None),
            train_dataset=Dataset.from_list([as_text(tree) for tree in trees[:1]]),
            processing_class=AutoTokenizer.from_pretrained(self.folder),
            peft_config=self._lora(),
        )
        self._prepare()

    def update(self, trees: Sequence[Tree], batch: int) -> tuple[float, float]:
        import torch

        rows = [[as_text(tree) for tree in window] for window in peer.windows_of(trees, batch)]
        items = torch.tensor(sum(int(tree.trunk.loss_mask.sum()) for tree in trees), device=self.device)
        collate = self.trainer.data_collator
        return self._window([lambda window=window: collate(window) for window in rows], items)


def as_text(tree: Tree) -> dict[str, list[int]]:
    """A row as SFTTrainer's collator wants it: what is not scored has the label -100."""
    labels = [i if scored else -100 for i, scored in zip(tree.trunk.token_ids, tree.trunk.loss_mask, strict=True)]
    return {"input_ids": tree.trunk.token_ids.tolist(), "labels": [int(label) for label in labels]}


class Dpo(peer.Peer):
    def __init__(
        self,
        folder: Path,
        trees: Sequence[Tree],
        mode: str,
        *,
        device: str = "cpu",
        checkpointing: bool = False,
        liger: bool = False,
    ):
        super().__init__(folder, mode, device, checkpointing, liger=liger)
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        class Given(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset  # the ids are given

        self.trainer = Given(
            model=self._model(),
            args=DPOConfig(**self._arguments(), per_device_train_batch_size=1, beta=0.1, max_length=None),
            train_dataset=Dataset.from_list([as_row(tree) for tree in trees[:1]]),
            processing_class=AutoTokenizer.from_pretrained(self.folder),
            peft_config=self._lora(),
        )
        self._prepare()

    def update(self, trees: Sequence[Tree], batch: int) -> tuple[float, float]:
        rows = [[as_row(tree) for tree in window] for window in peer.windows_of(trees, batch)]
        collate = self.trainer.data_collator
        return self._window([lambda window=window: collate(window) for window in rows])


def as_row(tree: Tree) -> dict[str, list[int]]:
    """A pair as DPOTrainer's collator wants it."""
    chosen, rejected = tree.branches
    return {
        "prompt_ids": tree.trunk.token_ids.tolist(),
        "chosen_ids": chosen.token_ids.tolist(),
        "rejected_ids": rejected.token_ids.tolist(),
    }
