"""What becomes of an actor's answer, failure or end, and of tables scored in parts. No Ray is started."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from align.actors import reward_actors
from align.actors.cluster import answer
from align.actors.reward_actors import RayScorer
from align.actors.scoring import join_parts
from align.errors import AlignError, DataError, LostError
from align.protocols.scorer import ErrorBudget, ScoreTable


def ask(found: BaseException | Any) -> Any:
    future: Future[Any] = Future()
    future.set_exception(found) if isinstance(found, BaseException) else future.set_result(found)
    return asyncio.run(answer(SimpleNamespace(future=lambda: future), "the judge"))


def failed(cause: Any) -> RayTaskError:
    return RayTaskError("score", "Traceback ...\nValueError: two\n", cause)


def test_an_answer_is_passed_on() -> None:
    assert ask(7) == 7


def test_our_own_errors_arrive_as_themselves() -> None:
    with pytest.raises(DataError, match="row 3"):
        ask(failed(DataError("row 3 is empty", where="data.jsonl:3", remedy="mend it")))


@pytest.mark.parametrize(
    ("cause", "kind", "said"),
    [
        (ValueError("two\nlines"), AlignError, "the judge failed: ValueError: two"),
        (ActorDiedError(), LostError, "the judge failed: ActorDiedError"),
        (OSError(28, "No space left on device", "/store/a"), AlignError, "/store/a: the judge failed: No space"),
    ],
)
def test_other_errors_name_who_failed_and_of_what(cause: Exception, kind: type[AlignError], said: str) -> None:
    with pytest.raises(kind) as caught:
        ask(failed(cause))
    assert str(caught.value).startswith(said) and "lines" not in caught.value.what
    assert isinstance(caught.value, LostError) == (kind is LostError)


def test_an_error_that_could_not_be_sent_is_told_by_what_ray_says_of_it() -> None:
    with pytest.raises(AlignError, match="the judge failed: ") as caught:
        ask(failed(None))
    assert "NoneType" not in str(caught.value)


def group(size: int) -> Any:
    return SimpleNamespace(completions=[None] * size)


def table(*scores: float, **more: Any) -> ScoreTable:
    return ScoreTable(("right",), np.array(scores, np.float32)[:, None], ("reward",), infos=({},) * len(scores), **more)


def test_tables_of_parts_become_one_in_the_order_of_the_groups() -> None:
    parts = [table(1, 2, 6, dropped=(1,), series={"s": [0.5]}), table(3, 4, 5, notes={"a": "said"})]
    joined = join_parts([group(2), group(3), group(1)], [[0, 2], [1]], parts)
    assert joined.scores[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert joined.dropped == (2,) and joined.series == {"s": [0.5]} and joined.notes == {"a": "said"}


def test_means_are_weighted_by_their_counts_and_one_that_a_part_lacks_adds_nothing_to_them() -> None:
    one = table(1, 1, metrics={"m": 1.0, "sum": 2.0}, counts={"m": 3.0})
    other, without = table(2, metrics={"m": 5.0, "sum": 1.0}, counts={"m": 1.0}), table(3)
    joined = join_parts([group(2), group(1), group(1)], [[0], [1], [2]], [one, other, without])
    assert joined.metrics == {"m": 2.0, "sum": 3.0} and joined.counts == {"m": 4.0}


class Judge:
    """A reward actor that scores every completion 1, and keeps the budgets that it was given."""

    def __init__(self) -> None:
        self.budgets: list[ErrorBudget | None] = []
        self.score = SimpleNamespace(remote=self._score)

    def _score(self, groups: Any, budget: ErrorBudget | None) -> Any:
        self.budgets.append(budget)
        future: Future[Any] = Future()
        future.set_result(table(*[1.0] * sum(len(one.completions) for one in groups)))
        return SimpleNamespace(future=lambda: future)


@pytest.mark.parametrize("count", [1, 2])
def test_several_actors_share_one_error_budget_and_a_single_one_keeps_its_own(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_, **__: Judge()))
    monkeypatch.setattr(reward_actors.ray, "remote", lambda _: made)
    scorer = RayScorer((), tmp_path, seed=0, placements=({},) * count)
    for _ in range(2):
        scores = asyncio.run(scorer.score([group(3), group(2)]))
        assert scores.scores[:, 0].tolist() == [1.0] * 5
    budgets = [judge.budgets for judge in scorer.actors]
    if count == 1:
        assert budgets == [[None, None]]
        return
    assert budgets[0] == budgets[1] and [budget.samples for budget in budgets[0]] == [5, 5]
    assert budgets[0][0].id != budgets[0][1].id, "each step has its own"
