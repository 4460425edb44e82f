"""A small recipe with its data in a folder of its own, which each test spoils in one way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = """\
name: small
seed: 3
output: runs
model:
  config:
    model_type: qwen3
    hidden_size: 64
    intermediate_size: 128
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    head_dim: 16
    max_position_embeddings: 256
    tie_word_embeddings: true
  tokenizer: {train_on: sft.jsonl, vocab_size: 300}
stages:
  - id: sft
    kind: sft
    adapter: {kind: full}
    data: sft.jsonl
    batch: {sequences: 4}
    epochs: 2
    eval: {data: sft.jsonl}
  - id: dpo
    kind: preference
    from: sft
    adapter: {rank: 8}
    data: pairs.jsonl
    loss: {name: dpo, beta: 0.2}
    batch: {pairs: 4}
  - id: grpo
    kind: online
    from: dpo
    data: {path: sft.jsonl}
    batch: {groups: 2, group_size: 4}
    rewards:
      - numeric
      - {use: "judge.py:brevity", timeout_s: 5}
    objectives: {weights: {numeric: 1.0, brevity: 0.5}}
    rollout: {max_tokens: 32}
    steps: 5
  - {id: merged, kind: merge, from: grpo}
  - id: exam
    kind: evaluate
    of: [sft, grpo]
    data: sft.jsonl
    rewards: numeric
    rollout: {temperature: 0, max_tokens: 32}
"""

JUDGE = """\
def brevity(samples):
    return [-len(s.completion) for s in samples]
"""


def conversation(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What is {number}+{number}?"},
            {"role": "assistant", "content": f"It is {2 * number}."},
        ]
    }


def pair(number: int) -> dict[str, Any]:
    return {"prompt": f"What is {number}+{number}?", "chosen": str(2 * number), "rejected": str(2 * number + 1)}


@dataclass(frozen=True)
class Workshop:
    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def write(self, name: str, content: str | Sequence[Mapping[str, Any]]) -> Path:
        """A file of the folder: text, or rows as JSON lines."""
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def change(self, old: str, new: str) -> None:
        text = self.recipe.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the recipe"
        self.write("recipe.yaml", text.replace(old, new))


def open_workshop(folder: Path) -> Workshop:
    shop = Workshop(folder)
    shop.write("recipe.yaml", RECIPE)
    shop.write("judge.py", JUDGE)
    shop.write("sft.jsonl", [conversation(n) for n in range(12)])
    shop.write("pairs.jsonl", [pair(n) for n in range(10)])
    return shop
