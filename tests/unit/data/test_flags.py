"""Turns that are not to be learnt, in the words of every trainer whose data come here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import DataError
from tests.unit.data.build import prepared, scored, text

NOT_LEARNT: list[dict[str, Any]] = [
    {"weight": 0}, {"weight": 0.0}, {"loss": False}, {"loss": 0}, {"loss": 0.0}, {"loss_scale": 0}, {"train": False},
    {"training": False}, {"trainable": False}, {"is_trainable": 0}, {"train_on_turn": False}, {"loss_mask": 0},
    {"step_loss_mask": 0}, {"loss_weight": 0.0}, {"learn": False}, {"masked": True}, {"weight": None, "train": False},
    {"loss": False, "weight": 0},
]  # fmt: skip
LEARNT: list[dict[str, Any]] = [
    {}, {"weight": 1}, {"weight": 1.0}, {"loss": True}, {"loss": None}, {"loss_scale": 1.0}, {"train": True},
    {"step_loss_mask": 1}, {"loss_mask": 1}, {"masked": False}, {"train_detail": []},
]  # fmt: skip


@pytest.fixture(scope="module", params=["chatml", "qwen3", "unmarked"])
def chat(request: pytest.FixtureRequest, folder: Path) -> ChatTokenizer:
    from tests.unit.data.build import UNMARKED_CHATML

    return load_tokenizer(folder, chat_template=UNMARKED_CHATML if request.param == "unmarked" else request.param)


def _openai(flag: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "BAD", **flag},
            {"role": "user", "content": "q2"},
            {"role": "assistant", "content": "GOOD"},
        ]
    }


def _sharegpt(flag: dict[str, Any]) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": "q1"},
            {"from": "gpt", "value": "BAD", **flag},
            {"from": "human", "value": "q2"},
            {"from": "gpt", "value": "GOOD"},
        ]
    }


def _completion(flag: dict[str, Any]) -> dict[str, Any]:
    messages = _openai(flag)["messages"]
    return {"prompt": messages[:1], "completion": messages[1:]}


def _swift_pairs(flag: dict[str, Any]) -> dict[str, Any]:
    return {"conversation": [{"human": "q1", "assistant": "BAD", **flag}, {"human": "q2", "assistant": "GOOD"}]}


def _swift_history(flag: dict[str, Any]) -> dict[str, Any]:
    return {"query": "q2", "response": "GOOD", "history": [{"query": "q1", "response": "BAD", **flag}]}


def _alpaca_history(flag: dict[str, Any]) -> dict[str, Any]:
    return {"instruction": "q2", "output": "GOOD", "history": [{"user": "q1", "assistant": "BAD", **flag}]}


LAYOUTS = (_openai, _sharegpt, _completion, _swift_pairs, _swift_history, _alpaca_history)


def test_every_word_for_it_keeps_a_turn_in_the_context_and_out_of_the_loss(tmp_path: Path, chat: ChatTokenizer) -> None:
    for layout in LAYOUTS:
        for flags, learnt in ((NOT_LEARNT, False), (LEARNT, True)):
            made = prepared(tmp_path, [layout(flag) for flag in flags], "conversation", chat)
            assert not made.report.sources[0].unread
            for flag, tree in zip(flags, made.items, strict=True):
                seen = scored(chat, tree.trunk)
                assert "BAD" in text(chat, tree.trunk)
                assert ("BAD" in seen) is learnt, (layout.__name__, flag)
                assert seen.endswith("GOOD<|im_end|>")


def test_flags_work_in_the_completions_of_pairs_and_of_unpaired_rows(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rest = _openai({"loss": False})["messages"]
    worse = [*rest[:3], {"role": "assistant", "content": "WORSE"}]
    pair = {"prompt": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}, rest[0]],
            "chosen": rest[1:], "rejected": worse[1:]}  # fmt: skip
    tree = prepared(tmp_path, [pair], "pair", tokenizer).items[0]
    assert [scored(tokenizer, b) for b in tree.branches] == ["GOOD<|im_end|>", "WORSE<|im_end|>"]
    assert not tree.trunk.loss_mask.any()
    unpaired = {"prompt": rest[:1], "completion": rest[1:], "label": True}
    tree = prepared(tmp_path, [unpaired], "unpaired", tokenizer).items[0]
    assert scored(tokenizer, tree.branches[0]) == "GOOD<|im_end|>"
    implicit = {"chosen": rest, "rejected": worse}
    tree = prepared(tmp_path, [implicit], "pair", tokenizer).items[0]
    assert "BAD" in text(tokenizer, tree.trunk) and not tree.trunk.loss_mask.any()


def test_what_is_no_truth_value_is_refused_with_the_word_and_the_line(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    for flag, reason in (
        ({"loss": "no"}, "loss must be 0 or 1, true or false, got 'no'"),
        ({"weight": 0.5}, "weight must be 0 or 1.*a fraction of a turn cannot be learnt"),
        ({"loss_scale": 2}, "loss_scale must be 0 or 1.*a fraction"),
        ({"loss_mask": [0, 1, 1]}, "loss_mask must be 0 or 1.*masks of single tokens"),
        ({"weight": float("nan")}, "weight must be 0 or 1"),
        ({"train": {"a": 1}}, "train must be 0 or 1"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, "only whole turns"),
        ({"loss": False, "train": True}, "learnt and that it is not"),
        ({"masked": True, "loss": 1}, "learnt and that it is not"),
    ):
        for layout in (_openai, _sharegpt, _swift_history):
            with pytest.raises(DataError, match=reason) as error:
                prepared(
                    tmp_path,
                    [_openai({}) if layout is _openai else layout({}), layout(flag)],
                    "conversation",
                    tokenizer,
                )
            assert error.value.where == f"{tmp_path}/data.jsonl:2"


def test_a_row_of_which_nothing_is_learnt_is_refused(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]}
    with pytest.raises(DataError, match="is marked as not to be learnt"):
        prepared(tmp_path, [row], "conversation", tokenizer)


def test_masks_of_tokens_in_a_column_are_refused(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    for name in ("loss_mask", "assistant_masks", "completion_mask", "step_loss_mask"):
        with pytest.raises(DataError, match=f"`{name}` is a mask") as error:
            prepared(tmp_path, [_openai({}), _openai({}) | {name: [0, 1, 0, 1]}], "conversation", tokenizer)
        assert error.value.where.endswith(":2")
    made = prepared(tmp_path, [_openai({}) | {"loss": [0.7, 1.3]}], "conversation", tokenizer)
    assert set(made.report.sources[0].unread) == {"column 'loss'"}, "what is no mask is a column like others"


def test_a_turn_of_the_user_that_is_to_be_learnt_is_named(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [_openai({}), _openai({})]
    rows[1]["messages"][0]["train"] = True
    rows[1]["messages"][2]["train"] = False
    report = prepared(tmp_path, rows, "conversation", tokenizer).report
    assert report.sources[0].notes == [
        f"`train` of a user turn (only the assistant's turns are learnt) is not read: once, at {tmp_path}/data.jsonl:2"
    ]
    json.dumps(report.to_json())


def test_a_rows_weight_is_a_column_of_every_kind_of_record(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "conversation": [
            {"prompt": "q", "completion": "a"}, {"text": "a b"}, _openai({}), _sharegpt({}), _swift_history({}),
            {"instruction": "q", "output": "a"},
        ],
        "pair": [
            {"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": "q a", "rejected": "q b"},
            _openai({}) | {"rejected_response": "b"}, {"instruction": "q", "chosen": "a", "rejected": "b"},
            {"conversations": _sharegpt({})["conversations"][:1], "chosen": "a", "rejected": "b"},
        ],
        "unpaired": [{"prompt": "q", "completion": "a", "label": True}, _openai({}) | {"label": False}],
        "labelled": [{"text": "q", "label": 1}, _openai({}) | {"label": 0}],
        "prompt": [{"prompt": "q"}, _openai({}), _sharegpt({}), {"query": "q"}, {"instruction": "q"}],
    }  # fmt: skip
    from align.data.prepare import prepare
    from align.recipe.labels import Labels
    from tests.unit.data.build import source, write_jsonl

    labels = Labels(problem="single_label", names=("0", "1"))
    for kind, all_rows in rows.items():
        more: dict[str, Any] = {"labels": labels} if kind == "labelled" else {}
        for row in all_rows:
            path = write_jsonl(tmp_path / "data.jsonl", [row | {"weight": 0.25}, row | {"weight": None}, row])
            made = prepare((source(path),), kind, tokenizer, seed=0, **more)  # type: ignore[arg-type]
            if kind == "prompt":
                assert [item.row.get("weight") for item in made.items] == [0.25, None, None]
                continue
            for tree, weight in zip(made.items, (0.25, 1.0, 1.0), strict=True):
                holders = [s.columns for s in tree.sequences] + ([tree.columns] if kind == "pair" else [])
                assert holders and all(columns["weight"] == weight for columns in holders)
            for bad in ("much", True, -1, float("inf"), float("nan"), [1], 10**400, 1e300):
                path = write_jsonl(tmp_path / "data.jsonl", [row, row | {"weight": bad}])
                with pytest.raises(DataError, match="`weight` must be a number") as error:
                    prepare((source(path),), kind, tokenizer, seed=0, **more)  # type: ignore[arg-type]
                assert error.value.where.endswith(":2")
