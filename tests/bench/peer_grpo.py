"""TRL's GRPOTrainer as the other side of a comparison: its update on completions that are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.protocols.trees import Segment, Tree
from tests.bench import peer

MEDIA = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")  # what TRL hands on of Qwen's images


class Grpo(peer.Peer):
    """GRPOTrainer's update on completions that are given: its reference pass over the whole generation batch, then its
    training steps. Generation, rewards and advantages are left out; `_prepare_inputs`, which makes them, hands over."""

    def __init__(
        self,
        folder: Path,
        mode: str,
        *,
        group_size: int,
        max_completion: int,
        kl: float,
        device: str = "cpu",
        checkpointing: bool = False,
        targets: str = "all-linear",
        liger: bool = False,
    ):
        super().__init__(folder, mode, device, checkpointing, targets, liger)
        from datasets import Dataset
        from transformers import AutoProcessor
        from trl import GRPOConfig, GRPOTrainer

        class Given(GRPOTrainer):
            def _prepare_inputs(self, generation_batch: Any) -> Any:
                return generation_batch

        arguments = GRPOConfig(
            **self._arguments(),
            per_device_train_batch_size=group_size,
            num_generations=group_size,
            max_completion_length=max_completion,
            beta=kl,
            use_bias_correction_kl=False,  # plain k3, as ours by default
            loss_type="dapo",  # TRL's default: the mean over all tokens of the update, our `aggregation: token`
        )
        self.trainer = Given(
            model=self._model(),
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "never read"}] * group_size),
            processing_class=AutoProcessor.from_pretrained(self.folder),  # of a language model: its tokenizer
            peft_config=self._lora(),
        )
        self._prepare()

    def update(self, trees: Sequence[Tree], batch: int) -> tuple[float, float]:
        """batch: completions per training step and per reference forward. All prompts of one length, and all
        completions."""
        from trl.trainer import utils

        whole = as_generation_batch(trees, self.device)
        whole["ref_per_token_logps"] = self._reference(whole, batch)
        steps = whole["prompt_ids"].shape[0] // batch
        items = whole["completion_mask"].sum()
        # as `_prepare_inputs` has it, without the shuffle
        split = utils.split_tensor_dict(utils.split_pixel_values_by_grid(whole), steps)
        parts = [utils.unsplit_pixel_values_by_grid(part) | {"num_items_in_batch": items} for part in split]
        self.trainer.args.steps_per_generation = steps
        return self._window([lambda part=part: part for part in parts])

    def _reference(self, whole: dict[str, Any], batch: int) -> Any:
        """As `_generate_and_score_completions` has it for an adapter that began at zero: the adapter switched off."""
        import torch
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        trainer = self.trainer
        ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], dim=1)
        mask = torch.cat([whole["prompt_mask"], whole["completion_mask"]], dim=1)
        model = trainer.accelerator.unwrap_model(trainer.model)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
            use_adapter(model, adapter_name=None),
        ):
            kept = whole["completion_ids"].shape[1]
            media = {name: whole[name] for name in MEDIA if name in whole}
            logps = trainer._get_per_token_logps_and_entropies
            return logps(trainer.model, ids, mask, kept, batch_size=batch, **media)[0]


def as_generation_batch(trees: Sequence[Tree], device: str) -> dict[str, Any]:
    """Groups as GRPOTrainer has them after generation, a row per completion."""
    import numpy as np
    import torch

    rows = [(tree.trunk, branch) for tree in trees for branch in tree.branches]
    prompts = torch.as_tensor(np.stack([trunk.token_ids for trunk, _ in rows])).to(device)
    completions = torch.as_tensor(np.stack([branch.token_ids for _, branch in rows])).to(device)
    advantages = [0.0 if branch.advantages is None else float(branch.advantages[0]) for _, branch in rows]
    media = _media_of_rows([trunk for trunk, _ in rows], completions.shape[1]) if rows[0][0].media else {}
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.tensor(advantages, device=device),
        **{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in media.items()},
    }


def _media_of_rows(prompts: Sequence[Segment], completion: int) -> dict[str, Any]:
    """Qwen's images of every row, in order, and the types of its tokens, those of its completion included."""
    import numpy as np
    import torch

    from align.mediastore import read_tensors

    media = [medium for prompt in prompts for medium in prompt.media]
    known = {medium.key: read_tensors(medium) for medium in media}
    types = np.zeros((len(prompts), len(prompts[0]) + completion), dtype=np.int64)
    for row, prompt in zip(types, prompts, strict=True):
        for medium in prompt.media:
            row[medium.start : medium.start + medium.length] = 1
    return {
        **{name: torch.cat([known[m.key][name] for m in media]) for name in ("pixel_values", "image_grid_thw")},
        "num_images": [len(prompt.media) for prompt in prompts],
        "mm_token_type_ids": torch.as_tensor(types),
    }
