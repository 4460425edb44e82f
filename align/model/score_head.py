"""A language model with a score head: the layout of transformers' AutoModelForSequenceClassification with one label.

The head is one linear layer `score` [1, D] without bias, read from a sequence classifier's checkpoint and drawn from a
seed on a causal language model's, whose own head is left out. It is kept in float32: an optimizer would round away most
steps of a bfloat16 vector.

We score the last token of a sequence by its index. transformers looks for the last token that is not padding, so the
configuration that is written names the tokenizer's padding token, and a sequence must not end in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.errors import ModelError
from align.model.adapter_config import HEAD
from align.model.load import from_folder, require_complete
from align.model.scratch import tokenizer_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT = f"{HEAD}.weight"
LANGUAGE_HEAD = "lm_head."
CLASSIFIER = "ForSequenceClassification"
# heads of other layouts: a checkpoint that has one was made to score, but not by `score`
FOREIGN_HEADS = ("score.", "v_head.", "value_head.", "classifier.", "reward_head.", "regression_layer.")


def has_score_head(model: Any) -> bool:
    return isinstance(getattr(model, HEAD, None), nn.Module)


def trained_head(model: Any) -> nn.Linear:
    """The head that scores: peft's trained copy, where it made one."""
    head: Any = getattr(model, HEAD)
    copies = getattr(head, "modules_to_save", None)
    found: nn.Linear = head if copies is None else copies["default"]
    return found


def score(model: Any, hidden: Tensor) -> Tensor:
    """f32[S, K] scores of hidden states [S, D], in the head's dtype; a trained copy that peft put beside it serves."""
    head: nn.Module = getattr(model, HEAD)
    scores: Tensor = head(hidden.to(next(head.parameters()).dtype))
    return scores


def load_score_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    seed: int,
    attention: str = "auto",
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> PreTrainedModel:
    """Load `folder`, a causal language model or a sequence classifier with one label, with its score head.

    seed: of the head where the checkpoint has none. Returns as `load_model` does; the configuration has one label and
    the tokenizer's padding token.
    Raises ModelError where the folder is no such model, lacks weights, has a head of another layout, or no padding
    token.
    """
    from transformers import AutoModelForSequenceClassification

    folder = Path(folder)
    scored = is_reward_model(folder)
    model, info = from_folder(
        AutoModelForSequenceClassification,
        folder,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        num_labels=1,
    )
    head: Any = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise ModelError(
            f"transformers' {type(model).__name__} has no linear layer `{HEAD}` for scores",
            where=folder,
            remedy="choose a decoder-only language model, such as Qwen or Llama",
        )
    _refuse_foreign_head(folder, info)
    fresh = not scored and WEIGHT in info["missing_keys"]
    require_complete(folder, info, fresh=(WEIGHT,) if fresh else (), left_out=(LANGUAGE_HEAD,))
    head.float()
    if fresh:
        draw(head, model.config, seed)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = padding_token(folder, model.config)
    model.config.use_cache = False
    model.eval()
    model.to(device)
    return model


def is_reward_model(folder: Path) -> bool:
    """Whether config.json names a sequence classifier. Raises ModelError for one with other than one label."""
    file = folder / "config.json"
    if not file.is_file():
        return False  # the loader says what is missing
    config = json.loads(file.read_text(encoding="utf-8"))
    names = [str(name) for name in config.get("architectures") or ()]
    if not any(name.endswith(CLASSIFIER) for name in names):
        return False
    labels = len(config.get("id2label") or {0: "", 1: ""})  # transformers' own default is two
    if labels != 1:
        raise ModelError(
            f"the model is a classifier of {labels} labels, not a reward model",
            where=file,
            remedy="start from a causal language model, or from a classifier with one label",
        )
    return True


def _refuse_foreign_head(folder: Path, info: dict[str, Any]) -> None:
    odd = [name for name in sorted(info["unexpected_keys"]) if name.startswith(FOREIGN_HEADS)]
    if odd:
        raise ModelError(
            f"the checkpoint has a score head of another layout ({', '.join(odd[:4])}) than transformers' {WEIGHT}",
            where=folder,
            remedy="start from its causal language model, or save it as AutoModelForSequenceClassification",
        )


def draw(head: nn.Linear, config: Any, seed: int) -> None:
    """Normal, with the architecture's own standard deviation, as transformers draws it; from `seed` alone."""
    spread = float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(spread * torch.randn(head.weight.shape, generator=generator))


def padding_token(folder: Path, config: Any) -> int:
    """Id of the tokenizer's padding token; the configuration's in a folder without tokenizer. Raises ModelError."""
    text = config.get_text_config()
    found = tokenizer_facts(folder)["pad_token_id"] if (folder / "tokenizer.json").is_file() else text.pad_token_id
    if found is None or not 0 <= found < text.vocab_size:
        raise ModelError(
            "the tokenizer has no padding token" if found is None else f"the padding token {found} has no embedding",
            where=folder,
            remedy="transformers finds the end of a sequence by it: set `pad_token` in tokenizer_config.json to a "
            "token that ends no completion",
        )
    return int(found)


def edit_score_config(file: Path, model: Any) -> None:
    """Have a config.json that was copied from a causal language model describe the loaded `model` with its head."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["architectures"] = [type(model).__name__]
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    pad = model.config.get_text_config().pad_token_id
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["pad_token_id"] = pad
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
