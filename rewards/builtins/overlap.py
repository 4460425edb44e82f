"""How much of a reference text does the completion share? ROUGE-L, BLEU or chrF of one text, from 0 to 1.

rouge_l  (Lin 2004): F1 of precision LCS / |completion| and recall LCS / |reference|, LCS the longest common subsequence
         of words.
bleu     (Papineni et al. 2002): brevity penalty times the geometric mean of the clipped 1- to 4-gram precisions; from
         2-grams on, 1 is added to matches and totals, so that a single text without a common 4-gram is not 0 (Lin and
         Och 2004, smoothing of ORANGE). Clipped by all references together; the nearest length counts.
chrf     (Popovic 2015): F with beta = 2 of precision and recall averaged over character 1- to 6-grams without white
         space, over the orders that both texts have.

Words are runs of letters and digits in lower case (rouge_l, bleu); chrf keeps case. For languages that put no space
between words, use chrf. With several references, rouge_l and chrf take the best. Figures of sacreBLEU and rouge_score
differ by their tokenizers and, for BLEU, by smoothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import gold, gold_text, several

Metric = Literal["rouge_l", "bleu", "chrf"]

_WORD = re.compile(r"\w+")


@reward(objectives={"overlap": Objective(range=(0, 1))}, gold=gold_text)
def overlap(samples: Sequence[Sample], *, metric: Metric = "rouge_l", column: str | None = None) -> list[float]:
    """The overlap with the gold text, 1 where both are the same.

    Args:
        metric: rouge_l, bleu or chrf, as defined at the head of the file.
        column: the row's column with the reference, or a list of them; default: the first of reference_answer, answer,
            solution, ground_truth, target, label that the row has.
    """
    scores = []
    for sample in samples:
        references = several(gold(sample, column))
        if empty := [r for r in references if not _WORD.search(r)]:
            raise ValueError(f"the reference {empty[0]!r} has no words")
        scores.append(METRICS[metric](sample.completion, references))
    return scores


def rouge_l(text: str, references: Sequence[str]) -> float:
    words = _words(text)
    return max(_f1(words, _words(reference)) for reference in references)


def _f1(a: list[str], b: list[str]) -> float:
    return 2 * _common_subsequence(a, b) / (len(a) + len(b))  # F1 of LCS/|a| and LCS/|b|


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest one; the bits of one integer are the row of the usual table (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        same = row & places.get(word, 0)
        row = (row + same | row - same) & every
    return len(a) - row.bit_count()


def bleu(text: str, references: Sequence[str]) -> float:
    words, wanted = _words(text), [_words(r) for r in references]
    logs = 0.0
    for n in range(1, 5):
        said, most = _grams(words, n), Counter[Sequence[str]]()
        for reference in wanted:
            most |= _grams(reference, n)
        smooth = float(n > 1)
        matched = (said & most).total() + smooth
        if matched == 0:
            return 0.0
        logs += math.log(matched / (said.total() + smooth)) / 4
    nearest = min((abs(len(r) - len(words)), len(r)) for r in wanted)[1]
    return math.exp(min(0.0, 1 - nearest / len(words)) + logs)


def chrf(text: str, references: Sequence[str], beta: float = 2.0) -> float:
    return max(_chrf("".join(text.split()), "".join(reference.split()), beta) for reference in references)


def _chrf(said: str, wanted: str, beta: float) -> float:
    orders = range(1, min(6, len(said), len(wanted)) + 1)
    if not orders:
        return 0.0
    pairs = [(_grams(said, n), _grams(wanted, n)) for n in orders]
    precision = sum((a & b).total() / a.total() for a, b in pairs) / len(orders)
    recall = sum((a & b).total() / b.total() for a, b in pairs) / len(orders)
    if precision + recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"rouge_l": rouge_l, "bleu": bleu, "chrf": chrf}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(pieces: Sequence[str], n: int) -> Counter[Sequence[str]]:
    return Counter(tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1))
