"""Rewards on the length, the repetitions and the words of a text: values by hand, and real answers."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from rewards import PluginError, Sample
from rewards.builtins.overlap import _common_subsequence, overlap
from rewards.builtins.repetition import repetition
from rewards.builtins.soft_overlong import soft_overlong
from rewards.find import load
from rewards.plugin import PluginSpec


def test_soft_overlong_is_equation_13_of_dapo() -> None:
    samples = [Sample("x", token_ids=[0] * n) for n in (1, 15, 16, 17, 20, 21, 100)]
    expected = [0.0, 0.0, -0.2, -0.4, -1.0, -1.0, -1.0]
    assert soft_overlong(samples, max=20, cache=5) == pytest.approx(expected)
    assert soft_overlong([Sample("a b c")], max=4, cache=2, unit="words") == [-0.5]
    with pytest.raises(ValueError, match="unit: words"):
        soft_overlong([Sample("a b c")], max=4, cache=2)


def test_repetition_is_the_share_of_ngrams_that_stood_before() -> None:
    texts = ["a b c d", "A b a B a b", "a a a a a a", "a b", "", "the cat sat. the cat sat. the cat sat."]
    assert repetition([Sample(t) for t in texts], n=2) == pytest.approx([0.0, -0.6, -0.8, 0.0, 0.0, -5 / 8])
    assert repetition([Sample(t) for t in texts[:3]], n=3, scale=-0.5) == pytest.approx([0.0, -0.25, -0.375])
    assert repetition([Sample("好好好好")], n=1, unit="characters") == [-0.75]
    assert repetition([Sample("x", token_ids=[7, 8, 7, 8, 7])], n=2, unit="tokens") == [-0.5]
    with pytest.raises(ValueError, match="no token ids"):
        repetition([Sample("x")], unit="tokens")


def overlaps(text: str, *references: str, metric: str) -> float:
    value = overlap([Sample(text, row={"answer": list(references)})], metric=metric)  # type: ignore[arg-type]
    return value[0]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    assert overlaps("police kill the gunman", "Police killed the gunman!", metric="rouge_l") == 0.75  # Lin 2004, S2
    assert overlaps("the gunman kill police", "police killed the gunman", metric="rouge_l") == 0.5  # Lin 2004, S3
    assert overlaps("the cat", "the cat sat on the mat", metric="rouge_l") == pytest.approx(2 * (1 / 3) / (4 / 3))
    assert overlaps("a b", "c d", "a c", metric="rouge_l") == 0.5
    assert _common_subsequence("xmjyauz", "mzjawxu") == 4


def test_bleu_clips_smooths_and_punishes_the_short() -> None:
    # Papineni et al. 2002: "the" seven times has a clipped unigram precision of 2/7.
    the = overlaps("the the the the the the the", "the cat is on the mat", "there is a cat on the mat", metric="bleu")
    assert the == pytest.approx((2 / 7 * 1 / 7 * 1 / 6 * 1 / 5) ** 0.25)
    short = overlaps("the cat sat on", "the cat sat on the mat", metric="bleu")
    assert short == pytest.approx(math.exp(1 - 6 / 4))
    assert overlaps("a dog", "the cat sat", metric="bleu") == 0.0


def test_chrf_averages_character_ngrams_and_weighs_recall() -> None:
    # "abc" against "abd": precision and recall are 2/3, 1/2 and 0 for 1-, 2- and 3-grams.
    assert overlaps("ab c", "a bd", metric="chrf") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # "ab" against "abcd": precision 1, 1; recall 1/2, 1/3, mean 5/12; F2 = 5 p r / (4 p + r).
    assert overlaps("ab", "abcd", metric="chrf") == pytest.approx(5 * (5 / 12) / (4 + 5 / 12))
    assert overlaps("xyz", "abcd", metric="chrf") == 0.0


@pytest.mark.parametrize("metric", ["rouge_l", "bleu", "chrf"])
def test_overlap_is_1_for_the_reference_0_for_nothing_and_an_error_without_one(metric: str) -> None:
    assert overlaps("The cat.", "dog", "the cat" if metric != "chrf" else "The cat.", metric=metric) == 1.0
    assert overlaps("word", "word", metric=metric) == 1.0
    assert overlaps("", "the cat", metric=metric) == 0.0
    with pytest.raises(ValueError, match="has no words"):
        overlaps("the cat", "...", metric=metric)
    with pytest.raises(KeyError, match="question"):
        overlap([Sample("x", row={"question": "?"})], metric=metric)  # type: ignore[arg-type]
    started = time.monotonic()
    overlaps("a b " * 10_000, "b a " * 10_000, metric=metric)
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("soft_overlong", {"max": 5, "cache": 5}, "not longer than cache"),
        ("soft_overlong", {"max": 5, "cache": 0}, "cache is at least 1"),
        ("soft_overlong", {"max": 5}, "needs the argument 'cache'"),
        ("repetition", {"n": 0}, "n is at least 1"),
        ("repetition", {"scale": 0.5}, "from -1 to below 0"),
        ("overlap", {"metric": "meteor"}, "'meteor'"),
    ],
)
def test_impossible_arguments_are_refused(use: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load(PluginSpec(use, args=args), ".")


@pytest.mark.realdata
@pytest.mark.parametrize("metric", ["rouge_l", "bleu", "chrf"])
def test_a_real_reference_scores_best_and_another_rows_lower(shared_data: Path, metric: str) -> None:
    path = shared_data / "text/sft/llms_from_scratch_instruction.json"
    rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if len(row["output"].split()) > 3][:300]
    gold = overlap.__reward__.gold  # type: ignore[attr-defined]
    args = {"metric": metric, "column": "output"}
    best = overlap([Sample(gold(row, column="output"), row=row) for row in rows], **args)  # type: ignore[arg-type]
    others = [rows[i - 1]["output"] for i in range(len(rows))]
    other = overlap([Sample(t, row=row) for t, row in zip(others, rows, strict=True)], **args)  # type: ignore[arg-type]
    assert best == pytest.approx([1.0] * len(rows))
    differing = [o for o, t, row in zip(other, others, rows, strict=True) if t.lower() != row["output"].lower()]
    assert max(differing) < 1.0
    assert sum(other) / len(other) < 0.4


@pytest.mark.realdata
def test_real_solutions_repeat_little_and_their_echo_much(shared_data: Path) -> None:
    with (shared_data / "text/gsm8k/test.jsonl").open(encoding="utf-8") as lines:
        answers = [json.loads(line)["answer"] for line in lines][:300]
    plain = repetition([Sample(a) for a in answers])
    echo = repetition([Sample(" ".join([a] * 3)) for a in answers])
    assert sum(plain) / 300 > -0.1
    assert all(e < -0.6 and e < p for e, p in zip(echo, plain, strict=True))
