"""Rows of questions about pictures: gold answers score best, and plugins get the pictures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rewards import Sample
from rewards.cache import sample_key
from rewards.plugin import PluginSpec
from rewards.pool import RewardPool
from rewards.trial import prove_gold
from rewards.wire import decode, encode, pack_samples, unpack_samples

ROWS: dict[str, list[dict[str, Any]]] = {
    "choice": [
        {"answer": "A", "choices": ["a cat", "a dog"]},
        {"answer": "B", "choices": ["a cat", "a dog"]},
    ],
    "exact": [{"answer": "red circle"}, {"answer": "blue square"}],
    "numeric": [{"answer": "3"}, {"answer": "4"}],
    "count": [{"answer": 3}, {"answer": 5}],
    "box_iou": [{"answer": [0, 0, 10, 10]}, {"answer": [20, 20, 40, 40]}],
}


def media(number: int) -> list[dict[str, str]]:
    return [{"type": "image", "path": f"/store/{number}-{n}.png"} for n in range(2)]


def asked(number: int, row: dict[str, Any], completion: str = "I cannot tell") -> Sample:
    parts = [*media(number), {"type": "text", "text": "What is in these pictures?"}]
    return Sample(completion, [{"role": "user", "content": parts}], row, group_id=number, media=media(number))


@pytest.mark.parametrize("plugin", ROWS)
def test_the_gold_answer_of_a_row_with_pictures_scores_best(plugin: str, tmp_path: Path) -> None:
    samples = [asked(number, row) for number, row in enumerate(ROWS[plugin])]
    with RewardPool([PluginSpec(plugin)], tmp_path, seed=0) as pool:
        proof = asyncio.run(prove_gold(pool, samples))
    assert proof.holds and proof.with_gold == 2 and proof.above >= 2


def test_a_plugin_gets_kinds_and_paths_of_the_pictures_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(
        "from rewards import Score, reward\n"
        "@reward\n"
        "def seen(samples):\n"
        "    return [Score(float(len(s.media)), info={'media': [dict(m) for m in s.media],"
        " 'first': s.messages[0]['content'][0]['path'] if s.media else ''}) for s in samples]\n"
    )
    with RewardPool([PluginSpec("seen.py:seen")], tmp_path, seed=0) as pool:
        result = pool.score_sync([asked(7, {}), Sample("text alone")])
    assert [row[0] for row in result.scores] == [2.0, 0.0]
    assert result.infos[0]["seen"] == {"media": media(7), "first": "/store/7-0.png"}


def test_pictures_that_completions_share_are_sent_once_and_another_picture_is_another_score() -> None:
    shared = media(1)
    packed = pack_samples([Sample("a", media=shared), Sample("b", media=shared), Sample("a", media=media(2))])
    assert len({item[0] for item in packed["items"]}) == len(packed["shared"])
    back = unpack_samples(decode(encode(packed)[8:]))
    assert [s.media for s in back] == [media(1), media(1), media(2)]
    assert sample_key(b"", [back[0]]) != sample_key(b"", [back[2]])
