"""A tokenizer from the recipe's own data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from align.data.scratch import train_tokenizer
from align.data.tokenizer import load_tokenizer
from align.errors import DataError
from align.recipe.inputs import TokenizerFromScratch
from tests.unit.data.build import turns, write_jsonl

ROWS = [{"messages": turns(f"What is {a}+{b}?", f"{a}+{b} = {a + b}.")} for a in range(10, 40) for b in range(10, 40)]


def test_digits_are_split_and_special_tokens_are_distinct(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    train_tokenizer(TokenizerFromScratch(train_on=str(data), vocab_size=320), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("132")] == ["1", "3", "2"]
    assert tokenizer.decode([tokenizer.eos_id or 0], False) == "<|im_end|>"
    assert len({tokenizer.pad_id, tokenizer.eos_id, *tokenizer.encode("<|im_start|>")}) == 3
    assert tokenizer.bos_id is None and tokenizer.vocab_size <= 320 and tokenizer.text_prefix == ()
    assert len(tokenizer.encode("assistant")) == 1, "the template's words are among the texts"
    assert (
        tokenizer.decode(tokenizer.encode("bytes of any text: 日本語 \x00 😊")) == "bytes of any text: 日本語 \x00 😊"
    )


def test_digits_are_merged_where_the_recipe_says_so(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "the year 2024"}] * 9)
    spec = TokenizerFromScratch(train_on=str(data), vocab_size=320, split_digits=False)
    train_tokenizer(spec, tmp_path / "t")
    assert len(load_tokenizer(tmp_path / "t").encode(" 2024")) == 1


def test_the_same_data_give_the_same_files_in_another_process(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    code = (
        "from align.data.scratch import train_tokenizer as t\n"
        "from align.recipe.inputs import TokenizerFromScratch as S\n"
        f"t(S(train_on={str(data)!r}, vocab_size=400), {str(tmp_path / 'one')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    train_tokenizer(TokenizerFromScratch(train_on=str(data), vocab_size=400), tmp_path / "two")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert set(one) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}


def test_mapped_columns_are_the_only_text_trained_on(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"q": "zyzzyva", "noise": "quixotic"}] * 50)
    spec = TokenizerFromScratch.model_validate(
        {"train_on": {"path": str(data), "columns": {"prompt": "q"}}, "vocab_size": 300}
    )
    train_tokenizer(spec, tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert len(tokenizer.encode("zyzzyva")) == 1 and len(tokenizer.encode("quixotic")) > 4


def test_data_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer(TokenizerFromScratch(train_on=str(tmp_path / "data.jsonl")), tmp_path / "t")
