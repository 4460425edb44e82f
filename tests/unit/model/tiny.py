"""Tiny models on disk for the tests of model and export: real tokenizer files, real configs, weights from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from align.model.scratch import write_base
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "initializer_range": 0.1,
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the answer is forty two", "what is six times seven"] * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",'
        ' "pad_token": {"__type": "AddedToken", "content": "<|pad|>", "special": true}}'
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def recipe_model(config: dict[str, Any], dtype: str = "auto") -> Model:
    return Model.model_validate(
        {"config": config, "tokenizer": {"train_on": "unused.jsonl", "vocab_size": 300}, "dtype": dtype}
    )


def write_tiny(folder: Path, config: dict[str, Any] = QWEN3, *, seed: int = 0, dtype: str = "auto") -> Path:
    write_tokenizer(folder)
    write_base(recipe_model(config, dtype), folder, seed)
    return folder


def lora(**changes: Any) -> Adapter:
    return Adapter(**({"rank": 4, "alpha": 8.0} | changes))


def train_a_little(peft: Any, seed: int = 0, scale: float = 0.2) -> None:
    """Give every lora_B random values, as training would: a fresh adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    """Logits f32[2, 12, V] on fixed random tokens."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids.to(next(model.parameters()).device)).logits
    return result.float()
