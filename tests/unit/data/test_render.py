"""Which tokens a record becomes, and which of them are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from align.data.encode import encode
from align.data.encoded import Encoded, Tokens, cut
from align.data.records import Conversation, Message, Pair, Prompt, RowError, Unpaired
from align.data.render import draft
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import DataError
from tests.unit.data.build import (
    ASKS_UNASKED,
    FORGETS_THOUGHTS,
    UNMARKED_CHATML,
    prepared,
    scored,
    text,
    turns,
    with_template,
)

TWO_TURNS = turns("What is 12+7?", "19", "Sure?", "Yes.", system="Be brief.")


def messages(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents))


def encoded(record: Any, tokenizer: ChatTokenizer) -> Encoded:
    [made] = encode([draft(record, tokenizer)], tokenizer)
    if isinstance(made, RowError):
        raise made
    return made


def shown(tokens: Tokens, tokenizer: ChatTokenizer) -> tuple[str, str]:
    """(all of it, the scored part) as text."""
    ids = tokens.ids
    return tokenizer.decode(ids, False), tokenizer.decode(ids[tokens.mask], False)


@pytest.fixture(params=["marked", "unmarked"])
def chatml(request: pytest.FixtureRequest, folder: Path) -> ChatTokenizer:
    return load_tokenizer(folder) if request.param == "marked" else with_template(folder, UNMARKED_CHATML)


def test_all_assistant_turns_with_their_end_and_nothing_else_are_scored(chatml: ChatTokenizer) -> None:
    record = Conversation((), tuple(Message(m["role"], m["content"]) for m in TWO_TURNS))
    whole, marked = shown(encoded(record, chatml).trunk, chatml)
    assert marked == "19<|im_end|>Yes.<|im_end|>"
    assert whole == chatml.render(TWO_TURNS) and whole.endswith("Yes.<|im_end|>\n")


def test_assistant_turns_of_a_prompt_and_turns_of_weight_zero_are_not_scored(chatml: ChatTokenizer) -> None:
    asked = messages("a", "b", "c")
    assert shown(encoded(Conversation(asked, messages("x", "d")[1:]), chatml).trunk, chatml)[1] == "d<|im_end|>"
    silent = (*messages("a"), Message("assistant", "b", scored=False), *messages("c", "d"))
    assert shown(encoded(Conversation((), silent), chatml).trunk, chatml)[1] == "d<|im_end|>"


def test_a_pair_shares_its_prompt_and_scores_only_completions(chatml: ChatTokenizer) -> None:
    good, bad = messages("x", "good", "why?", "so")[1:], messages("x", "bad")[1:]
    made = encoded(Pair(messages("a", "b", "c"), good, bad), chatml)
    prompt, marked = shown(made.trunk, chatml)
    assert prompt.endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n") and marked == ""
    chosen, rejected = (shown(b, chatml) for b in made.branches)
    assert chosen[0].startswith("good<|im_end|>\n<|im_start|>user\nwhy?") and chosen[1] == "good<|im_end|>so<|im_end|>"
    assert rejected == ("bad<|im_end|>\n", "bad<|im_end|>")


def test_a_boundary_is_one_of_tokens_and_never_merged_over(folder: Path) -> None:
    """`\\n` ends the header and begins the content: tokenised as a whole they could be one token."""
    tokenizer = with_template(folder, UNMARKED_CHATML)
    made = encoded(Pair(messages("q"), messages("x", "\n\nfoo")[1:], messages("x", "bar")[1:]), tokenizer)
    asked = tokenizer.chat_ids([{"role": "user", "content": "q"}], True)
    assert made.trunk.ids.tolist() == asked
    assert shown(made.branches[0], tokenizer)[1] == "\n\nfoo<|im_end|>"


def test_a_template_that_always_writes_the_next_header_does_not_have_it_scored(folder: Path) -> None:
    tokenizer = with_template(folder, ASKS_UNASKED)
    record = Conversation((), messages("a", "b", "c", "d"))
    assert shown(encoded(record, tokenizer).trunk, tokenizer)[1] == "b<|im_end|>d<|im_end|>"


def test_a_template_that_changes_earlier_turns_is_refused_with_the_first_differing_token(folder: Path) -> None:
    tokenizer = with_template(folder, FORGETS_THOUGHTS)
    one_turn = encoded(Conversation((), messages("a", "b")), tokenizer)
    assert shown(one_turn.trunk, tokenizer)[1] == "(thought)b<|im_end|>"
    with pytest.raises(RowError) as error:
        draft(Conversation((), messages("a", "b", "c", "d")), tokenizer)
    at = len(tokenizer.chat_ids([{"role": "user", "content": "a"}], True))
    assert f"token {at} is '(' in the one and 'b' in the other" in str(error.value)
    assert "chat_template" in str(error.value)


@pytest.mark.parametrize("thinking", [True, False])
def test_the_qwen3_training_template_keeps_every_turns_reasoning(folder: Path, thinking: bool) -> None:
    arguments = {} if thinking else {"enable_thinking": False}
    tokenizer = load_tokenizer(folder, chat_template="qwen3", template_args=arguments)
    empty = "<think>\n\n</think>\n\n"
    record = Conversation((), messages("a", "<think>\nhm\n</think>\n\nb", "c", "d"))
    whole, marked = shown(encoded(record, tokenizer).trunk, tokenizer)
    assert marked == f"<think>\nhm\n</think>\n\nb<|im_end|>{empty if thinking else ''}d<|im_end|>"
    assert whole.endswith(f"<|im_start|>assistant\n{empty}d<|im_end|>\n")
    made = encoded(Pair(messages("a"), messages("x", "good")[1:], messages("x", "bad")[1:]), tokenizer)
    assert shown(made.trunk, tokenizer)[0].endswith("assistant\n" + ("" if thinking else empty))
    assert shown(made.branches[0], tokenizer)[1] == ("" if not thinking else empty) + "good<|im_end|>"


def test_a_template_that_refuses_a_row_is_quoted(folder: Path) -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match="roles must alternate"):
        draft(Conversation((), messages("a", "b")), with_template(folder, strict))


def test_markers_that_do_not_match_the_turns_are_refused_where_it_matters(folder: Path) -> None:
    once = "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}"
    tokenizer = with_template(folder, once)
    assert shown(encoded(Conversation((), messages("a", "b", "c", "d")), tokenizer).trunk, tokenizer)[0] == "abcd"
    silent = (*messages("a"), Message("assistant", "b", scored=False), *messages("c", "d"))
    with pytest.raises(RowError, match="1 generation blocks for 2 assistant turns"):
        draft(Conversation((), silent), tokenizer)


def test_plain_text_takes_no_template_and_ends_with_eos(tokenizer: ChatTokenizer) -> None:
    made = encoded(Conversation("What is 12+7?", " 19"), tokenizer).trunk
    assert shown(made, tokenizer) == ("What is 12+7? 19<|im_end|>", " 19<|im_end|>")
    twice = encoded(Unpaired("a", "b<|im_end|>", True), tokenizer)
    assert shown(twice.branches[0], tokenizer)[0] == "b<|im_end|>"
    prompt = encoded(Prompt("What is 12+7?"), tokenizer).trunk
    assert shown(prompt, tokenizer) == ("What is 12+7?", "")


def test_nothing_predicts_the_first_token_so_it_is_not_scored(tokenizer: ChatTokenizer) -> None:
    made = encoded(Conversation("", "once upon a time"), tokenizer).trunk
    assert not made.mask[0] and made.mask[1:].all()


def _bos_tokenizer(folder: Path, *, start: bool) -> ChatTokenizer:
    """Adds <s>; with `start`, a SentencePiece-like tokenizer that marks the start of its input with a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if start else "never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first" if start else "never")
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the sky is blue and green"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}'
    )
    return load_tokenizer(folder)


