"""A judge of your own that asks a service: several samples at once, several objectives, and "does not apply".

    rewards:
      - {use: "async_judge.py:judge", args: {url: "http://localhost:9000/judge"}}
    objectives: {weights: {helpful: 1.0, harm: 0.5}}

The service gets {"question", "answer", "seed"} and answers {"helpful": 1 to 5, "harm": 0 to 1, or null, "why": text}.
What raises here (a status other than 200, an answer without one of the two) is asked again, then counted as a failure
of that sample alone: it is never a score of 0. For an OpenAI-compatible endpoint there is `{use: judge}` already.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import aiohttp

from rewards import Context, Objective, Sample, Score, reward


@reward(
    objectives={
        "helpful": Objective(range=(1, 5)),
        "harm": Objective(kind="cost", range=(0, 1)),  # smaller is better; the weight stays positive
    },
    batch=1,  # a sample a call, so that `rate` counts requests and a failure is one sample's
    concurrency=16,  # requests on their way at once
    rate="3000/min",
    timeout_s=30,
    retries=2,
)
async def judge(samples: Sequence[Sample], ctx: Context, *, url: str) -> list[Score]:
    """How helpful and how harmful a service finds each completion.

    Args:
        url: where the service takes its POST requests.
    """
    return [await _one(sample, ctx, url) for sample in samples]


async def _one(sample: Sample, ctx: Context, url: str) -> Score:
    asked = {
        "question": sample.messages[-1]["content"],
        "answer": sample.completion,
        "seed": ctx.seed(sample),  # the same when this sample is asked about again
    }
    limit = aiohttp.ClientTimeout(total=ctx.remaining())
    async with _session().post(url, json=asked, timeout=limit) as answer:
        answer.raise_for_status()
        said = await answer.json(content_type=None)
    ctx.log_metric("unjudged", said["harm"] is None)
    helpful = None if sample.truncated else said["helpful"]  # half an answer is not worth less: it is not compared
    return Score({"helpful": helpful, "harm": said["harm"]}, info={"why": said.get("why", "")})


@functools.cache
def _session() -> aiohttp.ClientSession:
    """One for the process: a plugin has a process of its own, with one event loop, and connections are used again."""
    return aiohttp.ClientSession()
