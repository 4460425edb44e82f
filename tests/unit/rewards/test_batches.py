"""Groups are never cut for what compares within them, every failed call is told, and none changes another's score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards import PluginError, RewardError, Sample
from rewards.batches import halves, jobs_of, units_of
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool

THEIRS = """
import collections
import json
from pathlib import Path
from rewards import Score, reward

def noted(keys, texts):
    sizes = collections.Counter(keys)
    with Path("calls").open("a") as file:
        file.write(json.dumps(sorted(sizes.items())) + "\\n")
    ranks = []
    for key, text in zip(keys, texts):
        others = sorted(len(t) for k, t in zip(keys, texts) if k == key)
        ranks.append(others.index(len(text)) / max(1, len(others) - 1))
    return ranks

def rank(prompts, completions, row_id, **kwargs):
    if "refused" in prompts and len(completions) > 1:
        raise RuntimeError("503 from the judge")
    return noted(row_id, completions)

async def rank_async(prompts, completions, row_id, **kwargs):
    return rank(prompts, completions, row_id)

def hiccup(prompts, completions, row_id, **kwargs):
    first = not Path("hiccup").exists()
    Path("hiccup").touch()
    if first:
        raise RuntimeError("503, only once")
    return noted(["all"] * len(completions), completions)

def of_swift(completions, row_id, **kwargs):
    if "bad" in completions:
        raise RuntimeError("no")
    return noted(row_id, completions)

@reward
def ours(samples):
    if any(s.completion == "bad" for s in samples):
        raise RuntimeError("no")
    return noted([s.group_id for s in samples], [s.completion for s in samples])

def one_for_all(prompts, completions, **kwargs):
    return [1.0]

@reward(retries=2)
def one_for_ours(samples):
    return [1.0]

@reward
def said_by_sample(samples):
    return [ValueError("too long") if s.completion == "bad" else float(len(s.completion)) for s in samples]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "theirs.py").write_text(THEIRS)
    return tmp_path


def group(number: int, size: int, prompt: str = "asked", bad: int | None = None) -> list[Sample]:
    return [
        Sample(
            "bad" if n == bad else "x" * (n + 1),
            [{"role": "text", "content": prompt}],
            {"row_id": number},
            group_id=number,
            sample_id=n,
        )
        for n in range(size)
    ]


def score(folder: Path, name: str, samples: list[Sample], signature: str = "trl", **options: object) -> PoolResult:
    options = {"max_error_rate": 1.0, "retries": 0, **options}
    spec = PluginSpec(f"theirs.py:{name}", options=options, signature=signature)  # type: ignore[arg-type]
    with RewardPool([spec], folder, 0, log_folder=folder / "logs") as pool:
        return pool.score_sync(samples)


def calls(folder: Path) -> list[dict[int, int]]:
    """Group -> samples of each call that was answered."""
    return [dict(json.loads(line)) for line in (folder / "calls").read_text().splitlines()]


def column(result: PoolResult) -> list[float | None]:
    return [row[0] for row in result.scores]


def ranks(size: int) -> list[float]:
    return [n / (size - 1) for n in range(size)]


# ------------------------------------------------------------------------------------------------- which go together


def test_calls_hold_whole_groups_and_a_larger_one_is_a_call_of_its_own() -> None:
    samples = [*group(0, 3), *group(1, 3), *group(2, 9), *group(3, 2)]
    for scope, expected in (("batch", [6, 9, 2]), ("group", [3, 3, 9, 2]), ("sample", [6, 7, 4])):
        jobs = jobs_of(units_of(samples, scope), samples, scope, batch=7)  # type: ignore[arg-type]
        assert [sum(map(len, job)) for job in jobs] == expected, scope
        assert sorted(i for job in jobs for unit in job for i in unit) == list(range(len(samples)))


def test_a_call_is_cut_between_groups_and_within_one_only_where_it_is_alone() -> None:
    samples = [*group(0, 5), *group(1, 2), *group(2, 2)]
    left, right = halves(tuple(units_of(samples, "batch")), samples)
    assert [len(u) for u in left] == [5] and [len(u) for u in right] == [2, 2]
    left, right = halves(tuple(units_of(samples, "sample")), samples)
    assert len(left) == 5 and len(right) == 4
    left, right = halves(tuple(units_of(samples[:5], "sample")), samples)
    assert len(left) == 2 and len(right) == 3


# ------------------------------------------------------------------------------------------------- functions of others


@pytest.mark.parametrize("name", ["rank", "rank_async"])
def test_a_group_larger_than_a_batch_reaches_a_trl_function_whole(folder: Path, name: str) -> None:
    result = score(folder, name, [*group(0, 80), *group(1, 80)])
    assert sorted(map(sorted, calls(folder))) == [[0], [1]] and all(80 in call.values() for call in calls(folder))
    assert column(result) == ranks(80) * 2 and not result.failed_calls