@pytest.mark.parametrize("start", [False, True])
def test_plain_text_begins_with_exactly_one_bos(tmp_path: Path, start: bool) -> None:
    tokenizer = _bos_tokenizer(tmp_path, start=start)
    for prompt in ("the sky", "<s>the sky"):
        made = encoded(Pair(prompt, " is blue", " is green"), tokenizer)
        assert made.trunk.ids.tolist().count(1) == 1 and made.trunk.ids[0] == 1
        assert [b.ids[-1] for b in made.branches] == [2, 2]
    assert encoded(Pair("the sky", " is blue", " is green"), tokenizer).trunk.ids.tolist() == tokenizer.encode(
        "the sky"
    )
    for whole_text in ("the sky", "<s>the sky"):  # a column `text`, which a chat template may have written
        whole = encoded(Conversation("", whole_text), tokenizer).trunk
        assert whole.ids.tolist().count(1) == 1 and whole.ids[0] == 1 and whole.ids[-1] == 2
        assert not whole.mask[0] and whole.mask[1:].all()


def test_a_tokenizer_that_marks_starts_gives_the_ids_of_the_whole_text(tmp_path: Path) -> None:
    tokenizer = _bos_tokenizer(tmp_path, start=True)
    assert tokenizer.marks_start
    made = encoded(Pair("the sky is", " blue", " green"), tokenizer)
    for branch, whole in zip(made.branches, ("the sky is blue", "the sky is green"), strict=True):
        assert [*made.trunk.ids, *branch.ids] == [*tokenizer.encode(whole), 2]
    [refused] = encode([draft(Conversation("the sk", "y is blue"), tokenizer)], tokenizer)
    assert isinstance(refused, RowError) and "becomes" in str(refused)


