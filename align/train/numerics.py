"""What log-probabilities depend on beside weights and tokens: values that are stored are named by it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.model.load import resolve_dtype

if TYPE_CHECKING:
    import torch

    from align.train.spec import TrainerSpec

# Settings of `model:` that act through files or tokens, whose content is compared instead, or through memory alone.
_ELSEWHERE = frozenset(
    {"path", "revision", "adapter", "config", "tokenizer", "chat_template", "template_args", "gradient_checkpointing"}
)

# What else decides which tokens are computed together, and how.
_PACKING = ("data/microbatches.py", "data/packing.py", "data/prefixes.py", "protocols/trees.py", "types.py")


def numerics(spec: TrainerSpec, device: torch.device) -> dict[str, Any]:
    """Plain JSON. A setting of the model that is new to this list counts. Packing, threads and seed do not: a fresh
    adapter starts as the base, whatever its seed."""
    model = spec.model.model_dump(mode="json")
    return {
        "model": {key: value for key, value in model.items() if key not in _ELSEWHERE},
        "adapter": spec.adapter_config.model_dump(mode="json", exclude={"dropout"}),
        "as_trained": None if spec.as_trained is None else spec.as_trained.model_dump(mode="json"),
        "temperature": spec.temperature,
        "dtype": str(resolve_dtype(spec.model.dtype, str(device))),
        "device": device.type,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "code": _code_version(),
    }


@lru_cache(maxsize=1)
def _code_version() -> str:
    """Hash of the source that packs and computes: whoever changes it need not remember to raise a number."""
    package = Path(__file__).resolve().parents[1]
    files = [*package.glob("model/**/*.py"), *package.glob("train/**/*.py"), *(package / name for name in _PACKING)]
    h = hashlib.sha256()
    for file in sorted(files):
        h.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return h.hexdigest()
