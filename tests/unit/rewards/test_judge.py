"""The judge against a real endpoint: what it asks, how it reads answers, and what faults of the endpoint cost."""

from __future__ import annotations

import base64
import email.utils
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rewards import PluginError, RewardError, Sample
from rewards.builtins.judge import read_answer
from rewards.find import load
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool
from tests.unit.rewards.judge_server import Answer, endpoint, says

pytestmark = pytest.mark.slow

TOLERANT = {"max_error_rate": 1.0, "retries": 0, "timeout_s": 5.0}


def score(
    url: str, samples: list[Sample], folder: Path, *, options: dict[str, Any] | None = None, **args: Any
) -> PoolResult:
    spec = PluginSpec("judge", args={"base_url": url, "model": "any", **args}, options={**TOLERANT, **(options or {})})
    with RewardPool([spec], folder, seed=0, cache=folder / "cache.sqlite") as pool:
        return pool.score_sync(samples)


def column(result: PoolResult) -> list[float | None]:
    return [row[0] for row in result.scores]


def test_the_endpoint_sees_prompt_completion_and_row_and_the_score_is_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    template = "Q: {prompt}\nA: {completion}\nGold: {row[answer]} {{json}}"
    sample = Sample("four", [{"role": "user", "content": "2+2?"}], {"answer": 4})
    with endpoint(lambda n, body: says("Right. [[9]]")) as served:
        result = score(
            served.url, [sample], tmp_path, prompt=template, system="Be strict.", api_key_env="JUDGE_KEY",
            max_tokens=7, extra={"seed": 3},
        )  # fmt: skip
    assert column(result) == [9.0] and result.infos[0]["judge"] == {"answer": "Right. [[9]]"}
    [(path, headers, body)] = served.requests
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer sesame"
    assert body == {
        "model": "any", "temperature": 0.0, "max_tokens": 7, "seed": 3,
        "messages": [
            {"role": "system", "content": "Be strict."},
            {"role": "user", "content": "Q: 2+2?\nA: four\nGold: 4 {json}"},
        ],
    }  # fmt: skip
    assert "sesame" not in (tmp_path / "cache.sqlite").read_bytes().decode(errors="replace")


def picture(folder: Path, name: str, content: bytes) -> dict[str, str]:
    path = folder / name
    path.write_bytes(content)
    return {"type": "image", "path": str(path)}


def test_the_judge_is_shown_the_prompts_images_before_the_text_in_their_order(tmp_path: Path) -> None:
    media = [picture(tmp_path, "a.png", b"first"), picture(tmp_path, "b.png", b"second")]
    parts = [{"type": "image", "path": media[0]["path"]}, {"type": "text", "text": "which is red?"}]
    sample = Sample("the left", [{"role": "user", "content": parts}], media=media)
    with endpoint(lambda n, body: says("[[4]]")) as served:
        assert column(score(served.url, [sample], tmp_path, prompt="{prompt}|{completion}")) == [4.0]
        assert column(score(served.url, [sample], tmp_path, prompt="{prompt}|{completion}", images=False)) == [4.0]
    shown, text = (request[2]["messages"][0]["content"] for request in served.requests)
    assert [part["type"] for part in shown] == ["image_url", "image_url", "text"]
    urls = [part["image_url"]["url"].removeprefix("data:image/png;base64,") for part in shown[:2]]
    assert [base64.b64decode(url) for url in urls] == [b"first", b"second"]
    assert shown[2]["text"] == text == "which is red?|the left"


def test_an_image_that_changed_is_judged_again_and_a_video_is_a_failure_that_says_so(tmp_path: Path) -> None:
    """A file in the media store is named by its content's hash."""
    one = Sample("x", media=[picture(tmp_path, "key-1.png", b"1")])
    two = Sample("x", media=[picture(tmp_path, "key-2.png", b"2")])
    with endpoint(lambda n, body: says("[[4]]")) as served:
        score(served.url, [one, two], tmp_path)
        score(served.url, [one, two], tmp_path)
        assert len(served.requests) == 2
        video = Sample("x", media=[{"type": "video", "path": "v"}])
        result = score(served.url, [video], tmp_path)
    assert column(result) == [None] and "shown images alone" in result.failures[0].message


