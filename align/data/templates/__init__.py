"""Training templates that `chat_template:` knows by name, one .jinja file each.

chatml  ours: <|im_start|>role, text, <|im_end|>; the header is not scored, text and <|im_end|> are, the newline is not.
qwen3   Qwen 3's format with generation markers and every turn's reasoning kept (empty where there is none), so that a
        conversation's turns do not change as it grows. Single turns render as in Qwen's own template. With
        `template_args: {enable_thinking: false}` the empty reasoning is part of the prompt and not scored.
"""

from __future__ import annotations

from pathlib import Path

NAMED: dict[str, str] = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.jinja"))
}

CHATML = NAMED["chatml"]
