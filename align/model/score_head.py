"""A language model with a score head: the layout of transformers' AutoModelForSequenceClassification.

The head is one linear layer `score` [K, D] without bias (K = 1 of a reward model), read from a sequence classifier's
checkpoint and drawn from a seed on a causal language model's, whose own head is left out. It is kept in float32: an
optimizer would round away most steps of a bfloat16 vector.

Beside an adapter, peft keeps the head's weights and nothing of what they mean: `score_head.json` in its folder says so.

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
from align.model.adapter_config import HEAD, weights_file
from align.model.load import from_folder, require_complete
from align.model.scoring_class import scoring_class
from align.model.scratch import tokenizer_facts
from align.recipe.labels import Labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT = f"{HEAD}.weight"
MEANING = "score_head.json"
LANGUAGE_HEAD = ("lm_head.", "language_model.lm_head.")  # the second of checkpoints that kept older names
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
    labels: Labels | None = None,
    attention: str = "auto",
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> PreTrainedModel:
    """Load `folder`, a causal language model or a sequence classifier, with its score head.

    seed: of the head where the checkpoint has none. labels: what its outputs mean; None: what the folder says, and of a
    language model one score. Returns as `load_model` does; the configuration has these labels and the tokenizer's
    padding token.
    Raises ModelError where the folder is no such model, has other labels, lacks weights, has a head of another layout,
    or no padding token.
    """
    folder = Path(folder)
    found = folder_labels(folder)
    scored, labels = found is not None, _agreed(folder, found, labels)
    model, info = from_folder(
        scoring_class(folder),
        folder,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        num_labels=len(labels.names),
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
    require_complete(folder, info, fresh=(WEIGHT,) if fresh else (), left_out=LANGUAGE_HEAD)
    head.float()
    if fresh:
        draw(head, model.config, seed)
    for key, value in labels.to_config().items():
        setattr(model.config, key, {int(k): v for k, v in value.items()} if key == "id2label" else value)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = padding_token(folder, model.config)
    model.config.use_cache = False
    model.eval()
    model.to(device)
    return model


def folder_labels(folder: Path) -> Labels | None:
    """What the outputs of a sequence classifier mean, by its config.json; None for another model."""
    file = folder / "config.json"
    if not file.is_file():
        return None  # the loader says what is missing
    config = json.loads(file.read_text(encoding="utf-8"))
    names = [str(name) for name in config.get("architectures") or ()]
    return Labels.from_config(config) if any(name.endswith(CLASSIFIER) for name in names) else None


def scoring(folder: Path) -> bool:
    """Whether config.json names a sequence classifier: a reward model, or one of labels."""
    return folder_labels(folder) is not None


def _agreed(folder: Path, found: Labels | None, wanted: Labels | None) -> Labels:
    """The labels of a head that `folder` may have. Raises ModelError where they are not those that are wanted."""
    if found is None or wanted is None:
        return wanted or found or Labels.numbered(1)
    if not wanted.agrees_with(found):
        raise ModelError(
            f"the model is a classifier of {len(found.names)} labels, {found.words}, and a {wanted.words} is wanted",
            where=folder / "config.json",
            remedy="start from a causal language model, or from a classifier with the same labels in the same order",
        )
    names = found.names if wanted.generic else wanted.names
    return Labels(names, wanted.problem or found.problem)


def model_labels(model: Any) -> Labels:
    """What the outputs of a loaded model's score head mean."""
    return Labels.from_config({**model.config.to_dict(), "id2label": model.config.id2label})


# ------------------------------------------------------------------------------------------------- beside an adapter


def write_meaning(folder: Path, model: Any) -> None:
    """Say in an adapter's folder what its head's outputs mean. A reward model's one score needs no word."""
    labels = model_labels(model)
    if labels != Labels.numbered(1):
        text = json.dumps(labels.to_config(), indent=2, ensure_ascii=False)
        (folder / MEANING).write_text(text + "\n", encoding="utf-8")


def adapter_labels(folder: Path) -> Labels:
    """What the outputs of the head in an adapter's folder mean; where nobody said, numbered ones of its width."""
    from safetensors import safe_open

    if (folder / MEANING).is_file():
        return Labels.from_config(json.loads((folder / MEANING).read_text(encoding="utf-8")))
    with safe_open(weights_file(folder), framework="pt") as tensors:
        widths = [tensors.get_slice(name).get_shape()[0] for name in tensors.keys() if name.endswith(f".{WEIGHT}")]  # noqa: SIM118
    return Labels.numbered(widths[0] if widths else 1)


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
    config |= model_labels(model).to_config()
    pad = model.config.get_text_config().pad_token_id
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["pad_token_id"] = pad
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
