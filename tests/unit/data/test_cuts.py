"""Where prompts end and answers begin, by tokens; and what is left of a row after the cut to max_length."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from align.data.beginnings import common_beginning
from align.data.bounded import encode_bounded
from align.data.prepare import prepare
from align.data.records import RowError
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import DataError
from tests.unit.data.build import UNMARKED_CHATML, prepared, scored, source, text, turns, with_template, write_jsonl

READS_FIRST = "{% if messages[0]['role'] == 'system' %}{% endif %}" + UNMARKED_CHATML
WITH_SYSTEM = (  # Qwen 2.5's: a system turn of its own where there is none
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    + UNMARKED_CHATML
)
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
LEAVES_OUT = (
    "{% for m in messages %}{% if not (loop.first and m['role'] == 'assistant') %}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)


def bpe(merges: list[tuple[str, str]], special: list[str] | None = None) -> ChatTokenizer:
    """A byte-level BPE with exactly these merges, which may reach over the ends of words."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special or [])
    return ChatTokenizer(backend, {}, None)


BYTES = bpe([])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: is it true? A: undoubtedly", "Q: is it true? A: under no condition", "Q: is it true? A:"),
        ("Q: a? A: yes", "Q: a? A: no", "Q: a? A:"),
        ("Q: a?\nA:\nyes", "Q: a?\nA:\nno", "Q: a?\nA:\n"),
        ("It costs 3.14 here", "It costs 3.15 here", "It costs"),
        ("at 12:30 sharp", "at 12:45 sharp", "at"),
        ("I don't know", "I don't", "I don't"),
        ("he said don't", "he said don", "he said"),
        ("wait: cafe\u0301", "wait: cafe", "wait:"),
        ("see 👩\u200d🚀 go", "see 👩\u200d🔬 go", "see"),
        ("问：真的吗？答：毫无疑问", "问：真的吗？答：不", "问：真的吗？答："),
        ("a\n\nb c", "a\n\nd e", "a\n\n"),
    ],
)
def test_a_common_beginning_ends_between_words(chosen: str, rejected: str, prompt: str) -> None:
    assert chosen[: common_beginning(BYTES, chosen, rejected)] == prompt


def test_a_common_beginning_ends_between_tokens_of_both_sides() -> None:
    merged = bpe([(":", "Ġ"), ("?", "Ċ"), ("?Ċ", "A")])  # tokens that reach over what looks like a boundary
    assert common_beginning(merged, "ok? A: yes", "ok? A: no") == len("ok? A: ")
    chosen, rejected = "ok ?\nAha", "ok ?\nBut"  # one side's token `?\nA` holds the boundary
    assert rejected[: common_beginning(merged, chosen, rejected)] == "ok"
    special = bpe([], ["<|end|>", "<|ending|>"])
    chosen, rejected = "one two<|end|>", "one two<|ending|>"
    assert chosen[: common_beginning(special, chosen, rejected)] == "one two"


@pytest.mark.parametrize(
    ("chosen", "rejected", "says"),
    [
        ("abc", "xyz", "do not begin alike"),
        ("abcdef", "abcxyz", "only inside a word"),
        ("abc", "abc", "are the same"),
    ],
)
def test_texts_without_a_common_word_have_no_prompt(chosen: str, rejected: str, says: str) -> None:
    with pytest.raises(RowError, match=says):
        common_beginning(BYTES, chosen, rejected)


def test_what_is_trained_is_the_two_texts_whole(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"chosen": "Q: is it true? A: undoubtedly", "rejected": "Q: is it true? A: under no condition"}
    (pair,) = prepared(tmp_path, [row], "pair", tokenizer).items
    for name, branch in zip(("chosen", "rejected"), pair.branches, strict=True):
        ids = [*pair.trunk.token_ids, *branch.token_ids]
        assert ids == [*tokenizer.encode(row[name]), tokenizer.eos_id]
    (pair,) = prepared(tmp_path, [{**row, "system": "be kind"}], "pair", tokenizer).items
    assert text(tokenizer, pair.trunk).endswith("user\nQ: is it true? A:<|im_end|>\n<|im_start|>assistant\n")


