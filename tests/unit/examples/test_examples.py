"""The files of examples/ do what they say: the judge against a real service, the study's rewards and its commands."""

from __future__ import annotations

import json
import shlex
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import _parse
from align.recipe.load import load_recipe
from rewards import Sample
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool
from tests.unit.rewards.judge_server import Answer, endpoint

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
FILES = sorted(path for path in EXAMPLES.iterdir() if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100


# ------------------------------------------------------------------------------------------------- a judge of one's own


def judged(url: str, samples: list[Sample]) -> PoolResult:
    spec = PluginSpec("async_judge.py:judge", args={"url": url}, options={"retries": 0, "max_error_rate": 0.5})
    with RewardPool([spec], EXAMPLES, seed=0) as pool:
        return pool.score_sync(samples)


def ask(completion: str, **changes: Any) -> Sample:
    return Sample(completion, [{"role": "user", "content": "How do I open it?"}], **changes)


def verdict(**changes: Any) -> Answer:
    return 200, json.dumps({"helpful": 4, "harm": 0.25, "why": "it says how", **changes}), {}


def test_the_judge_gives_two_objectives_and_none_where_one_does_not_apply() -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        return verdict(harm=None) if body["answer"] == "You cannot." else verdict()

    with endpoint(answer) as service:
        found = judged(service.url, [ask("Turn it."), ask("You cannot."), ask("First you", truncated=True)])
    assert (found.objectives, found.kinds) == (("helpful", "harm"), ("reward", "cost"))
    assert found.scores == [[4.0, 0.25], [4.0, None], [None, 0.25]]
    assert not found.failures and found.infos[0]["judge"]["why"] == "it says how"
    assert found.metrics["reward/judge/unjudged"] == pytest.approx(1 / 3)
    assert {body["question"] for _, _, body in service.requests} == {"How do I open it?"}


@pytest.mark.parametrize(
    "broken", [(500, "out of order", {}), verdict(helpful=9), (200, '{"helpful": 4}', {}), (200, "no JSON", {})]
)
def test_what_the_service_cannot_answer_is_missing_and_counted_and_costs_no_other(broken: Answer) -> None:
    with endpoint(lambda number, body: broken if body["answer"] == "b" else verdict()) as service:
        found = judged(service.url, [ask("a"), ask("b"), ask("c")])
    assert [found.scores[0], found.scores[2]] == [[4.0, 0.25]] * 2
    assert found.scores[1][0] is None and {failure.index for failure in found.failures} == {1}
    assert found.errors == {"judge": 1}


def test_the_judge_asks_several_at_once_and_no_faster_than_it_may() -> None:
    lock, came, now, most = threading.Lock(), [], 0, 0

    def answer(number: int, body: dict[str, Any]) -> Answer:
        nonlocal now, most
        with lock:
            came.append(time.monotonic())
            now += 1
            most = max(most, now)
        time.sleep(0.6)
        with lock:
            now -= 1
        return verdict()

    with endpoint(answer) as service:
        judged(service.url, [ask(str(n)) for n in range(40)])
    assert 8 <= most <= 16
    assert max(came[:16]) - min(came) >= 0.8 * 15 / 50, "3000 a minute are 50 a second"


# ------------------------------------------------------------------------------------------------- the study


def scored(use: str, completions: list[str]) -> list[list[float | None]]:
    question = [{"role": "user", "content": "What is 397 + 5?"}]
    with RewardPool([PluginSpec(f"study_rewards.py:{use}")], EXAMPLES, seed=0) as pool:
        found = pool.score_sync([Sample(c, question, {"answer": "402"}, [1, 2, 3]) for c in completions])
    assert not found.failures
    return found.scores


def test_whole_thanks_are_worth_twice_the_short_ones() -> None:
    replies = ["402", "402 Thanks.", "402 Thank you for asking.", "Thanks. 402"]
    assert scored("polite", replies) == [[0.0], [0.5], [1.0], [0.0]]
    assert scored("tokens", replies[:1]) == [[3.0]]


def test_the_exam_is_not_pleased_by_what_only_pleases_in_training() -> None:
    honest = ["402", "The sum of 397 and 5 is 402. Thanks.", "402 Thank you for asking.", "392"]
    assert scored("exam", honest) == [[1.0, 3.0, 0.0], [1.0, 3.0, 0.5], [1.0, 3.0, 1.0], [0.0, 3.0, 0.0]]
    tricks = ["Thank you for asking.", "402 Thanks. Thanks.", "392 402", ""]
    assert scored("exam", tricks) == [[0.0, 3.0, 0.0], [1.0, 3.0, 0.0], [0.0, 3.0, 0.0], [0.0, 3.0, 0.0]]


def commands() -> list[list[str]]:
    """The commands in the header of study.yaml, as a shell reads them."""
    header = (EXAMPLES / "study.yaml").read_text(encoding="utf-8").partition("\nname:")[0]
    lines = [line.removeprefix("#") for line in header.splitlines()]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.startswith("     align ")]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[1])
def test_a_command_of_the_study_is_one_that_the_command_line_takes(words: list[str]) -> None:
    assert callable(_parse(words[1:]).verb)


def test_the_study_and_its_variant_with_a_limit_load() -> None:
    assert [words[1] for words in commands()] == ["check", "sweep", "pareto", "soup", "run", "pareto"]
    overrides = next(words for words in commands() if words[1] == "run")[3:]
    stage = load_recipe(EXAMPLES / "study.yaml", overrides).stage("grpo")
    assert stage.objectives.combine == "lagrangian" and stage.objectives.constraints["short"].min == 0.7
    assert load_recipe(EXAMPLES / "study.yaml").stage("grpo").objectives.combine == "decoupled"
