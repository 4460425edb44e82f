"""A tokenizer from scratch: byte-level BPE trained on the recipe's own data, with our ChatML template.

Digits are split one by one: otherwise a BPE makes `47` one token and `132` two, which defeats arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from align.data.rows import Row
from align.data.sources import apply_columns, open_source
from align.data.templates import chatml
from align.errors import DataError
from align.recipe.families import Family
from align.recipe.inputs import TokenizerFromScratch

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
_HEADERS = ("system\n", "user\n", "assistant\n")  # what the template writes around every message
_NOT_TEXT = frozenset({"role", "from", "id", "type"})


def train_tokenizer(
    spec: TokenizerFromScratch,
    folder: str | Path,
    *,
    data_folder: Path | None = None,
    cache: Path | None = None,
    family: Family | None = None,
) -> None:
    """Train on the text of `spec.train_on` and write a tokenizer that AutoTokenizer, vLLM and we load.

    Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja; equal data give equal
    files. data_folder: what relative paths refer to. family: of a model that reads images, whose tokens it gets.
    Raises DataError where there is no text.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if spec.split_digits else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    marks = family.marks if family else ()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (PAD, START, END, *marks)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = list(_texts(spec, data_folder, cache))
    if not texts:
        raise DataError("no text to train a tokenizer on", where=spec.train_on[0].path, remedy="check `train_on`")
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    _write(tokenizer, folder, chatml(family.placeholders if family else {}))


def _write(tokenizer: Tokenizer, folder: Path, template: str) -> None:
    named = {"eos_token": END, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): {
                "content": t.content,
                "lstrip": t.lstrip,
                "normalized": t.normalized,
                "rstrip": t.rstrip,
                "single_word": t.single_word,
                "special": t.special,
            }
            for i, t in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        **named,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(named, indent=2),
        "chat_template.jinja": template,
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _texts(spec: TokenizerFromScratch, folder: Path | None, cache: Path | None) -> Iterator[str]:
    """Every text of every row (of the mapped columns where there are `columns:`), and the template's headers."""
    for source in spec.train_on:
        opened = open_source(source, folder=folder, cache=cache, limit=source.limit)
        items = list(opened.rows(source.limit))
        rows = [item for item in items if isinstance(item, Row)]
        bad = next((item for item in items if not isinstance(item, Row)), None)
        if bad is not None and source.on_bad_row == "error":
            raise DataError(bad.reason, where=bad.origin, remedy="correct this row, or set `on_bad_row: skip`")
        for values in apply_columns(rows, source):
            wanted = {k: v for k, v in values.items() if k in source.columns} if source.columns else values
            yield from _strings(wanted)
            yield from _HEADERS


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in _NOT_TEXT:
                yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
