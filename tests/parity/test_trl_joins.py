"""Joins and formats of calls in real chat templates (TRL's copies of them), with tokenizers that have their tokens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from align.data.tokenizer import ChatTokenizer
from align.episodes.calls import find_format
from align.episodes.joins import Joins
from align.errors import Unsupported
from tests.chat_families import load_family
from tests.unit.episodes.build import ASKED, SCHEMAS, answer, call, calling, shown

TRL = find_spec("trl")  # its files are read; importing it takes seconds
TEMPLATES = Path(str(TRL and TRL.origin)).parent / "chat_templates"
pytestmark = pytest.mark.skipif(not TEMPLATES.is_dir(), reason="no TRL here")

KNOW_TOOLS = {  # (the family whose tokens it has, the format of its calls)
    "qwen2_5": ("qwen2_5", "hermes"), "qwen3": ("qwen3", "hermes"), "qwen3_vl": ("qwen3", "hermes"),
    "qwen3_instruct_2507": ("qwen3", "hermes"), "qwen3_5_think": ("qwen3", "qwen3_coder"),
    "nemotron_3_nano": ("qwen3", "qwen3_coder"), "llama3_1": ("llama3_1", "llama"), "llama3_2": ("llama3_1", "llama"),
    "glm4moe": ("glm4_5", "glm"), "lfm2_v2": ("qwen3", "pythonic"),
}  # fmt: skip
KNOW_NONE = {
    "gemma3": "gemma3", "llama3": "llama3_1", "phi3_5": "phi4_mini", "deepseekv3": "deepseek_v3",
    "deepseek_r1_distill": "deepseek_v3",
}  # fmt: skip


def tokenizer_of(folder: Path, name: str, family: str) -> ChatTokenizer:
    return load_family(folder, family, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "family", "wanted"), [(n, *w) for n, w in KNOW_TOOLS.items()])
def test_real_templates_that_know_tools_are_proved(tmp_path: Path, name: str, family: str, wanted: str) -> None:
    tokenizer = tokenizer_of(tmp_path, name, family)
    assert find_format(tokenizer, SCHEMAS).name == wanted
    joins = Joins(tokenizer, SCHEMAS)
    joins.prove()
    joined = shown(tokenizer, joins.join([ASKED, calling(call("find", 0, query="keys"))], [answer("hall")], None))
    whole = [ASKED, calling(call("find", 0, query="keys")), answer("hall")]
    assert shown(tokenizer, joins.opening(whole)).endswith(joined) and "hall" in joined


@pytest.mark.parametrize(("name", "family"), KNOW_NONE.items())
def test_real_templates_that_know_none_are_refused_or_given_text(tmp_path: Path, name: str, family: str) -> None:
    tokenizer = tokenizer_of(tmp_path, name, family)
    with pytest.raises(Unsupported, match=r"tools_in: prompt"):
        Joins(tokenizer, SCHEMAS).prove()
    Joins(tokenizer, SCHEMAS, tools_in="prompt").prove()
