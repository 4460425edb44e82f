"""What makes a model folder another model than it seems to be, found without torch.

Folders that peft was merged in: the adapter may lie there still, and a head that it trained apart from the embedding
may be stored beside it under a configuration that ties the two. Folders that were written twice: the weights of before
may lie there still.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import ModelError
from align.recipe.chat_files import read_settings

_SINGLE, _INDEX, _SHARDS = "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"
_HEAD, _EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight")


def refuse_adapter_inside(folder: Path) -> None:
    """Raise ModelError for an adapter among a model's own files: transformers puts it on the weights as it loads them,
    a second time where they were merged, and other engines do not."""
    if (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        raise ModelError(
            "the folder holds an adapter beside the model (adapter_config.json): transformers puts it on the weights, "
            "a second time where they were merged with it",
            where=folder,
            remedy="move adapter_config.json and adapter_model.safetensors to a folder of their own, and name that by "
            "`model.adapter` where the weights are without it",
        )


def refuse_two_checkpoints(folder: Path) -> None:
    """Raise ModelError where whole weights lie beside others in parts: transformers reads the whole ones, engines those
    of the index, or without one all of them."""
    parts = sorted(path.name for path in folder.glob(_SHARDS))
    named = read_settings(folder / _INDEX).get("weight_map")
    if isinstance(named, dict):
        parts = sorted({str(name) for name in named.values()})
    if (folder / _SINGLE).is_file() and parts and _SINGLE not in parts:
        raise ModelError(
            f"the folder holds two sets of weights, {_SINGLE} and {parts[0]}"
            + (f" with {len(parts) - 1} more" if len(parts) > 1 else "")
            + ": transformers reads the one, and engines the other or both",
            where=folder,
            remedy=f"take out what is older (with the parts their {_INDEX})",
        )


def refuse_untied_head(folder: Path) -> None:
    """Raise ModelError where config.json says that head and embedding are one, and the weights hold two that differ."""
    if read_settings(folder / "config.json").get("tie_word_embeddings") is not True:
        return
    stored = {name: (dtype, values) for name, dtype, values in _stored(folder)}
    embeddings = [name for name in stored if name != _HEAD]
    if _HEAD not in stored or len(embeddings) != 1:
        return
    (dtype, head), (other, embedding) = stored[_HEAD], stored[embeddings[0]]
    if dtype == other and not np.array_equal(head, embedding):
        raise untied_error(folder, _HEAD, embeddings[0])


def untied_error(folder: Path, one: str, other: str) -> ModelError:
    return ModelError(
        f"config.json ties {one} to {other}, and the weights hold two that differ: transformers computes with both, "
        "and engines with one",
        where=folder,
        remedy='write `"tie_word_embeddings": false` into config.json where the head was trained apart (peft leaves '
        f"it at true as it merges), or take {one} out of the weights",
    )


def _stored(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, dtype and bytes of head and embeddings. A file that cannot be read is for its loader to name."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header: dict[str, Any] = json.loads(stream.read(min(length, 1 << 28)))
            for name, entry in header.items():
                if name == _HEAD or name.endswith(_EMBEDDINGS):
                    begin, end = entry["data_offsets"]
                    yield name, entry["dtype"], np.memmap(file, np.uint8, "r", 8 + length + begin, (end - begin,))
        except (OSError, ValueError, struct.error, LookupError, TypeError, AttributeError):
            continue
