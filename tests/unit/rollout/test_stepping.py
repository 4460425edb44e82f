"""The thread that steps an engine: what it answers, in which order, and what it says when the engine fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from align.errors import AlignError, EngineError, SetupError
from align.protocols.fleet import Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from rollout.base import EngineSpec, Request
from rollout.stepping import Abandon, Refusal, Report, Stepper, answered
from tests.unit.rollout.stub_engine import StubEngine

LIMIT_S = 30.0


def version(number: int, path: str = "somewhere") -> Publication:
    return Publication(number, "adapter", path, f"digest {number}")


def requests(*tickets: int, do: str = "") -> list[Request]:
    items = [PromptItem(t, np.arange(4), seed=t, row={"do": do}) for t in tickets]
    return [Request(item.group_id, item, 2, Sampling(max_tokens=3)) for item in items]


@contextmanager
def stepper(**options: Any) -> Iterator[Stepper]:
    made = Stepper(lambda: StubEngine(EngineSpec(name="stub", folder="", engine=options)))
    try:
        yield made
    finally:
        made.close()


class Heard:
    """Everything that a stepper has reported so far."""

    def __init__(self, made: Stepper):
        self.made = made
        self.finished: dict[int, Any] = {}
        self.published: list[tuple[int, str | AlignError]] = []
        self.last = Report()

    def until(self, condition: Any) -> Heard:
        deadline = time.monotonic() + LIMIT_S
        while not condition(self):
            assert time.monotonic() < deadline, "nothing was reported"
            self.last = self.made.report(0.1)
            assert not self.finished.keys() & dict(self.last.finished).keys(), "a group was reported twice"
            self.finished.update(self.last.finished)
            self.published += self.last.published
        return self

    def versions(self, ticket: int) -> set[int]:
        return {int(v) for completion in self.finished[ticket].completions for v in completion.versions}


def test_each_group_is_reported_once_and_a_prompt_that_cannot_be_sampled_is_too() -> None:
    with stepper(per_step=2) as made:
        heard = Heard(made)
        made.give(version(1))
        made.give([*requests(0, 1, 2), *requests(3, do="refuse")])
        heard.until(lambda h: len(h.finished) == 4)
        assert heard.published == [(1, "digest 1")]
        assert heard.versions(0) == {1}
        assert heard.finished[3] == Refusal("too long", "a prompt too long")
        assert heard.until(lambda h: not h.last.busy).last.progress >= 4


def test_a_group_has_the_prompt_that_its_completions_follow() -> None:
    asked = requests(0)[0]
    for options, ids in (({}, [0, 1, 2, 3]), ({"begins": [7, 8]}, [0, 1, 2, 3, 7, 8])):
        with stepper(**options) as made:
            made.give(version(1))
            made.give([asked])
            result = Heard(made).until(lambda h: 0 in h.finished).finished[0]
        group = answered(asked, result)
        assert isinstance(group, Group) and group.prompt.token_ids.tolist() == ids
        assert (result.prompt_ids is None) == (not options), "a prompt as it was asked is not sent back"
        assert [medium.start for medium in group.prompt.media] == ([4] if options else [])


def test_requests_given_after_a_version_are_sampled_from_it_and_those_before_are_not() -> None:
    with stepper(per_step=1, step_s=0.01) as made:
        for number in range(1, 6):
            made.give(version(number))
            made.give(requests(10 * number, 10 * number + 1))
        heard = Heard(made).until(lambda h: len(h.finished) == 10)
        assert all(heard.versions(ticket) == {ticket // 10} for ticket in heard.finished)


def test_a_version_that_must_wait_for_running_requests_holds_up_only_what_was_given_after_it() -> None:
    with stepper(per_step=1, step_s=0.01, drain=True) as made:
        made.give(version(1))
        made.give(requests(0, 1, 2))
        made.give(version(2))
        made.give(requests(3))
        heard = Heard(made).until(lambda h: len(h.published) == 2)
        assert heard.finished.keys() >= {0, 1, 2}
        assert heard.until(lambda h: 3 in h.finished).versions(3) == {2}


def test_a_report_comes_while_a_step_takes_long_and_shows_that_nothing_moves() -> None:
    with stepper(step_s=1.5) as made:
        made.give(version(1))
        heard = Heard(made).until(lambda h: h.published)
        made.give(requests(0))
        heard.until(lambda h: h.last.busy)
        first, second = made.report(0.05), made.report(0.05)
        assert first.busy and second.busy and first.progress == second.progress
        heard.until(lambda h: 0 in h.finished)


def test_abandoned_requests_are_not_computed() -> None:
    with stepper(per_step=1, step_s=0.05) as made:
        made.give(version(1))
        made.give(requests(*range(50)))
        made.give(Abandon(tuple(range(1, 50))))
        heard = Heard(made).until(lambda h: h.published and not h.last.busy)
        assert len(heard.finished) < 10


def test_a_version_that_is_refused_is_reported_and_the_engine_goes_on_with_the_one_before() -> None:
    with stepper() as made:
        made.give(version(1))
        made.give(version(2, "refused"))
        made.give(requests(0))
        heard = Heard(made).until(lambda h: 0 in h.finished)
        assert heard.versions(0) == {1}
        (_, _), (number, error) = heard.published
        assert number == 2 and isinstance(error, EngineError) and "not applied" in error.what


@pytest.mark.parametrize(
    ("do", "error", "failure"),
    [("raise", None, "ValueError: the kernel is on fire"), ("diverge", "the policy has diverged", None)],
)
def test_what_ends_an_engine_is_reported_as_ours_or_as_a_failure(
    do: str, error: str | None, failure: str | None
) -> None:
    with stepper(per_step=1) as made:
        made.give(version(1))
        made.give([*requests(0), *requests(1, do=do), *requests(2)])
        heard = Heard(made).until(lambda h: h.last.error or h.last.failure)
        assert heard.last.failure == failure
        assert (heard.last.error and heard.last.error.what) == error
        assert heard.finished.keys() == {0}


def test_an_engine_that_does_not_start_says_why_in_the_callers_thread() -> None:
    with pytest.raises(SetupError, match="no such engine"), stepper(start="fails"):
        pass
