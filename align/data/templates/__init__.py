"""Training templates that `chat_template:` knows by name, one .jinja file each.

chatml  ours: <|im_start|>role, text, <|im_end|>; the header is not scored, text and <|im_end|> are, the newline is not.
        Content is text, or parts of it; parts that are media need `template_args: {placeholders: {image: ...}}`, which
        a model from scratch has in its template.
qwen3   Qwen 3's format with generation markers and every turn's reasoning kept (empty where there is none), so that a
        conversation's turns do not change as it grows. Single turns render as in Qwen's own template. With
        `template_args: {enable_thinking: false}` the empty reasoning is part of the prompt and not scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

NAMED: dict[str, str] = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.jinja"))
}

CHATML = NAMED["chatml"]


def chatml(placeholders: Mapping[str, str]) -> str:
    """Our template; placeholders: what stands for a medium, by its kind."""
    if not placeholders:
        return CHATML
    return f"{{%- set placeholders = {json.dumps(dict(placeholders))} %}}\n{CHATML}"
