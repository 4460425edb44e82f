"""Small files and tokenizers for the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from align.data.prepare import Prepared, prepare
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.protocols.trees import Segment
from align.recipe.inputs import DataSource

UNMARKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ASKS_UNASKED = (  # the first Llama 3 template: the next header stands there whether asked for or not
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n\\n' }}"
)

FORGETS_THOUGHTS = (  # like Qwen 3: only the last assistant turn keeps its reasoning
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '(thought)' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path: Path | str, **options: Any) -> DataSource:
    return DataSource(path=str(path), **options)


def prepared(
    tmp_path: Path, rows: Sequence[dict[str, Any]], kind: Any, tokenizer: ChatTokenizer, **options: Any
) -> Any:
    """Rows written to data.jsonl and prepared. max_length and other keys of a source are `options`."""
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    return prepare((source(path, **options),), kind, tokenizer, seed=0)


def with_template(folder: Path, template: str) -> ChatTokenizer:
    return load_tokenizer(folder, chat_template=template)


def text(tokenizer: ChatTokenizer, segment: Segment) -> str:
    return tokenizer.decode(segment.token_ids, skip_special_tokens=False)


def scored(tokenizer: ChatTokenizer, segment: Segment) -> str:
    return tokenizer.decode(segment.token_ids[segment.loss_mask], skip_special_tokens=False)


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages that alternate between user and assistant."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


__all__ = ["Prepared", "prepared", "scored", "source", "text", "turns", "with_template", "write_jsonl"]