def test_a_conversation_is_shown_with_its_roles_and_braces_in_it_do_no_harm(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "{row}"}, {"role": "assistant", "content": "{0}"}]
    with endpoint(lambda n, body: says("3")) as served:
        assert column(score(served.url, [Sample("{prompt}", messages)], tmp_path)) == [3.0]
    asked = served.requests[0][2]["messages"][0]["content"]
    assert "user: {row}\n\nassistant: {0}" in asked and "[Answer]\n{prompt}\n" in asked


def test_an_answer_is_paid_for_once(tmp_path: Path) -> None:
    samples = [Sample(f"answer {n}") for n in range(8)]
    with endpoint(lambda n, body: says(f"[[{len(body['messages'][0]['content']) % 10}]]")) as served:
        first = score(served.url, samples, tmp_path)
        second = score(served.url, samples, tmp_path)
        assert column(first) == column(second) and len(served.requests) == 8
        assert second.metrics["reward/judge/cache_hits"] == 8
        score(served.url, samples, tmp_path, temperature=0.5)
        assert len(served.requests) == 16, "another way of asking is another score"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_endpoint_that_is_busy_is_asked_again_when_it_says(status: int, tmp_path: Path) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        return says("[[5]]") if number else (status, "busy", {"retry-after": "0.4"})

    with endpoint(answer) as served:
        started = time.monotonic()
        result = score(served.url, [Sample("a")], tmp_path)
    assert column(result) == [5.0] and len(served.requests) == 2 and not result.failures
    assert time.monotonic() - started >= 0.4


def test_retry_after_may_be_a_date_and_its_absence_means_backing_off(tmp_path: Path) -> None:
    times: list[float] = []

    def answer(number: int, body: dict[str, Any]) -> Answer:
        times.append(time.monotonic())
        when = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds
        return [(429, "", {"retry-after": when}), (500, "", {}), says("[[1]]")][number]

    with endpoint(answer) as served:
        assert column(score(served.url, [Sample("a")], tmp_path)) == [1.0]
    assert times[1] - times[0] >= 0.9 and times[2] - times[1] >= 0.9


def test_an_endpoint_that_stays_busy_costs_its_samples_and_says_why(tmp_path: Path) -> None:
    with endpoint(lambda n, body: (429, "slow down", {"retry-after": "60"})) as served:
        started = time.monotonic()
        result = score(served.url, [Sample("a")], tmp_path, options={"timeout_s": 3.0})
        assert time.monotonic() - started < 3, "no waiting for what cannot come in time"
    assert column(result) == [None]
    assert "asked 1 times; the last: status 429: slow down" in result.failures[0].message


def test_a_slow_endpoint_is_left_at_the_deadline(tmp_path: Path) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        if "slow" in body["messages"][0]["content"]:
            release.wait(20)
        return says("[[2]]")

    release = threading.Event()
    with endpoint(answer) as served:
        result = score(served.url, [Sample("slow"), Sample("fast")], tmp_path, options={"timeout_s": 4.0})
        release.set()
    assert column(result) == [None, 2.0]
    assert "gave no answer in time" in result.failures[0].message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>", "no chat completion"),
        ("{}", "no chat completion"),
        (json.dumps({"choices": []}), "no chat completion"),
        (json.dumps({"choices": [{"message": {"content": None}}]}), "has no text"),
        (says("I will not say.")[1], "no number can be read in the judge's answer 'I will not say.'"),
        (says("[[11]]")[1], "outside [1, 10]"),
    ],
)
def test_garbage_is_a_failure_and_never_a_score(body: str, message: str, tmp_path: Path) -> None:
    with endpoint(lambda n, _: (200, body, {})) as served:
        result = score(served.url, [Sample("a")], tmp_path, scale=[1, 10])
    assert column(result) == [None] and message in result.failures[0].message