# ------------------------------------------------------------------------------------------------- who speaks first


@pytest.mark.parametrize(
    ("template", "before"),
    [
        ("chatml", "<|im_start|>assistant\n"),
        (READS_FIRST, "<|im_start|>assistant\n"),
        (WITH_SYSTEM, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_a_greeting_is_trained_with_its_header_before_it(
    tmp_path: Path, folder: Path, template: str, before: str
) -> None:
    chat = with_template(folder, template)
    rows = [{"messages": [{"role": "assistant", "content": "hello"}, *turns("b", "c")]}]
    (tree,) = prepared(tmp_path, rows, "conversation", chat).items
    assert text(chat, tree.trunk).startswith(f"{before}hello<|im_end|>")
    assert scored(chat, tree.trunk) == "hello<|im_end|>c<|im_end|>"


def test_a_greeting_is_scored_from_the_generation_prompt_on(tmp_path: Path, folder: Path) -> None:
    chat = with_template(folder, THINKS)
    rows = [{"messages": [{"role": "assistant", "content": "hello"}, *turns("b", "c")]}]
    (tree,) = prepared(tmp_path, rows, "conversation", chat).items
    think = "<think>\n\n</think>\n\n"
    assert scored(chat, tree.trunk) == f"{think}hello<|im_end|>{think}c<|im_end|>"


@pytest.mark.parametrize(
    ("template", "says"), [(ALTERNATES, "roles must alternate"), (LEAVES_OUT, "leaves out turn 0")]
)
def test_a_template_that_has_no_place_for_a_greeting_is_quoted_with_the_turn(
    tmp_path: Path, folder: Path, template: str, says: str
) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "hello"}, *turns("b", "c")]}]
    with pytest.raises(DataError, match=f"turn 0 is the assistant's.*{says}"):
        prepared(tmp_path, rows, "conversation", with_template(folder, template))


@pytest.mark.parametrize("template", ["chatml", READS_FIRST, WITH_SYSTEM])
def test_an_answer_begun_in_the_prompt_is_one_turn_with_what_goes_on(
    tmp_path: Path, folder: Path, template: str
) -> None:
    chat = with_template(folder, template)
    prompt = turns("hi", "Sure, ")
    answer, other = ([{"role": "assistant", "content": c}] for c in ("here", "no"))
    (pair,) = prepared(tmp_path, [{"prompt": prompt, "chosen": answer, "rejected": other}], "pair", chat).items
    opened = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSure, "
    assert text(chat, pair.trunk).endswith(opened)
    assert [scored(chat, b) for b in pair.branches] == ["here<|im_end|>", "no<|im_end|>"]
    row = {"prompt": prompt, "completion": [*answer, *turns("x", "y")]}
    (tree,) = prepared(tmp_path, [row], "conversation", chat).items
    assert scored(chat, tree.trunk) == "here<|im_end|>y<|im_end|>"
    (item,) = prepared(tmp_path, [{"prompt": prompt, "completion": answer}], "prompt", chat).items
    assert chat.decode(item.token_ids, False).endswith(opened) and item.row["reference_answer"] == "here"


def test_an_answer_that_the_template_would_write_otherwise_is_refused(tmp_path: Path, folder: Path) -> None:
    shouts = UNMARKED_CHATML.replace("m['content']", "(m['content'] | upper)")
    row = {"prompt": turns("hi", "Sure, "), "completion": [{"role": "assistant", "content": "here"}]}
    with pytest.raises(DataError, match="does not write it as it stands"):
        prepared(tmp_path, [row], "conversation", with_template(folder, shouts))


# ------------------------------------------------------------------------------------------------- after the cut


