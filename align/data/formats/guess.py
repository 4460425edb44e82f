"""Other people's names for our columns, where no layout fits the names that are there.

A guess is a `columns:` mapping that nobody had to write. It is made only where one meaning is possible: of every role
(question, answer, better and worse side, label, ...) exactly one column is there, and no column is left over that the
model would have to see to answer (a context, choices). It is told with the report, and two meanings are refused with
both. Text under a guessed name is a turn of a chat, so the template applies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from align.data.formats.base import MEDIA, Layout, Row, is_list_of, is_number
from align.data.formats.guessed import Columns, Guess, Unguessed, refuse_framed, refuse_order, refuse_unjudged
from align.data.formats.messages import are_messages
from align.data.formats.needed import ANSWERED, choices_beside, names_one, needed, plain_name, stands_in
from align.data.formats.paddle import LANGUAGES
from align.data.formats.ranked import SCORES
from align.data.formats.spoken import NAMES as SPOKEN
from align.data.formats.spoken import are_spoken
from align.data.records import Kind

QUESTIONS = (
    "query", "question", "problem", "prompt", "instruction", "input", "inputs", "user", "human", "user_prompt",
    "user_input", "user_message", "user_query", "src",
)  # fmt: skip
LAST_QUESTIONS = ("prompts", "questions", "queries")
ANSWERS = (
    "response", "answer", "solution", "output", "completion", "target", "targets", "reply", "assistant", "gpt", "bot",
    "assistant_response", "assistant_message", "model_response", "model_answer", "final_answer", "tgt",
    "generated_solution",
)  # fmt: skip
LAST_ANSWERS = (
    "std_answer", "standard_answer", "reference_answer", "gold_answer", "golden_answer", "correct_answer",
    "ground_truth", "groundtruth", "canonical_solution", "reference_solution", "gold", "responses", "answers",
    "completions",
)  # fmt: skip
"""What is an answer only where no column has a better name for one, or is a side of a pair."""
TURNS = (
    "messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns", "trajectory", "traj", "items",
    "trace", "chat_messages", "contents", "messages_json", "conversation_json", "conversations_json",
)  # fmt: skip
SIDES = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_answer", "rejected_answer"),
    ("chosen_messages", "rejected_messages"), ("chosen_conversation", "rejected_conversation"),
    ("response_chosen", "response_rejected"), ("response_j", "response_k"), ("response_w", "response_l"),
    ("answer_w", "answer_l"), ("completion_w", "completion_l"), ("output_w", "output_l"), ("y_w", "y_l"),
    ("win", "lose"), ("winner", "loser"), ("preferred", "dispreferred"), ("preferred", "rejected"),
    ("preferred_response", "dispreferred_response"), ("better", "worse"), ("better_response", "worse_response"),
    ("accepted", "rejected"), ("good", "bad"), ("positive", "negative"),
    ("answer_matching_behavior", "answer_not_matching_behavior"),
)  # fmt: skip
_ANSWER_WORDS = ("output", "response", "answer", "completion", "candidate", "reply", "generation")
FIRST_AND_SECOND = {
    ("answer_1", "answer_2"): tuple((f"{w}_{a}", f"{w}_{b}") for w in _ANSWER_WORDS for a, b in ("12", "ab")),
    ("answer_0", "answer_1"): tuple((f"{w}_0", f"{w}_1") for w in _ANSWER_WORDS),
}
VERDICTS = (
    "preference", "preferred", "winner", "better", "choice", "verdict", "human_preference", "chosen",
    "preferred_response", "preferred_answer", "better_response", "better_response_id", "safer_response_id",
)  # fmt: skip
_LONGEST_VERDICT = len("completion_a")
LISTS = ("responses", "answers", "completions", "candidates", "outputs", "generations")
LABELS = ("label", "kto_tag", "is_desirable", "desirable", "is_preferred", "is_chosen", "is_good", "thumbs_up", "liked")
LAST_LABELS = ("tag", "is_correct", "correct", "accepted")
TEXTS = ("text", "sentence", "review", "content", "comment", "tweet", "utterance", "document", "message", "prompt")
TEXT_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"))
CLASSES = ("label", "labels")
LAST_CLASSES = ("class", "category", "sentiment", "intent", "emotion", "topic", "target", "tag")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
MEDIA_NAMES = {
    "images": (
        "image_path", "image_paths", "image_url", "image_urls", "image_file", "img", "img_path", "picture", "photo",
    ),
    "videos": ("video_path", "video_paths", "video_url", "video_file"),
    "audios": ("audio_path", "audio_paths", "audio_url", "audio_file", "sound", "wav", "speech"),
}  # fmt: skip


def read_under_a_guess(name: str) -> bool:
    """Whether a guess would have read a column of this name, or refused to leave it out."""
    plain = plain_name(name)
    return needed(name) or plain in SYSTEMS or plain in MEDIA or any(plain in names for names in MEDIA_NAMES.values())


def guess(layouts: Sequence[Layout], kind: Kind, rows: Sequence[Row]) -> Guess | None:
    """The one meaning that the columns of these rows can have; None where they have none that is known. layouts: that
    may be used. Raises Unguessed where they have several, or where a column would be left out that matters."""
    shown, common = examples(rows)
    named = _by_name(shown)
    found: list[Guess] = []
    for columns in _meanings(kind, named, shown):
        extra = _beside_it(named, shown, columns)
        layout = next((x for x in layouts if x.kind == kind and _takes(x, columns, shown, common)), None)
        if layout is not None:
            found.append(Guess(layout, {**columns, **extra}))
    found = [one for one in found if not any(_within(one, other) for other in found)]
    if len(found) > 1:
        several = " or ".join(one.describe() for one in found[:3])
        raise Unguessed(f"the columns can be read in several ways: {several}", "write the one that is meant")
    if not found:
        if kind == "pair":
            refuse_unjudged(named, FIRST_AND_SECOND)
            refuse_order(named, LISTS)
        return None
    [one] = found
    refuse_framed(one, shown)
    used = set(one.columns.values())
    _refuse_choices(one, shown)
    if plain_name(one.columns.get("query", "")) == "src" and (tongue := _of(named, LANGUAGES)):
        raise Unguessed(
            f"`{tongue[0]}` beside `src` says that it may be a text that is translated, and no column asks for it",
            "a function of the row (`format: mine.py:rows`) can put both into one question",
        )
    known = set(_answers(named)) if kind == "prompt" else set()  # the answer, which none is asked for
    asked = one.columns.get("query", one.columns.get("instruction", ""))
    left = [name for name in shown if needed(name) and name not in used | known]
    left = [name for name in left if not all(stands_in(row.get(name) or "", row.get(asked)) for row in rows)]
    if left:
        raise Unguessed(
            f"{one.describe()} fits, but would leave out {', '.join(f'`{name}`' for name in left)}, which the answer "
            "may depend on",
            "write that mapping to leave it out; a generator (file.py:function) puts both into one text",
        )
    return one


def _refuse_choices(one: Guess, shown: Mapping[str, Any]) -> None:
    """Raises Unguessed where the answer may be the number or the letter of a choice, which stands beside it."""
    for theirs in (one.columns[ours] for ours in ANSWERED if ours in one.columns):
        answer = shown[theirs]
        beside = choices_beside(answer, shown, set(one.columns.values())) if names_one(answer) else None
        if beside is not None:
            said = f"the number {answer}" if is_number(answer) else repr(answer)
            raise Unguessed(
                f"`{theirs}` is {said}: it may be the answer, or say which of {beside} is",
                f"write {one.describe()} where it is the answer; else a function of the row "
                "(`format: mine.py:rows`) can write the choices into the question",
            )


# ------------------------------------------------------------------------------------------------- what is there


def examples(rows: Sequence[Row]) -> tuple[dict[str, Any], set[str]]:
    """The first value of each column that holds something, and the columns that do in most rows."""
    shown: dict[str, Any] = {}
    filled: Counter[str] = Counter()
    for row in rows:
        for name, value in row.items():
            if value is not None and value != "" and value != []:
                shown.setdefault(name, value)
                filled[name] += 1
    return shown, {name for name, count in filled.items() if 2 * count > len(rows)}


def _by_name(shown: Mapping[str, Any]) -> dict[str, list[str]]:
    """Their columns by plain name; several where names differ in case alone."""
    named: dict[str, list[str]] = {}
    for name in shown:
        named.setdefault(plain_name(name), []).append(name)
    return named


def _of(named: Mapping[str, list[str]], names: Sequence[str], last: Sequence[str] = ()) -> list[str]:
    """Their columns of these names, or else of the last ones."""
    found = [theirs for name in names for theirs in named.get(name, ())]
    return found if found or not last else _of(named, last)


def _shown(named: Mapping[str, list[str]], shown: Mapping[str, Any], name: str) -> Any:
    """The value of the one column of this name."""
    return shown[named[name][0]] if len(named.get(name, ())) == 1 else None


# ------------------------------------------------------------------------------------------------- what it may mean


def _meanings(kind: Kind, named: Mapping[str, list[str]], shown: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Every way to give the roles of a kind to the columns that are there."""
    questions, answers = _of(named, QUESTIONS, LAST_QUESTIONS), _answers(named)
    if "tgt" not in named and [plain_name(name) for name in questions] == ["src"]:  # where the row is from
        questions = []
    if any(name in MEDIA for name in named) or answers or kind != "prompt":
        questions += _of(named, ("text",))
    if kind == "conversation":
        yield from _with_answers(questions, answers, named)
        yield from ({"messages": turns} for turns in _turns(named, shown))
    elif kind == "pair":
        yield from _pairs(questions, named, shown)
    elif kind == "unpaired":
        labels = _of(named, LABELS, [name for name in LAST_LABELS if isinstance(_shown(named, shown, name), bool)])
        for columns in _with_answers(questions, answers, named):
            yield from ({**columns, "label": label} for label in labels if label not in columns.values())
        yield from ({"messages": turns, "label": label} for turns, label in product(_of(named, TURNS), labels))
        for asked, answer, label in product(_of(named, ("context",)), answers, labels):
            yield {"prompt": asked, "completion": answer, "label": label}
    elif kind == "prompt":
        yield from ({"query": question} for question in questions)
        answers = _of(named, ("expected_answer",)) or answers  # before one that a model made
        if len(answers) == 1:  # which is kept for the rewards
            yield from ({"query": question, "response": answers[0]} for question in questions)
        yield from ({"messages": turns} for turns in _turns(named, shown))
    else:
        yield from _labelled(named)


