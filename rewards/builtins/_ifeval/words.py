"""IFEval's instructions on keywords, language, length and case.

Definitions of google-research/instruction_following_eval/instructions.py, with these differences: keywords are texts,
not regular expressions; sentences and capital words are told by the rules below instead of NLTK's trained models; the
language is told by `rewards.builtins._language` instead of langdetect, and where that cannot tell, a text counts as
English for the case of letters, and as no language for `response_language`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.builtins._language import detect

_BEFORE_NAMES = r"\b(?:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e|approx|vol|capt|gen|rep|sen)|(?:\A|[\s(])[a-z]"
_ITEM = r"(?:\A|\n)[ \t*#-]*\d{1,3}"
_NO_END = re.compile(rf"(?:{_BEFORE_NAMES}|{_ITEM})\.\Z", re.IGNORECASE)
_PERHAPS_END = re.compile(r"(?:\b(?:inc|ltd|co|jr|sr|etc|ph\.d)|\.[a-z])\.\Z", re.IGNORECASE)
# What ends a sentence, with the quotes and brackets that close after it; no full stop within a word or a number.
_STOP = re.compile(r"(?:[.!?…]+[\"')\]”’*_]*(?=\s|\Z)|[。！？।۔؟]+)")
# Words with the hyphens and apostrophes inside them, as NLTK leaves the first and we the second.
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


def compare(count: int, relation: str, limit: int) -> bool:
    """IFEval's two relations."""
    return count < limit if relation == "less than" else count >= limit


def existence(text: str, *, keywords: Sequence[str]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return compare(len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, *, language: str) -> bool:
    return detect(text) == language


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return compare(count_sentences(text), relation, num_sentences)


def count_sentences(text: str) -> int:
    """Stretches with a letter or digit that end in a stop or with the text; "Dr. No paid $1.50 at 5 a.m." is one, and
    so are lines without a stop. The number of a list's item ("1.") ends none."""
    count, start = 0, 0
    for stop in _STOP.finditer(text):
        if stop[0] == "." and _abbreviates(text, start, stop.end()):
            continue
        if any(letter.isalnum() for letter in text[start : stop.end()]):
            count, start = count + 1, stop.end()
    return count + any(letter.isalnum() for letter in text[start:])


def _abbreviates(text: str, start: int, end: int) -> bool:
    """Whether the full stop before `end` ends a word only; "etc." ends a sentence too where a capital follows."""
    begin = max(start, end - 12)
    if _NO_END.search(text, begin, end):
        return True
    return bool(_PERHAPS_END.search(text, begin, end)) and not text[end : end + 3].lstrip()[:1].isupper()


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    return compare(len(re.findall(r"\w+", text)), relation, num_words)


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return compare(sum(word.isupper() for word in _WORD.findall(text)), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and detect(text) in ("en", None)


def english_lowercase(text: str) -> bool:
    return text.islower() and detect(text) in ("en", None)