def pairs(*ends: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": "q", "chosen": f" {'y' * 60}{a}", "rejected": f" {'y' * 60}{b}"} for a, b in ends]


@pytest.mark.parametrize("too_long", ["right", "left"])
def test_a_pair_that_differs_only_behind_the_cut_is_refused_as_equal(
    tmp_path: Path, tokenizer: ChatTokenizer, too_long: str
) -> None:
    rows = pairs(("A", "B"), ("A", "B"))
    rows[1]["chosen"] = " quite another"
    options: dict[str, Any] = {"too_long": too_long, "max_length": 20, "on_bad_row": "skip"}
    if too_long == "left":  # which cuts the prompt alone: both completions fit
        rows = [{"prompt": "q " * 60, "chosen": " y", "rejected": " y "}, {**rows[1], "prompt": "q", "rejected": " no"}]
        rows[0]["rejected"] = " y"
    made = prepared(tmp_path, rows, "pair", tokenizer, **options)
    (refusal,) = made.report.refused
    assert refusal.origin.endswith(":1") and "chosen and rejected are the same" in refusal.reason
    assert made.report.kept == 1 and made.report.truncated <= 1


def test_a_pair_that_its_template_makes_equal_is_refused_as_equal(tmp_path: Path, folder: Path) -> None:
    trims = UNMARKED_CHATML.replace("m['content']", "(m['content'] | trim)")
    row = {"prompt": turns("hi"), "chosen": turns("", "yes")[1:], "rejected": turns("", "yes ")[1:]}
    with pytest.raises(DataError, match="chosen and rejected are the same, token by token"):
        prepared(tmp_path, [row], "pair", with_template(folder, trims))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, "conversation"),  # one token, which nothing predicts, and EOS behind it is cut
        ({"prompt": "q " * 30, "completion": "a"}, "conversation"),
    ],
)
def test_a_row_of_which_nothing_is_scored_after_the_cut_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, str], kind: str
) -> None:
    with pytest.raises(DataError, match="nothing is left to score"):
        prepared(tmp_path, [row], kind, tokenizer, too_long="right", max_length=1)


