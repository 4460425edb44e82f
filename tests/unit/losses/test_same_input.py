"""Equal words about other pictures are other prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from align.data.prefixes import share_prefixes
from align.losses import kto
from align.protocols.trees import Medium, Segment, Tree
from align.stages.reference_cache import tree_digest

IDS = np.arange(3, 21)


def shown(key: str, start: int = 2, store: str = "/store") -> Medium:
    return Medium("image", key, store, start, 5, 16)


def row(i: int, *media: Medium) -> Tree:
    completion = Segment(np.array([20 + i, 21]), np.ones(2, bool), columns={"desirable": float(i % 2)})
    return Tree(i, Segment(IDS.copy(), np.zeros(18, bool), media=media), (completion,), origin=f"rows.jsonl:{i}")


def partners(trees: list[Tree]) -> list[str]:
    return [tree.origin for tree in kto.auxiliary(trees, kto.Config())]


def test_kto_matches_the_same_question_about_another_picture() -> None:
    rows = [row(0, shown("cat")), row(1, shown("dog")), row(2, shown("cat"))]
    found = kto.auxiliary(rows, kto.Config())
    assert [tree.origin for tree in found] == [
        "rows.jsonl:0 x rows.jsonl:1",
        "rows.jsonl:1 x rows.jsonl:2",
        "rows.jsonl:2 x rows.jsonl:1",
    ]
    assert [tree.media[0].key for tree in found] == ["cat", "dog", "cat"]


def test_the_same_picture_twice_is_one_prompt_whichever_store_holds_it() -> None:
    assert partners([row(0, shown("cat")), row(1, shown("cat", store="/elsewhere"))]) == []


@pytest.mark.parametrize(
    "other",
    [(), (shown("cat", start=9),), (shown("cat"), shown("dog", start=9)), (replace(shown("cat"), kind="video"),)],
    ids=["no picture", "at another place", "one more", "a video"],
)
def test_what_stands_where_is_part_of_a_prompt(other: tuple[Medium, ...]) -> None:
    one, two = row(0, shown("cat")), row(1, *other)
    assert not one.trunk.same_input(two.trunk) and one.trunk.same_input(row(5, shown("cat")).trunk)
    assert partners([one, two]) == ["rows.jsonl:0 x rows.jsonl:1", "rows.jsonl:1 x rows.jsonl:0"]
    assert tree_digest(one) != tree_digest(replace(two, branches=one.branches))
    shared = share_prefixes([one, replace(two, branches=one.branches)])
    assert [[m.key for m in tree.trunk.media] for tree in shared if tree.branches] == (
        [["cat"]] if len(other) == 2 else [["cat"], [m.key for m in other]]
    )
