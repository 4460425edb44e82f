"""How the layout that fits a source is found: by the columns of its rows, or under a guess.

Among the layouts of the stage's kind whose columns a row has, the one that uses the most columns is the row's own when
its columns include all the others'; otherwise the row is ambiguous. The source's layout is the one that most of its
rows have, so that no row decides for the others: a row that is laid out in another way is refused alone. Where most
rows are ambiguous the user chooses with `format:` or `columns:`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from align.data.formats.base import Layout, Row, is_number
from align.data.formats.guess import examples, guess
from align.data.formats.guessed import Guess, Unguessed
from align.data.formats.needed import ANSWERED, asked_as_text, beside_text, choices_beside
from align.data.records import Kind, RowError
from align.errors import DataError

SAMPLE = 1000  # rows that are asked for their layout: as many as `align check` reads


def choose(
    layouts: Sequence[Layout],
    kind: Kind,
    rows: Sequence[Row],
    *,
    where: str,
    format: str | None = None,
    mapped: frozenset[str] = frozenset(),
) -> tuple[Layout, Guess | None]:
    """The layout that most of these rows have; and the guess under which they have it, where their own names fit none
    or leave out what the guess reads as well.

    mapped: fields named by `columns:`; the layout must use all of them. Raises DataError where none or several fit.
    """
    layout = fitting(layouts, kind, rows, where=where, format=format, mapped=mapped)
    if not mapped and format is None:
        _refuse_nodes(rows[:SAMPLE], where)
    if layout is not None and (mapped or format is not None):
        return layout, None
    allowed = [x for x in layouts if format is None or format in x.formats]
    try:
        found = guess(allowed, kind, rows[:SAMPLE])
    except Unguessed as why:
        if layout is not None and not layout.gives_way:
            _refuse_two_meanings(layout, kind, rows[:SAMPLE], where)
            return layout, None
        raise DataError(why.what, where=where, remedy=why.remedy) from None
    if found is not None and not mapped <= {*found.columns.values(), *found.layout.columns}:
        found = None
    if layout is not None:
        read = set(found.columns.values()) if found is not None else set()
        if found is not None and layout.required <= read and not read <= layout.columns:
            return found.layout, found
        _refuse_two_meanings(layout, kind, rows[:SAMPLE], where)
        return layout, None
    if found is None:
        raise none_fits(layouts, kind, rows, where=where, format=format)
    return found.layout, found


def _refuse_two_meanings(layout: Layout, kind: Kind, rows: Sequence[Row], where: str) -> None:
    """Raises DataError where a question that is a text stands beside a text that it may depend on, as a `context`: the
    question is read as it stands, and an answer would be learnt without what it was given to. Of prompts it is named.
    And where an answer may be the number of a choice that stands beside it."""
    asked = asked_as_text(layout.required)
    if asked is None:
        return
    shown, _ = examples(rows)
    for answer in (name for name in ANSWERED if name in layout.columns and is_number(shown.get(name))):
        if (beside := choices_beside(shown[answer], shown, layout.columns)) is not None:
            raise DataError(
                f"`{answer}` is the number {shown[answer]}: it may be the answer, or say which of {beside} is",
                where=where,
                remedy=f"`columns: {{{answer}: {answer}}}` where it is the answer; a function of the row (`format: "
                "mine.py:rows`) can write the choices into the question",
            )
    if kind != "prompt" and (beside := beside_text(layout.columns, asked, rows)) is not None:
        raise DataError(
            f"two meanings are possible: the prompt is `{asked}` alone, or `{beside}` and `{asked}` together",
            where=where,
            remedy=f"`columns: {{{asked}: {asked}}}` leaves it out; a generator (file.py:function) puts both into one "
            "text",
        )


_NODE = frozenset({"message_id", "parent_id", "text", "role"})


def _refuse_nodes(rows: Sequence[Row], where: str) -> None:
    """Raises DataError where a row is one message, which names the one that it answers (Open-Assistant's tables)."""
    if rows and all(row.keys() >= _NODE for row in rows):
        raise DataError(
            "each row is one message of a conversation, and `parent_id` the message that it answers",
            where=where,
            remedy="take the file of whole trees (`message_tree_id`, `prompt` with its `replies`), or join the "
            "messages by a generator (file.py:function)",
        )


def fitting(
    layouts: Sequence[Layout],
    kind: Kind,
    rows: Sequence[Row],
    *,
    where: str,
    format: str | None = None,
    mapped: frozenset[str] = frozenset(),
) -> Layout | None:
    """The one layout of `kind` that most of these rows have. The first thousand are asked, all where none of them fits.

    mapped: fields named by `columns:`; the layout must use all of them. Raises DataError where several fit.
    """
    known = sorted({name for layout in layouts for name in layout.formats})
    if format is not None and format not in known:
        near = difflib.get_close_matches(format, known, n=1)
        raise DataError(
            f"unknown format {format!r} (known: {', '.join(known)})",
            where=where,
            remedy=f"did you mean {near[0]!r}?" if near else "leave `format:` out to have it detected",
        )
    of_kind = candidates(layouts, kind, format, mapped)
    best = _most_common(of_kind, rows[:SAMPLE]) or _most_common(of_kind, rows[SAMPLE:])
    if len(best) > 1:
        names = ", ".join(sorted(_found(rows)))
        raise DataError(
            f"several layouts fit the columns {names}: {'; '.join(x.describe() for x in best)}",
            where=where,
            remedy="choose with `format:`, or name the columns with `columns:`",
        )
    return best[0] if best else None


def _found(rows: Sequence[Row]) -> set[str]:
    return {name for row in rows for name, value in row.items() if value is not None}


def none_fits(
    layouts: Sequence[Layout], kind: Kind, rows: Sequence[Row], *, where: str, format: str | None = None
) -> DataError:
    """What to say where no layout fits."""
    of_kind = candidates(layouts, kind, format)
    offered = ", ".join(sorted({f"{x.name} (of a {x.kind})" for x in layouts}))
    none = f"a layout of a {kind}; yours: {offered}" if format is None else f"format {format!r} has no layout for it"
    expected = "; ".join(x.describe() for x in of_kind) or none
    fit = [
        _STAGES[other] for other in _STAGES if other != kind and _most_common(candidates(layouts, other), rows[:SAMPLE])
    ]
    elsewhere = f"as they are they fit {' or '.join(fit)}. Else " if fit else ""
    return DataError(
        f"no layout for {_STAGES[kind]} fits the columns found: {', '.join(sorted(_found(rows))) or 'none'}",
        where=where,
        remedy=f"{elsewhere}expected one of: {expected}. Map yours with `columns: {{our_field: your_column}}`",
    )


def candidates(
    layouts: Sequence[Layout], kind: Kind, format: str | None = None, mapped: frozenset[str] = frozenset()
) -> list[Layout]:
    """The layouts of a kind that `format:` and `columns:` allow."""
    return [x for x in layouts if x.kind == kind and (format is None or format in x.formats) and mapped <= x.columns]


def _most_common(layouts: Sequence[Layout], rows: Sequence[Row]) -> list[Layout]:
    """What most rows have as `own_layouts`; of equally many, what uses more columns, then what comes first."""
    votes: dict[tuple[int, ...], int] = {}
    for row in rows:
        own = own_layouts(layouts, row)
        if own:
            key = tuple(i for i, layout in enumerate(layouts) if layout in own)
            votes[key] = votes.get(key, 0) + 1
    if not votes:
        return []
    uses = {key: max(len(layouts[i].required) for i in key) for key in votes}
    best = max(votes, key=lambda key: (votes[key], uses[key]))
    return [layouts[i] for i in best]


def own_layouts(layouts: Sequence[Layout], row: Row) -> list[Layout]:
    """The layouts that fit one row and are not part of another that does; none where no layout fits it."""
    found = {name for name, value in row.items() if value is not None}
    fitting = [x for x in layouts if x.required <= found and x.fits(row)]
    fitting = [x for x in fitting if not x.gives_way] or fitting
    fitting = [x for x in fitting if not any(x.required < other.required for other in fitting)]
    return [x for x in fitting if not _is_repeated(x, fitting, row)] if len(fitting) > 1 else fitting


def _is_repeated(layout: Layout, others: Sequence[Layout], row: Row) -> bool:
    """Whether the one text that a layout of prompts needs is a turn of the messages that another reads: both mean the
    same, and the messages say more (Magpie, no_robots)."""
    if layout.kind != "prompt" or len(layout.required) != 1 or not isinstance(text := row[min(layout.required)], str):
        return False
    lists = (row[name] for other in others for name in other.required if isinstance(row[name], list))
    return any(
        isinstance(turn, Mapping) and text.strip() in (str(turn.get(key)).strip() for key in ("content", "value"))
        for turns in lists
        for turn in turns
    )


def refuse_stray(layout: Layout, layouts: Sequence[Layout], row: Row) -> None:
    """Raise RowError for a row that lacks a column of the source's layout, or has those of another beside them.

    layouts: the `candidates` that `layout` was chosen of.
    """
    missing = [name for name in sorted(layout.required) if row.get(name) is None]
    if missing:
        have = ", ".join(sorted(name for name, value in row.items() if value is not None)) or "nothing"
        raise RowError(f"no `{missing[0]}` (layout {layout.name}); the row has: {have}")
    own = own_layouts(layouts, row)
    if own and own != [layout]:
        others = "; ".join(x.describe() for x in own if x is not layout)
        raise RowError(
            f"the row has the columns of another layout ({others}) than most rows of its source ({layout.describe()})"
        )


_STAGES: dict[Kind, str] = {
    "conversation": "an sft stage (conversations)",
    "pair": "a preference stage (pairs)",
    "unpaired": "unpaired preferences (completion and label)",
    "prompt": "an online stage (prompts)",
    "labelled": "a classify stage (labelled texts)",
}
