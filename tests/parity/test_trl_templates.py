"""Tool conversations in real chat templates (TRL's copies of them): what is rendered and scored is what transformers
renders and marks for the same messages in the form that the template wants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from align.data.formats.messages import read_messages
from align.data.formats.tools import schemas_of
from align.data.records import Conversation
from align.data.render import draft
from align.data.scratch import train_tokenizer
from align.data.tokenizer import load_tokenizer
from align.recipe.inputs import TokenizerFromScratch

transformers_templates = pytest.importorskip("transformers.utils.chat_template_utils")

TRL = find_spec("trl")  # its files are read; importing it takes seconds
TEMPLATES = Path(str(TRL and TRL.origin)).parent / "chat_templates"
NAMES = [
    "qwen3_training", "qwen2_5_training", "qwen3_5_think_training", "glm4moe_training", "gptoss_training",
    "lfm2_v2_training", "deepseekv3_training", "deepseek_r1_distill_training", "nemotron_3_nano_training",
]  # fmt: skip
PARAMETERS = {"type": "object", "properties": {"q": {"type": "string", "description": "what"}}, "required": ["q"]}
FUNCTION = {"name": "find", "description": "finds", "parameters": PARAMETERS}
ARGUMENTS = {"q": "cats"}
AS_TEXT = ("deepseek_r1_distill_training",)
NO_CONTENT = ("deepseek_r1_distill_training",)
THINKING = ("gptoss_training",)


def canonical(name: str) -> list[dict[str, Any]]:
    arguments: Any = json.dumps(ARGUMENTS) if name in AS_TEXT else ARGUMENTS
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    key = "thinking" if name in THINKING else "reasoning_content"
    return [
        {"role": "user", "content": "find cats"},
        {"role": "assistant", "content": None if name in NO_CONTENT else "", "tool_calls": [call], key: "I look"},
        {"role": "tool", "content": "3 cats"},
        {"role": "assistant", "content": "three"},
    ]


def spellings() -> Iterator[tuple[Any, Any]]:
    call = {"name": "find", "arguments": ARGUMENTS}
    user, tool, last = {"from": "human", "value": "find cats"}, {"from": "observation", "value": "3 cats"}, "three"
    yield [
        {"role": "user", "content": "find cats"},
        {"role": "assistant", "content": None, "reasoning": "I look",
         "tool_calls": [{"type": "function", "function": call | {"arguments": json.dumps(ARGUMENTS)}}]},
        {"role": "tool", "content": "3 cats"},
        {"role": "assistant", "content": last},
    ], [FUNCTION]  # fmt: skip
    yield [user, {"from": "function_call", "value": json.dumps(call), "thinking": "I look"}, tool,
           {"from": "gpt", "value": last}], json.dumps([FUNCTION])  # fmt: skip
    used = {"type": "tool_use", "name": "find", "input": ARGUMENTS}
    yield (
        [
            {"role": "user", "content": "find cats"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "I look"}, used]},
            {"role": "user", "content": [{"type": "tool_result", "content": "3 cats"}]},
            {"role": "assistant", "content": [{"type": "text", "text": last}]},
        ],
        [{"name": "find", "description": "finds", "input_schema": PARAMETERS}],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("templates")
    (root / "text.jsonl").write_text('{"text": "a few words"}\n' * 20)
    train_tokenizer(TokenizerFromScratch(train_on=str(root / "text.jsonl"), vocab_size=300), root / "tokenizer")
    return root / "tokenizer"


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_renders_as_transformers_renders_the_templates_own_form(name: str, folder: Path) -> None:
    path = TEMPLATES / f"{name}.jinja"
    tokenizer = load_tokenizer(folder, chat_template=str(path))
    today = {"strftime_now": lambda form: "today"} if "strftime_now" in path.read_text() else {}
    tokenizer.require_template().variables.update(today)
    [text], [marked] = transformers_templates.render_jinja_template(
        conversations=[canonical(name)],
        tools=[{"type": "function", "function": FUNCTION}],
        chat_template=path.read_text(),
        return_assistant_tokens_mask=True,
        **tokenizer.named_tokens,
        **today,
    )
    assert "cats" in text and marked
    for messages, tools in spellings():
        pieces = draft(Conversation((), read_messages(messages), schemas_of(tools)), tokenizer).trunk
        assert "".join(piece.text for piece in pieces) == text
        assert "".join(p.text for p in pieces if p.scored) == "".join(text[a:b] for a, b in marked)
