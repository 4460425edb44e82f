"""Tokenizer classes of transformers that rebuild normalizer and pre-tokenizer in code, whatever tokenizer.json says.

From version 5 on, AutoTokenizer takes vocabulary, merges and post-processor from tokenizer.json and the rest from the
class, where the class has a constructor of its own. Trainer, engine and users load with AutoTokenizer, so ours must do
the same. Each entry is read from transformers 5.19.0, models/<name>/tokenization_<name>.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen2(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")), use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def _llama(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "first" if not config.get("legacy", False) else "always"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))


_CLASSES = {"Qwen2Tokenizer": _qwen2, "LlamaTokenizer": _llama}


def rebuild(backend: Tokenizer, config: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
    """Bring a tokenizer read from tokenizer.json to what AutoTokenizer would build. Changes `backend` in place."""
    name = (config.get("tokenizer_class") or model_config.get("tokenizer_class") or "").removesuffix("Fast")
    if name in _CLASSES and isinstance(backend.model, BPE):
        _CLASSES[name](backend, config)