def test_without_bos_an_empty_prompt_cannot_have_branches(tokenizer: ChatTokenizer) -> None:
    [refused] = encode([draft(Pair("", "a", "b"), tokenizer)], tokenizer)
    assert isinstance(refused, RowError) and "nothing predicts" in str(refused)


# ------------------------------------------------------------------------------------------------- properties

content = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), min_size=1, max_size=30)
chats = st.lists(st.tuples(content, content), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@example([("0", "\ue000other 0\ue000")], False)  # what is rendered in its place, to see whether it is
@given(chats, st.booleans())
def test_markers_and_incremental_rendering_agree(folder: Path, chat: list[tuple[str, str]], system: bool) -> None:
    marked, unmarked = load_tokenizer(folder), with_template(folder, UNMARKED_CHATML)
    head = (Message("system", "Be brief."),) if system else ()
    record = Conversation((), head + messages(*(c for pair in chat for c in pair)))
    one, two = encoded(record, marked).trunk, encoded(record, unmarked).trunk
    assert np.array_equal(one.ids, two.ids) and np.array_equal(one.mask, two.mask)
    assert marked.decode(one.ids[one.mask], False) == "".join(answer + "<|im_end|>" for _, answer in chat)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(content, content.map(lambda c: "A" + c)), min_size=1, max_size=4))
def test_concatenated_ids_are_those_of_the_whole_render_where_no_token_crosses_a_boundary(
    folder: Path, chat: list[tuple[str, str]]
) -> None:
    tokenizer = load_tokenizer(folder)
    record = Conversation((), messages(*(c for pair in chat for c in pair)))
    assert encoded(record, tokenizer).trunk.ids.tolist() == tokenizer.chat_ids([m.as_dict() for m in record.completion])


@settings(max_examples=60, deadline=None)
@given(chats, content, content)
def test_a_pairs_trunk_is_the_prompt_an_engine_is_given(
    folder: Path, chat: list[tuple[str, str]], chosen: str, rejected: str
) -> None:
    tokenizer = load_tokenizer(folder)
    prompt = messages(*(c for pair in chat for c in pair), "last question")
    asked = encoded(Prompt(prompt), tokenizer).trunk
    made = encoded(Pair(prompt, messages("x", chosen)[1:], messages("x", rejected)[1:]), tokenizer)
    assert np.array_equal(made.trunk.ids, asked.ids) and not made.trunk.mask.any()


# ------------------------------------------------------------------------------------------------- lengths


def _tokens(n: int, first_scored: int) -> Tokens:
    return Tokens(np.arange(n), np.arange(n) >= first_scored)


def test_what_is_too_long_loses_its_end_or_its_beginning() -> None:
    long = Encoded(_tokens(10, 4))
    right = cut(long, 6, "right", None)
    assert right.trunk.ids.tolist() == [0, 1, 2, 3, 4, 5] and right.scored == 2
    left = cut(long, 6, "left", 0)
    assert left.trunk.ids.tolist() == [0, 5, 6, 7, 8, 9] and left.trunk.mask.tolist() == [False] + [True] * 5
    with pytest.raises(RowError, match="nothing is left to score"):
        cut(long, 4, "right", None)


def test_of_a_pair_right_keeps_the_prompt_and_left_keeps_the_completions() -> None:
    pair = Encoded(_tokens(5, 5), [_tokens(4, 0), _tokens(2, 0)])
    right = cut(pair, 7, "right", None)
    assert (len(right.trunk), [len(b) for b in right.branches]) == (5, [2, 2])
    left = cut(pair, 7, "left", 0)
    assert left.trunk.ids.tolist() == [0, 3, 4] and [len(b) for b in left.branches] == [4, 2]
    with pytest.raises(RowError, match="the prompt alone has 5 tokens"):
        cut(pair, 5, "right", None)
    with pytest.raises(RowError, match="a completion alone has 4 tokens"):
        cut(pair, 4, "left", None)


def test_trees_carry_what_was_rendered(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{"prompt": turns("q"), "chosen": "good", "rejected": "bad"}]
    [tree] = prepared(tmp_path, rows, "pair", tokenizer).items
    assert text(tokenizer, tree.trunk) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert [scored(tokenizer, b) for b in tree.branches] == ["good<|im_end|>", "bad<|im_end|>"]
    assert tree.trunk.token_ids.dtype == np.int64 and tree.trunk.loss_mask.dtype == np.bool_


def test_messages_without_a_chat_template_are_refused_with_a_remedy(tmp_path: Path) -> None:
    from align.errors import ModelError

    tokenizer = _bos_tokenizer(tmp_path / "t", start=False)
    with pytest.raises(ModelError, match="no chat template"):
        prepared(tmp_path, [{"messages": TWO_TURNS}], "conversation", tokenizer)
    with pytest.raises(DataError, match="no assistant turn"):
        prepared(tmp_path, [{"messages": turns("a")}], "conversation", tokenizer)