def test_a_refused_key_is_not_asked_again_and_ends_the_run_at_once(tmp_path: Path) -> None:
    with endpoint(lambda n, body: (401, "wrong key", {})) as served, pytest.raises(RewardError, match="wrong key"):
        score(served.url, [Sample("a"), Sample("b")], tmp_path, options={"max_error_rate": 0.02})
    assert len(served.requests) <= 2


def test_an_endpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = score("http://127.0.0.1:9/v1", [Sample("a")], tmp_path)
    [failure] = result.failures
    assert column(result) == [None] and "http://127.0.0.1:9/v1/chat/completions gave no answer" in failure.message
    assert "ClientConnectorError" in failure.message


def test_many_are_asked_at_once(tmp_path: Path) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.5)
        return says("[[4]]")

    with endpoint(answer) as served:
        result = score(served.url, [Sample(f"{n}") for n in range(128)], tmp_path, options={"concurrency": 64})
    assert column(result) == [4.0] * 128
    assert result.metrics["reward/judge/seconds"] < 10, "one after another it would be 64 s"


ANSWERS: list[tuple[str, str, float | None]] = [
    ("number", "[[7]]", 7.0),
    ("number", "Criteria 1 to 3 hold, so [[ 8.5 ]].", 8.5),
    ("number", "First [[3]], no: [[4]]", 4.0),
    ("number", "Score: 7/10", 7.0),
    ("number", "**Score:** 6 out of 10", 6.0),
    ("number", "Rating is 2. It has 30 words.", 2.0),
    ("number", "I give it a 9", 9.0),
    ("number", "7/10", 7.0),
    ("number", "-3", -3.0),
    ("number", "<think>10? no, 2</think>5", 5.0),
    ("number", "<think>it is about 3", None),
    ("number", "v2.0beta", None),
    ("number", "", None),
    ("choice", "[[good]]", 1.0),
    ("choice", "Not bad, in fact GOOD.", 1.0),
    ("choice", "Good at first, then very bad", 0.0),
    ("choice", "goodness", None),
    ("json", 'Here: {"score": 4, "why": "x"}', 4.0),
    ("json", '```json\n{"score": true}\n```', 1.0),
    ("json", '{"score": 1} and then {"score": 2.5}', 2.5),
    ("json", '{"score": "4"}', None),
    ("json", '{"rating": 4}', None),
    ("json", "{score: 4}", None),
]


@pytest.mark.parametrize(("parse", "answer", "value"), ANSWERS)
def test_answers_are_read(parse: Any, answer: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match="can be read"):
            read_answer(answer, parse, {"good": 1, "bad": 0}, "score")
    else:
        assert read_answer(answer, parse, {"good": 1, "bad": 0}, "score") == value


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"base_url": "localhost:8000"}, "starts with http"),
        ({"prompt": "judge {answer} {completion}"}, "the prompt has {answer}; known are {prompt}"),
        ({"prompt": 'say {"score": 1} of {completion}'}, "braces that are meant are doubled"),
        ({"prompt": "judge"}, "has no {completion}"),
        ({"parse": "choice"}, "go together"),
        ({"choices": {"a": 1}}, "go together"),
        ({"parse": "choice", "choices": {"a": "x"}}, "not a number"),
        ({"scale": [5, 1]}, "scale is [lowest, highest]"),
        ({"parse": "regex"}, "argument 'parse' of judge is 'regex'"),
        ({"api_key_env": "A_KEY_THAT_IS_NOT_SET"}, "A_KEY_THAT_IS_NOT_SET is not set here"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_runs(args: dict[str, Any], message: str) -> None:
    whole = {"base_url": "http://localhost:1/v1", "model": "any", **args}
    with pytest.raises(PluginError) as caught:
        load(PluginSpec("judge", args=whole), ".")
    assert message in str(caught.value)
