"""What of a model decides memory, from config.json before anything is loaded: sizes of its layers, counts of weights.

What processes make of it is worked out in `align.check.memory.plan`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import ModelError
from align.recipe.adapter import Adapter, Mode, Part

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# families that normalise queries and keys, and so keep what they were before it
QK_NORMS = frozenset({"qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text", "gemma3", "gemma3_text", "olmo2"})


@dataclass(frozen=True)
class Row:
    """One part of a model that reads images: how it is trained, its weights, and the numbers that are trained (an
    adapter's, or all)."""

    mode: Mode
    parameters: int
    trained: int


Table = Mapping[Part, Row]


def others(table: Table | None) -> int:
    """Weights beside the language model."""
    return sum(row.parameters for part, row in (table or {}).items() if part != "language")


@dataclass(frozen=True)
class Tower:
    """What of the part that sees decides memory."""

    layers: int
    hidden: int
    intermediate: int


def tower_of(config: Mapping[str, Any]) -> Tower | None:
    """Sizes of the tower from a transformers configuration; None where there is none, or none that we can count."""
    vision: Mapping[str, Any] = config.get("vision_config") or {}

    def first(*names: str) -> int:
        found = next((vision[name] for name in names if isinstance(vision.get(name), int)), 0)
        return int(found)

    layers = first("depth", "num_hidden_layers", "num_layers")
    hidden = first("embed_dim", "hidden_size")  # Qwen2-VL: `hidden_size` is the language model's
    intermediate = first("intermediate_size") or int(vision.get("mlp_ratio") or 4) * hidden
    return Tower(layers, hidden, intermediate) if layers and hidden else None


FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)  # of a block, as configurations say


@dataclass(frozen=True)
class Sizes:
    """What of a decoder's architecture decides memory. linear: (in, out) of each linear layer of one block, by name.
    others: weights beside the decoder, of what reads images."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_width: int
    linear: Mapping[str, tuple[int, int]]
    tied: bool
    others: int = 0
    qk_norm: bool = False
    experts: int = 1

    @property
    def block_linear(self) -> int:
        """Weights of one block's linear layers."""
        return sum(rows * columns for rows, columns in self.linear.values())

    @property
    def queries(self) -> int:
        """Width of all heads' queries."""
        return self.linear["q_proj"][1]

    @property
    def parameters(self) -> int:
        """Weights of the whole model; norms counted as two vectors a block."""
        block = self.block_linear + 2 * self.hidden
        heads = 1 if self.tied else 2
        return self.layers * block + heads * self.vocabulary * self.hidden + self.hidden + self.others

    def adapter_parameters(self, adapter: Adapter) -> int:
        """r (in + out) for each layer that gets LoRA; DoRA has a magnitude for each output too. Experts are stacked in
        tensors of their own, which get none."""
        total = 0
        for name, (rows, columns) in self.linear.items():
            if self.experts > 1 and name in FEED_FORWARD:
                continue
            one = adapter.rank * (rows + columns) + (columns if adapter.kind == "dora" else 0)
            total += one * sum(
                _names(adapter.targets, name, layer) and not _names(adapter.exclude, name, layer)
                for layer in range(self.layers)
            )
        return total

    def kv_bytes(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_width * BYTES[dtype]


def _names(targets: str | tuple[str, ...], name: str, layer: int) -> bool:
    """Whether targets name the linear layer `name` of one block: by its name, by the end of its path or all of it (as
    peft writes them), or by a regular expression for the path."""
    if targets == "all-linear":
        return True
    paths = [f"model.layers.{layer}.{part}.{name}" for part in ("self_attn", "mlp")]
    if isinstance(targets, str) and not re.fullmatch(r"[\w.]+", targets):
        return any(re.fullmatch(targets, path) for path in paths)
    for word in (targets,) if isinstance(targets, str) else targets:
        *before, last = word.split(".")
        if last == name and all(int(part) == layer for part in before if part.isdecimal()):
            return True
    return False


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError."""
    file = folder / "config.json"
    if not file.is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        remedy = "this is an adapter: give it as `model.adapter`, and its base as `model.path`" if is_adapter else None
        raise ModelError(
            "the folder has no config.json", where=folder, remedy=remedy or "give a folder in transformers layout"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"not valid JSON: {error}", where=file, remedy="copy the file again") from None
    if not isinstance(config, dict):
        raise ModelError("must hold a JSON object", where=file, remedy="copy the file again")
    return config


def sizes_of(config: Mapping[str, Any], vocabulary: int | None = None) -> Sizes | None:
    """Sizes from a transformers configuration; None where it is no plain decoder that we can count.

    vocabulary: the tokenizer's, where the configuration (of a model from scratch) has none.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    numbers = [text.get(name) for name in names]
    vocab = text.get("vocab_size") or vocabulary
    if not all(isinstance(n, int) and n > 0 for n in numbers) or not isinstance(vocab, int):
        return None
    layers, hidden, intermediate, heads = (int(n) for n in numbers if n)
    head = int(text.get("head_dim") or hidden // heads)
    kv_width = int(text.get("num_key_value_heads") or heads) * head
    return Sizes(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocab,
        kv_width=kv_width,
        linear={
            "q_proj": (hidden, heads * head),
            "k_proj": (hidden, kv_width),
            "v_proj": (hidden, kv_width),
            "o_proj": (heads * head, hidden),
            **_feed_forward(text, hidden, intermediate),
        },
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
        qk_norm=str(text.get("model_type", config.get("model_type"))) in QK_NORMS,
        experts=_experts(text),
    )


def max_positions(config: Mapping[str, Any]) -> int | None:
    """How many positions a transformers configuration has, of whatever architecture; None where it sets no limit. Those
    whose sizes nobody counts here may look positions up in a table (gpt2, opt): beyond its end training would fail."""
    text: Mapping[str, Any] = config.get("text_config") or config
    found = (text.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def _experts(text: Mapping[str, Any]) -> int:
    return next((int(text[name]) for name in EXPERTS if isinstance(text.get(name), int)), 1)


def _feed_forward(text: Mapping[str, Any], hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    experts = _experts(text)
    width = int(text.get("moe_intermediate_size") or intermediate) * experts if experts > 1 else intermediate
    return dict(zip(FEED_FORWARD, ((hidden, width), (hidden, width), (width, hidden)), strict=True))


def human(size: float) -> str:
    for unit, step in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{math.ceil(size / 1024)} KiB"


def count(number: int) -> str:
    for unit, step in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= step:
            return f"{number / step:.1f}{unit}"
    return str(number)
