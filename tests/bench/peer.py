"""The other side of the comparisons: TRL's own trainers, given the same token ids and the same adapter.

What is timed is an optimizer update as TRL's loop makes it: its collator, its `training_step` over the accumulation
window (its loss, its reference pass, its metrics), gradient clipping, its optimizer. Construction, tokenisation and
data loading are left out. The rows of a window are sorted by length, so that larger batches pad as little as they can.

TRL's head runs on scored positions only where `_use_triton(device)` holds: `compact` in `add_fused_lm_head`
(trl/trainer/utils.py), CUDA and XPU. On a CPU it scores every position of the padded batch and masks afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.protocols import Tree
from tests.bench.work import ALPHA, LR, RANK, adapter_tensors

HEAD_NOTE = "TRL's head compacts to scored positions only on CUDA (trl/trainer/utils.py, add_fused_lm_head: compact)"
# name: dtype of the loaded model, mixed precision
MODES = {
    "float32": ("float32", False),
    "autocast": ("float32", True),
    "bfloat16": ("bfloat16", True),
    "bfloat16, no autocast": ("bfloat16", False),
}


def modes_for(dtype: str) -> list[str]:
    return ["float32"] if dtype == "float32" else ["autocast", "bfloat16", "bfloat16, no autocast"]


def windows_of(trees: Sequence[Tree], batch: int) -> list[list[Tree]]:
    """Batches of one accumulation window, rows sorted by length."""
    ordered = sorted(trees, key=lambda tree: len(tree.trunk) + max(map(len, tree.branches)))
    return [list(ordered[i : i + batch]) for i in range(0, len(ordered), batch)]


class _Peer:
    """A TRL trainer made ready as its `train` would, one update at a time."""

    trainer: Any

    def __init__(self, folder: Path, mode: str, device: str, checkpointing: bool):
        self.folder, self.mode, self.device = folder, mode, device
        self.checkpointing = checkpointing

    def _model(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from align.model.load import quiet

        with quiet():
            dtype = getattr(torch, MODES[self.mode][0])
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, local_files_only=True)

    def _lora(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
        )

    def _arguments(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "trl"),
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "use_cpu": self.device == "cpu",
            "bf16": MODES[self.mode][1],
            "fp16": False,
            "gradient_checkpointing": self.checkpointing,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }

    def _prepare(self) -> None:
        """What `Trainer.train` does before its loop."""
        trainer = self.trainer
        trainer.create_optimizer()
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped.train()

    def load_adapter(self, tensors: dict[str, Any]) -> None:
        import torch

        mine = adapter_tensors(self.trainer.model)
        if mine.keys() != tensors.keys():
            raise SystemExit("refused: the two sides put LoRA on different layers: no comparison of different work")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(tensors[name])

    def _window(self, inputs: Sequence[Any]) -> tuple[float, float]:
        """(loss, gradient norm) of one update over a window of batches, each a function that makes its input."""
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(inputs)
        loss = sum(trainer.training_step(trainer.model_wrapped, make()) for make in inputs)
        norm = trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model_wrapped.zero_grad()
        return float(loss), float(norm)


class Dpo(_Peer):
    def __init__(
        self, folder: Path, trees: Sequence[Tree], mode: str, *, device: str = "cpu", checkpointing: bool = False
    ):
        super().__init__(folder, mode, device, checkpointing)
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        class Given(DPOTrainer):  # type: ignore[misc]
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
        rows = [[as_row(tree) for tree in window] for window in windows_of(trees, batch)]
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
