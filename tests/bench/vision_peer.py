"""TRL's SFTTrainer for vision-language models, on batches that its own collator makes of pictures and text.

The collator's work (rendering, tokenising, resizing and cutting pictures into patches) is not timed, since TRL can
leave it to other processes. Neither `packing` nor `padding_free` is tried: SFTTrainer refuses both for data with images
(sft_trainer.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.protocols.trees import Tree
from tests.bench import peer
from tests.bench.vision import Question, opened, padded_windows


class Sft(peer.Peer):
    """Updates over trees whose ids are numbers of `rows`. Rows of a length stand together, to pad as little as can be.

    collating: seconds that the collator has taken, by batch size."""

    def __init__(self, folder: Path, rows: Sequence[Question], targets: str, mode: str):
        super().__init__(folder, mode, "cpu", False, targets)
        from datasets import Dataset
        from transformers import AutoProcessor
        from trl import SFTConfig, SFTTrainer

        self.rows = rows
        self.collating: dict[int, float] = {}
        self._made: dict[tuple[int, ...], dict[str, Any]] = {}
        arguments = SFTConfig(
            **self._arguments(), per_device_train_batch_size=1, max_length=None, completion_only_loss=True
        )
        self.trainer = SFTTrainer(
            model=self._model(),
            args=arguments,
            train_dataset=Dataset.from_list([self._example(0)]),
            processing_class=AutoProcessor.from_pretrained(folder),
            peft_config=self._lora(),
        )
        # Qwen2.5-VL says that it takes no number of items, so TRL would weigh every batch alike, however many tokens
        # it scores: another gradient than ours, for the same work. `update` hands the number to TRL's loss.
        self.trainer.loss_is_scaled_for_ga = True
        self._prepare()

    def _example(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        return {"prompt": row.prompt, "completion": row.answer, "images": [opened(path) for path in row.images]}

    def prepare(self, trees: Sequence[Tree], batch: int) -> None:
        self._batches(trees, batch)

    def collate_seconds(self, batch: int) -> float:
        """What all batches of this size took so far."""
        return self.collating[batch]

    def _batches(self, trees: Sequence[Tree], batch: int) -> list[dict[str, Any]]:
        found = []
        for window in padded_windows(trees, batch, by_length=True):
            numbers = tuple(tree.id for tree in window)
            if numbers not in self._made:
                started = time.perf_counter()
                made = dict(self.trainer.data_collator([self._example(number) for number in numbers]))
                self.collating[batch] = self.collating.get(batch, 0.0) + time.perf_counter() - started
                for tree, ids, real in zip(window, made["input_ids"], made["attention_mask"], strict=True):
                    if ids[real > 0].tolist() != tree.trunk.token_ids.tolist():
                        raise SystemExit(f"refused: {tree.origin}: TRL's collator makes other tokens of it")
                self._made[numbers] = made
            found.append(self._made[numbers])
        return found

    def update(self, trees: Sequence[Tree], batch: int) -> tuple[float, float]:
        batches = self._batches(trees, batch)
        items = sum((made["labels"][:, 1:] != -100).sum() for made in batches)
        return self._window([lambda made=made: dict(made) for made in batches], items)
