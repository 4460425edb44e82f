"""The table of IFEval's kinds, their arguments, and the strict and the loose reading of a response."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.builtins._ifeval import layout, words
from rewards.builtins._language import check_language

Check = Callable[..., bool]
KINDS: dict[str, Check] = {
    "keywords:existence": words.existence,
    "keywords:frequency": words.frequency,
    "keywords:forbidden_words": words.forbidden_words,
    "keywords:letter_frequency": words.letter_frequency,
    "language:response_language": words.response_language,
    "length_constraints:number_sentences": words.number_sentences,
    "length_constraints:number_paragraphs": layout.number_paragraphs,
    "length_constraints:number_words": words.number_words,
    "length_constraints:nth_paragraph_first_word": layout.nth_paragraph_first_word,
    "detectable_content:number_placeholders": layout.number_placeholders,
    "detectable_content:postscript": layout.postscript,
    "detectable_format:number_bullet_lists": layout.number_bullet_lists,
    "detectable_format:constrained_response": layout.constrained_response,
    "detectable_format:number_highlighted_sections": layout.number_highlighted_sections,
    "detectable_format:multiple_sections": layout.multiple_sections,
    "detectable_format:json_format": layout.json_format,
    "detectable_format:title": layout.title,
    "combination:two_responses": layout.two_responses,
    "combination:repeat_prompt": layout.repeat_prompt,
    "startend:end_checker": layout.end_checker,
    "startend:quotation": layout.quotation,
    "change_case:capital_word_frequency": words.capital_word_frequency,
    "change_case:english_capital": words.english_capital,
    "change_case:english_lowercase": words.english_lowercase,
    "punctuation:no_comma": layout.no_comma,
}
_RELATIONS = ("less than", "at least")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One verifiable instruction: its kind, and the arguments of its check."""

    kind: str
    kwargs: Mapping[str, Any]

    def followed_by(self, text: str) -> bool:
        """An empty response follows nothing."""
        return bool(text.strip()) and KINDS[self.kind](text, **self.kwargs)


def parse(kinds: Sequence[str], kwargs: Sequence[Mapping[str, Any] | None]) -> list[Instruction]:
    """A row's instructions. Arguments that are null are left out: tables of one layout for all kinds have many.

    Raises:
        ValueError: an unknown kind, or an argument that is unknown, missing or of the wrong type or value.
    """
    if isinstance(kinds, str) or not kinds or len(kinds) != len(kwargs):
        raise ValueError(f"{kinds!r} with {len(kwargs)} kwargs: IFEval needs a list of kinds, and kwargs for each")
    return [_instruction(kind, given or {}) for kind, given in zip(kinds, kwargs, strict=True)]


def _instruction(kind: str, given: Mapping[str, Any]) -> Instruction:
    if kind not in KINDS:
        raise ValueError(f"IFEval has no instruction {kind!r}; it has: {', '.join(KINDS)}")
    settled = {name: value for name, value in given.items() if value is not None}
    hints = list(inspect.signature(KINDS[kind]).parameters.values())[1:]
    wanted = {p.name: str(p.annotation) for p in hints}
    unknown, missing = sorted(set(settled) - set(wanted)), [name for name in wanted if name not in settled]
    if unknown or missing:
        problem = f"takes no {unknown[0]!r}" if unknown else f"needs {missing[0]!r}"
        raise ValueError(f"{kind} {problem}; its kwargs: {', '.join(wanted) or 'none'}")
    return Instruction(kind, {name: _value(kind, name, wanted[name], settled[name]) for name in wanted})


def _value(kind: str, name: str, hint: str, value: Any) -> Any:
    """The value as the check takes it; whole floats, which tables with nulls make of integers, become integers."""
    if hint == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint == "Sequence[str]" and hasattr(value, "tolist"):
        value = value.tolist()
    if hint == "int":
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    else:
        texts = [value] if hint == "str" else value if isinstance(value, list | tuple) else []
        fits = bool(texts) and all(isinstance(v, str) and v for v in texts)
    if not fits or (name.endswith("relation") and value not in _RELATIONS):
        wanted = " or ".join(map(repr, _RELATIONS)) if name.endswith("relation") else hint
        raise ValueError(f"{kind}: {name} is {value!r}; {wanted} is needed")
    return check_language(value) if name == "language" else value


def follows(instruction: Instruction, response: str, *, loose: bool) -> bool:
    """Strict: the response as it is. Loose (2311.07911, section 2.2): also without its first line, its last, or both,
    and each of these without asterisks."""
    if not loose:
        return instruction.followed_by(response)
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(instruction.followed_by(v) for cut in cuts for v in (cut, cut.replace("*", "")))
