"""What the trainer answers when its ranks do not agree. Futures stand in for Ray's references; no Ray is started."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest

from align.actors import policy
from align.actors.policy import RayTrainer
from align.errors import AlignError, DataError, NonFiniteError, RanksError


class Reference:
    """A call that has answered, failed, or is under way (None)."""

    def __init__(self, found: Any = None):
        self._future: Future[Any] = Future()
        if isinstance(found, BaseException):
            self._future.set_exception(found)
        elif found is not None:
            self._future.set_result(found)

    def future(self) -> Future[Any]:
        return self._future


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(policy.ray, "kill", found.append)
    monkeypatch.setattr(policy, "TOGETHER_LIMIT_S", 0.05)
    monkeypatch.setattr(policy, "CAUSE_LIMIT_S", 0.2)
    return found


def ask(*answers: Any) -> Any:
    trainer = RayTrainer([f"actor {rank}" for rank in range(len(answers))], "dpo", "reference")
    return asyncio.run(trainer._answers([Reference(found) for found in answers]))


def test_rank_0_answers_for_all(killed: list[str]) -> None:
    assert ask({"loss/total": 1.0}, "not asked") == {"loss/total": 1.0}
    assert ask("alone") == "alone"
    assert killed == []


def test_an_error_of_one_rank_ends_the_others_who_would_wait_for_it(killed: list[str]) -> None:
    begun = time.monotonic()
    with pytest.raises(DataError, match="row 7"):
        ask(None, DataError("row 7 is empty"), None)
    assert killed == ["actor 0", "actor 1", "actor 2", "reference"] and time.monotonic() - begun < 5


def test_the_cause_is_reported_and_not_its_echo(killed: list[str]) -> None:
    with pytest.raises(AlignError, match="rank 1 died"):
        ask(RanksError("rank 0 of 2 lost the others"), AlignError("rank 1 died"))
    assert killed, "they are no longer in step"


def test_ranks_that_lost_one_which_says_nothing_are_not_waited_for_forever(killed: list[str]) -> None:
    with pytest.raises(RanksError, match="lost the others"):
        ask(RanksError("rank 0 of 2 lost the others"), None)
    assert killed


def test_an_error_that_all_ranks_share_leaves_them_in_step(killed: list[str]) -> None:
    with pytest.raises(NonFiniteError):
        ask(*[NonFiniteError("3 steps in a row") for _ in range(3)])
    assert killed == []


class Resting:
    """An actor that says how its rest went; None: it never answers."""

    def __init__(self, rests: bool | BaseException | None):
        self.rest, self.answer = self, rests

    def remote(self) -> Reference:
        return Reference(self.answer)


@pytest.mark.parametrize(
    "call, rests, stays",
    [
        (1.0, True, True),
        (1.0, False, False),
        (1.0, AlignError("it died"), False),
        (1.0, None, False),
        (DataError("row 7 is empty"), True, False),
    ],
)
def test_a_trainer_whose_calls_all_went_well_leaves_its_process_to_the_next(
    killed: list[Any], monkeypatch: pytest.MonkeyPatch, call: Any, rests: bool | BaseException | None, stays: bool
) -> None:
    monkeypatch.setattr(policy, "REST_LIMIT_S", 0.05)
    left: list[Any] = []
    actor = Resting(rests)

    async def use() -> None:
        trainer = RayTrainer([actor], "dpo", leave=left.append)
        with suppress(DataError):
            await trainer._answers([Reference(call)])
        await trainer.close()
        await trainer.close()

    asyncio.run(use())
    assert left == [actor if stays else None]
    assert stays != (actor in killed)
