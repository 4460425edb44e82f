"""`thinking: keep | last | none`: which turns keep their thoughts, wherever these stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.data.prepare import prepare
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from tests.unit.data.build import FORGETS_THOUGHTS, UNMARKED_CHATML, source, with_template, write_jsonl

BESIDE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def conversation(inside: bool) -> dict[str, Any]:
    """Two turns that think, in their text or beside it."""

    def thought(n: int) -> dict[str, Any]:
        if inside:
            return {"role": "assistant", "content": f"<think>\nhm {n}\n</think>\n\nanswer {n}"}
        return {"role": "assistant", "content": f"answer {n}", "reasoning_content": f"hm {n}"}

    return {"messages": [{"role": "user", "content": "a"}, thought(1), {"role": "user", "content": "b"}, thought(2)]}


def texts(path: Path, rows: list[dict[str, Any]], kind: Any, tokenizer: ChatTokenizer, **options: Any) -> list[str]:
    made = prepare((source(write_jsonl(path / "data.jsonl", rows), **options),), kind, tokenizer, seed=0)
    return [
        tokenizer.decode(segment.token_ids, skip_special_tokens=False)
        for item in made.items
        for segment in (item.trunk, *item.branches)
    ]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("thinking", "kept"), [(None, (1, 2)), ("keep", (1, 2)), ("last", (2,)), ("none", ())])
def test_turns_keep_the_thoughts_that_are_asked_for(
    tmp_path: Path, folder: Path, inside: bool, thinking: str | None, kept: tuple[int, ...]
) -> None:
    tokenizer = with_template(folder, UNMARKED_CHATML if inside else BESIDE)
    [text] = texts(tmp_path, [conversation(inside)], "conversation", tokenizer, thinking=thinking)
    assert [n for n in (1, 2) if f"hm {n}" in text] == list(kept)
    assert "answer 1<|im_end|>" in text and "answer 2<|im_end|>" in text
    assert text.count("<think>") == text.count("</think>") == len(kept)


def test_of_a_pair_both_sides_are_last_turns(tmp_path: Path, folder: Path) -> None:
    tokenizer = with_template(folder, UNMARKED_CHATML)
    messages = conversation(True)["messages"]
    row = {
        "prompt": messages[:3],
        "chosen": [{"role": "assistant", "content": "<think>good</think>\nyes"}],
        "rejected": [{"role": "assistant", "content": "<think>bad</think>\nno"}],
    }
    prompt, chosen, rejected = texts(tmp_path, [row], "pair", tokenizer, thinking="last")
    assert "hm 1" not in prompt and "answer 1" in prompt and "good" in chosen and "bad" in rejected
    prompt, chosen, rejected = texts(tmp_path, [row], "pair", tokenizer, thinking="none")
    assert chosen.startswith("yes") and rejected.startswith("no")


def test_plain_text_loses_them_too_and_prompts_those_of_earlier_turns(tmp_path: Path, folder: Path) -> None:
    tokenizer = with_template(folder, UNMARKED_CHATML)
    row = {"prompt": "2+2?", "completion": "let me see</think>\n4, <think>sure?</think>yes"}
    assert texts(tmp_path, [row], "conversation", tokenizer, thinking="none")[0].startswith("2+2?4, yes")
    rows = [{"prompt": conversation(True)["messages"][:3]}]
    made = prepare((source(write_jsonl(tmp_path / "p.jsonl", rows), thinking="none"),), "prompt", tokenizer, seed=0)
    assert "hm 1" not in tokenizer.decode(made.items[0].token_ids)


def test_thoughts_that_are_to_be_kept_and_are_not_rendered_are_an_error(tmp_path: Path, folder: Path) -> None:
    tokenizer = with_template(folder, FORGETS_THOUGHTS.replace("(thought)", "").replace("loop.last", "false"))
    with pytest.raises(DataError, match="`thinking: keep`, and the chat template does not render") as error:
        texts(tmp_path, [conversation(False)], "conversation", tokenizer, thinking="keep")
    assert "data.jsonl:1" in str(error.value) and "model.chat_template" in str(error.value)


def test_the_key_without_effect_is_told_and_what_went_is_counted(tmp_path: Path, folder: Path) -> None:
    tokenizer = with_template(folder, UNMARKED_CHATML)
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

    def said(rows: list[dict[str, Any]], thinking: str) -> str:
        path = write_jsonl(tmp_path / "data.jsonl", rows)
        return "\n".join(prepare((source(path, thinking=thinking),), "conversation", tokenizer, seed=0).report.summary)

    assert "`thinking: none` has no effect: no row has thoughts" in said([plain], "none")
    assert "thoughts: 1 row has some, 1 lost some or all" in said([plain, conversation(True)], "last")
    assert "thoughts" not in said([conversation(True)], "keep")