def _answers(named: Mapping[str, list[str]]) -> list[str]:
    if found := _of(named, ANSWERS):
        return found
    sides = {name for pair in (*SIDES, *(two for pairs in FIRST_AND_SECOND.values() for two in pairs)) for name in pair}
    if not sides.isdisjoint(named):
        return []
    return _of(named, LAST_ANSWERS) or (_of(named, ("code",)) if {"text", "test_list"} <= named.keys() else [])  # MBPP


def _turns(named: Mapping[str, list[str]], shown: Mapping[str, Any]) -> list[str]:
    """Columns of turns; strings are turns only under a name that says so."""
    spoken = [name for name in _of(named, SPOKEN) if are_spoken(shown[name])]
    return [name for name in _of(named, TURNS) if not are_spoken(shown[name])] + spoken


def _with_answers(
    questions: Sequence[str], answers: Sequence[str], named: Mapping[str, list[str]]
) -> Iterator[dict[str, str]]:
    for question, answer in product(questions, answers):
        yield {"query": question, "response": answer}
        if plain_name(question) == "instruction":
            more = _of(named, ("input", "context"))
            yield from ({"instruction": question, "input": one, "output": answer} for one in more)


def _pairs(
    questions: Sequence[str], named: Mapping[str, list[str]], shown: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
    sides = [two for pair in SIDES for two in product(*(named.get(name, ()) for name in pair))]
    for question, (better, worse) in product(questions, sides):
        yield {"query": question, "response": better, "rejected_response": worse}
        if plain_name(question) == "instruction":
            more = _of(named, ("input", "context"))
            yield from ({"instruction": question, "input": one, "chosen": better, "rejected": worse} for one in more)
    yield from ({"chosen": better, "rejected": worse} for better, worse in sides)
    asked = _of(named, (*TURNS, "context"))
    yield from ({"prompt": t, "chosen": b, "rejected": w} for t, (b, w) in product(asked, sides))
    also_sides = {name for pair in SIDES for name in pair}  # a text under such a name is an answer, and no verdict
    verdicts = [
        v for v in _of(named, VERDICTS) if plain_name(v) not in also_sides or len(str(shown[v])) <= _LONGEST_VERDICT
    ]
    for ours, pairs in FIRST_AND_SECOND.items():
        two = [both for pair in pairs for both in product(*(named.get(name, ()) for name in pair))]
        for question, (first, second), verdict in product(questions, two, verdicts):
            yield {"query": question, ours[0]: first, ours[1]: second, "preference": verdict}
    for question, answers in product(questions, _of(named, LISTS)):
        yield {"query": question, "responses": answers}
        for numbers, names in (("ranks", ("rank", "ranks")), ("scores", SCORES)):
            yield from ({"query": question, "responses": answers, numbers: one} for one in _of(named, names))


def _labelled(named: Mapping[str, list[str]]) -> Iterator[dict[str, str]]:
    labels = _of(named, CLASSES, LAST_CLASSES)
    for text, label in product(_of(named, TEXTS), labels):
        yield {"text": text, "label": label}
    for pair in TEXT_PAIRS:
        for first, second, label in product(*(named.get(name, ()) for name in pair), labels):
            yield {"text": first, "text_pair": second, "label": label}


# ------------------------------------------------------------------------------------------------- what may be read


def _takes(layout: Layout, columns: Columns, shown: Mapping[str, Any], common: Collection[str]) -> bool:
    """Whether a layout reads exactly these fields, from values of this kind. common: columns that most rows have."""
    if not layout.required <= columns.keys() <= layout.columns:
        return False
    if not all(columns[ours] in common for ours in layout.required):
        return False
    row = {ours: shown[theirs] for ours, theirs in columns.items()}
    if not layout.fits(row) or ("responses" in columns and not isinstance(row["responses"], list)):
        return False
    if "query" in columns or "instruction" in columns:
        texts = {ours for ours in columns if ours not in ("label", "preference", "responses", "ranks", "scores")}
        return all(isinstance(row[ours], str) or (ours in ANSWERED and is_number(row[ours])) for ours in texts)
    lists = [ours for ours in columns if ours in ("messages", "prompt", "chosen", "rejected", "completion")]
    if "prompt" in columns or ("chosen" in columns and "query" not in columns):
        said = {ours: _are_turns(row[ours]) for ours in lists}
        whole = "prompt" not in columns or said["prompt"]
        return whole and any(said.values()) and all(said[n] or isinstance(row[n], str) for n in lists)
    return True


def _are_turns(value: Any) -> bool:
    """Whether a value is a list of messages in any spelling, or one message."""
    turns = [value] if isinstance(value, dict) else value
    return are_messages(turns) or is_list_of(turns, "from")


def _beside_it(named: Mapping[str, list[str]], shown: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    """A system text and media under other names."""
    extra: dict[str, str] = {}
    systems = [name for name in _of(named, SYSTEMS) if isinstance(shown[name], str | dict)]
    if len(systems) == 1:
        extra["system"] = systems[0]
    for ours, names in MEDIA_NAMES.items():
        given = [name for name in _of(named, names) if name not in columns.values()]
        if len(given) == 1 and not any(MEDIA[known] == MEDIA[ours] for known in named if known in MEDIA):
            extra[ours] = given[0]
    return extra


def _within(one: Guess, other: Guess) -> bool:
    """Whether all that one guess reads is read by the other, and more."""
    return set(one.columns.values()) < set(other.columns.values())