def test_a_prompt_that_is_refused_costs_its_group_and_changes_no_other_score(folder: Path) -> None:
    samples = [s for n in range(8) for s in group(n, 5, "refused" if n == 3 else "asked")]
    result = score(folder, "rank", samples)
    assert all(size == 5 for call in calls(folder) for size in call.values()), "no group is cut"
    assert column(result) == [*ranks(5) * 3, *[None] * 5, *ranks(5) * 4]
    assert result.errors == {"rank": 5} and result.metrics["reward/rank/error_rate"] == 5 / 40
    causes = {(call.cause, call.message.split(" (")[0]) for call in result.failed_calls}
    assert causes == {("raised", "RuntimeError: 503 from the judge")}
    assert result.metrics["reward/rank/failed_calls"] == len(result.failed_calls) == 4
    lines = [json.loads(line) for line in (folder / "logs" / "failed-calls.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [40, 20, 10, 5] and lines[-1]["groups"] == [3]


def test_what_fails_once_is_asked_again_as_a_whole(folder: Path) -> None:
    """Over whole calls of several groups, too: the function compares them all."""
    result = score(folder, "hiccup", [*group(0, 3), *group(1, 3)], retries=1)
    assert len(calls(folder)) == 1 and calls(folder)[0] == {"all": 6}
    assert not result.failures and result.metrics["reward/hiccup/error_rate"] == 0
    assert result.metrics["reward/hiccup/failed_calls"] == 1 and result.failed_calls[0].again == "as a whole"


def test_a_group_is_whole_for_ms_swift_too_and_for_ours_where_the_recipe_says_so(folder: Path) -> None:
    samples = [*group(0, 4), *group(1, 4, bad=2), *group(2, 4)]
    for name, signature, options in (("of_swift", "swift", {}), ("ours", "align", {"scope": "batch"})):
        result = score(folder, name, samples, signature, **options)
        assert column(result) == [*ranks(4), *[None] * 4, *ranks(4)], name
    result = score(folder, "ours", samples, "align", scope="group")
    assert column(result) == [*ranks(4), *[None] * 4, *ranks(4)]
    assert calls(folder)[-2:] == [{0: 4}, {2: 4}]


def test_a_recipe_may_say_that_a_trl_function_looks_at_samples_alone(folder: Path) -> None:
    result = score(folder, "of_swift", group(0, 4, bad=2), "swift", scope="sample")
    assert [value is None for value in column(result)] == [False, False, True, False]


def test_where_groups_fail_as_a_whole_one_group_may_always_fail(folder: Path) -> None:
    samples = [*group(0, 5), *group(1, 5, "refused")]
    assert score(folder, "rank", samples, max_error_rate=0.02).errors == {"rank": 5}
    with pytest.raises(RewardError, match=r"6 of 15 samples so far.*allows \(5\)"):
        score(folder, "rank", [*samples, *group(2, 5, "refused")], max_error_rate=0.02)
    assert (folder / "logs" / "failed-calls.jsonl").read_text().count("503") >= 5, "also where the run ends"


# ------------------------------------------------------------------------------------------------- what is returned


@pytest.mark.parametrize(
    ("name", "signature", "options"),
    [
        ("one_for_all", "trl", {}),
        ("one_for_all", "trl", {"scope": "sample"}),
        ("one_for_ours", "align", {}),
        ("one_for_ours", "align", {"scope": "group"}),
    ],
)
def test_one_score_for_a_call_is_an_error_and_not_asked_for_again(
    folder: Path, name: str, signature: str, options: dict[str, object]
) -> None:
    result = score(folder, name, [*group(0, 2), *group(1, 2)], signature, **{"retries": 2, **options})
    assert column(result) == [None] * 4
    assert {f.cause for f in result.failures} == {"wrong_length"}
    assert result.metrics[f"reward/{name}/calls"] == (2 if options.get("scope") == "group" else 1)
    assert "returned 1 results for" in result.failures[0].message


def test_a_plugin_may_say_which_samples_it_cannot_score(folder: Path) -> None:
    result = score(folder, "said_by_sample", group(0, 3, bad=1), "align")
    assert column(result) == [1.0, None, 3.0] and result.metrics["reward/said_by_sample/calls"] == 1
    assert [(f.cause, f.message) for f in result.failures] == [("raised", "ValueError: too long")]


@pytest.mark.parametrize("options", [{"scope": "all"}, {"text": "bare"}])
def test_a_scope_or_text_that_is_none_is_refused(folder: Path, options: dict[str, object]) -> None:
    with pytest.raises(PluginError, match=r"is 'sample', 'batch' or 'group'|is 'stripped' or 'raw'"):
        score(folder, "rank", group(0, 2), **options)
