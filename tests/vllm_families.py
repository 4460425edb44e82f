"""One tiny vision-language model in vLLM against transformers' own forward: base, adapters on the language model and on
everything, merged weights. What `tests.prove.prove_vllm_families` sweeps and the integration tests take two of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.model.adapters import attach, digest, lora_layers, merged_state, save
from align.protocols.fleet import PromptItem, Sampling
from align.protocols.trainer import Publication
from align.recipe.adapter import Adapter
from align.train.policy import write_weights
from rollout.base import EngineSpec, generate, make_engine
from tests.tiny_media import TinyMedia, forward_logps, holds_mark, picture
from tests.tiny_vlms import write_tiny_vlm

TOLERANCE = 1e-4
RANK = 8
SAMPLING = Sampling(max_tokens=12)
LANGUAGE = r".*(language_model|text_model)\..*_proj"


class Family:
    """A tiny model on disk, prompts for it, and a policy with a large adapter."""

    def __init__(self, family: str, folder: Path):
        self.name, self.folder = family, folder
        self.base = write_tiny_vlm(folder / "model", family)
        self.media = TinyMedia(self.base, family, folder / "store")
        self._publications = 0

    def prompts(self) -> list[PromptItem]:
        """One picture, another with the same text, two of different sizes, none."""
        parts: list[list[Any]] = [
            ["look ", picture(1), " what is it?"],
            ["look ", picture(2), " what is it?"],
            ["two ", picture(3, 56, 112), " and ", picture(4, 112, 112), " end"],
            ["only text here"],
        ]
        return [self.media.prompt(some, number) for number, some in enumerate(parts)]

    def model(self) -> Any:
        from transformers import AutoModelForImageTextToText

        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        return AutoModelForImageTextToText.from_pretrained(self.base, **options).eval()

    def policy(self, targets: str) -> Any:
        """A peft model whose adapter is far from zero: on the language model (LANGUAGE), or on whatever has layers."""
        parts = ["vision"] if self.name == "gemma3" else ["vision", "projector"]  # its projector is one bare matrix
        tune = {} if targets == LANGUAGE else dict.fromkeys(parts, "lora")
        adapter = Adapter.model_validate({"rank": RANK, "alpha": 12.0, "targets": targets, "tune": tune})
        peft = attach(self.model(), adapter, None, seed=3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, layer in lora_layers(peft):
                weight = layer.lora_B["default"].weight
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        return peft

    def adapter(self, peft: Any) -> Publication:
        self._publications += 1
        folder = self.folder / f"version-{self._publications}"
        save(peft, folder)
        return Publication(self._publications, "adapter", str(folder), digest(peft, torch.float32), rank=RANK)

    def weights(self, peft: Any) -> Publication:
        self._publications += 1
        folder = self.folder / f"version-{self._publications}"
        return write_weights(dict(merged_state(peft, torch.float32)), folder, self._publications, torch.float32)

    def as_it_is(self) -> Publication:
        return Publication(0, "base", str(self.base), "")

    @contextmanager
    def engine(self, **changes: Any) -> Iterator[Any]:
        spec = EngineSpec("vllm", str(self.base), max_model_len=512, threads=1, media={"image": 2}, **changes)
        engine = make_engine(spec)
        try:
            yield engine
        finally:
            engine.close()


def largest_gap(engine: Any, model: Any, prompts: Sequence[PromptItem], publication: Publication) -> float:
    """Publish, sample four completions of each prompt, and the largest difference of a token's log-probability from
    that of the model's own forward."""
    engine.publish(publication)
    gaps = []
    for group in generate(engine, prompts, 4, SAMPLING):
        kept = [c for c in group.completions if not holds_mark(model, c.token_ids)]
        assert kept, "every completion of a prompt holds a picture's token: sample more"
        gaps += [np.abs(forward_logps(model, group.prompt, c.token_ids) - c.logps).max() for c in kept]
    return float(max(gaps))