def test_a_template_that_marks_no_turn_leaves_nothing_to_learn(tmp_path: Path, folder: Path) -> None:
    marks_users = (
        "{% for m in messages %}{% if m['role'] == 'robot' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="no token of the completion is scored"):
        prepared(tmp_path, [{"messages": turns("a", "b")}], "conversation", with_template(folder, marks_users))


def test_tokens_that_the_model_does_not_know_are_refused_with_both_sizes(tmp_path: Path, folder: Path) -> None:
    larger = tmp_path / "model"
    shutil.copytree(folder, larger)
    backend = Tokenizer.from_file(str(larger / "tokenizer.json"))
    known = backend.get_vocab_size()
    backend.add_special_tokens([f"<x{n}>" for n in range(9)])
    backend.save(str(larger / "tokenizer.json"))
    rows: list[tuple[str, dict[str, Any]]] = [
        ("conversation", {"prompt": "q", "completion": "a <x8>"}),
        ("conversation", {"messages": turns("<x0>", "b")}),
        ("pair", {"prompt": "q", "chosen": "a", "rejected": "<x3>"}),
        ("unpaired", {"prompt": "q", "completion": "<x3>", "label": True}),
        ("prompt", {"prompt": "say <x1>"}),
    ]
    for config in ({"vocab_size": known}, {"vocab_size": 9999, "text_config": {"vocab_size": known}}):
        (larger / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
        chat = load_tokenizer(larger)
        for kind, row in rows:
            with pytest.raises(DataError, match=rf"token \d+, '<x\d>', .*embedding of {known} rows") as error:
                prepared(tmp_path, [row], kind, chat)
            assert f"the tokenizer has {known + 9} tokens" in str(error.value)
            assert error.value.where == f"{tmp_path / 'data.jsonl'}:1"
    (larger / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": known + 9}))
    assert prepared(tmp_path, [rows[0][1]], "conversation", load_tokenizer(larger)).report.kept == 1


# ------------------------------------------------------------------------------------------------- long texts


def test_a_long_text_has_the_same_ids_in_pieces(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.data import bounded

    monkeypatch.setattr(bounded, "AT_ONCE", 3000)
    words = "The quick  brown fox, 12+7; jumps over\n\nGrüße 日本語 <|im_end|> a\tb it's"
    texts = ["short", words * 300, "x" * 20_000, "", "a b " * 4000, words]
    calls: list[int] = []

    def encode(some: Any) -> list[list[int]]:
        calls.append(sum(map(len, some)))
        return tokenizer._encode(some)

    assert encode_bounded(texts, encode) == tokenizer._encode(texts)
    assert sorted(calls)[-2] <= 3000 < sorted(calls)[-1] == 20_000, "only a text without a word's end is taken whole"


def test_many_turns_of_a_long_row_are_refused_rather_than_rendered_for_hours(tmp_path: Path, folder: Path) -> None:
    long = [m for n in range(3000) for m in turns("q" * 100, "a" * 100)]
    with pytest.raises(DataError, match=r"3000 scored turns in \d+ characters.*generation markers"):
        prepared(tmp_path, [{"messages": long}], "conversation", with_template(folder, UNMARKED_CHATML))


def test_a_row_that_cannot_fit_is_refused_before_it_is_tokenised(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "q", "completion": "a" * 3_000_000}, {"prompt": "q", "completion": "b"}]
    seen: list[int] = []
    plain = ChatTokenizer._encode
    monkeypatch.setattr(ChatTokenizer, "_encode", lambda self, t: seen.append(sum(map(len, t))) or plain(self, t))
    made = prepared(tmp_path, rows, "conversation", tokenizer, on_bad_row="skip", max_length=1000)
    assert made.report.kept == 1 and "3000001 characters are at least" in made.report.refused[0].reason
    assert max(seen) < 1000


def test_rows_that_are_split_have_every_scored_token_once(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    words = [f"w{n}" for n in range(200)]
    talk = turns("q " * 30, " ".join(words[:90]), "more?", " ".join(words[90:]))
    for row in ({"messages": talk}, {"text": " ".join(words)}):
        path = write_jsonl(tmp_path / "data.jsonl", [row])
        [whole] = prepare((source(path),), "conversation", tokenizer, seed=0).items
        for limit in (2, 3, 17, 64, len(whole.trunk) - 1, len(whole.trunk)):
            one = source(path, max_length=limit, too_long="split")
            made = prepare((one,), "conversation", tokenizer, seed=0)
            scored_ids = [i for t in made.items for i in t.trunk.token_ids[t.trunk.loss_mask].tolist()]
            assert scored_ids == whole.trunk.token_ids[whole.trunk.loss_mask].tolist()
            assert all(len(t.trunk) <= limit and not t.trunk.loss_mask[0] for t in made.items)
            [report] = made.report.sources
            if limit < len(whole.trunk):
                assert report.split == 1 and report.parts == report.kept == len(made.items)
                of = len(made.items)
                assert made.items[-1].origin == (f"{path}:1, part {of} of {of}" if of > 1 else f"{path}:1")
                assert f"1 of them in {report.parts} parts, being too long" in made.report.summary[0]
            else:
                assert report.split == 0 and made.items[0].origin == f"{path}:1"


def test_what_is_too_long_is_left_out_of_every_kind_and_counted(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    long = "long " * 50
    rows: dict[str, list[dict[str, Any]]] = {
        "conversation": [{"messages": turns("q", "a")}, {"messages": turns("q", long)}],
        "pair": [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": long, "rejected": "b"}],
        "unpaired": [
            {"prompt": "q", "completion": "a", "label": True},
            {"prompt": long, "completion": "a", "label": True},
        ],
        "prompt": [{"prompt": "q"}, {"prompt": long}],
    }
    for kind, content in rows.items():
        made = prepared(tmp_path, content, kind, tokenizer, max_length=40, too_long="drop")
        assert len(made.items) == 1 and made.report.filtered == 1 and not made.report.refused
        assert "1 too long and left out" in made.report.summary[0]


@pytest.mark.parametrize(
    ("kind", "row", "options", "words"),
    [
        (
            "pair",
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"too_long": "split", "max_length": 9},
            "of kind pair",
        ),
        ("prompt", {"prompt": "q"}, {"too_long": "split", "max_length": 9}, "on prompts"),
        ("conversation", {"text": "q"}, {"too_long": "right"}, "without `max_length`"),
    ],
)
def test_a_way_that_means_nothing_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, kind: str, row: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        prepared(tmp_path, [row], kind, tokenizer, **options)
