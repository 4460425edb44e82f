"""A group of episodes: drawn side by side, again where one is lost, and put together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.episodes.ids import moved, shared_length
from align.episodes.outcomes import Lost, Played
from align.protocols.fleet import Completion, Episode, EpisodeFailure, FailedPrompt, Fork, Group, PromptItem
from align.protocols.trees import REPEATED, Medium

Draw = Callable[[PromptItem, int, int], Awaitable[Played]]
"""Plays episode `number` of a prompt, in attempt `attempt` at its group. Raises Lost."""

_NAMED = 3  # lost episodes in a message


@dataclass(frozen=True)
class Retries:
    """episode: how often one that is lost is drawn again."""

    episode: int


async def draw_group(
    prompt: PromptItem, size: int, draw: Draw, retries: Retries, environment: str = ""
) -> Group | FailedPrompt:
    """The group of `size` episodes. One that stays lost is a completion without tokens, which says so: its scores are
    missing. With fewer than two left (one, of groups of one) the group is drawn once more, then it is given up.
    environment: its name, where it has one."""
    said: list[str] = []
    for attempt in range(2):
        async with asyncio.TaskGroup() as tasks:
            drawn = [tasks.create_task(_one(prompt, n, attempt, draw, retries)) for n in range(size)]
        played = [task.result() for task in drawn]
        if sum(isinstance(one, Played) for one in played) >= min(2, size):
            return assembled(prompt, played, environment)
        said = [f"{one.cause}: {one.message}" for one in played if isinstance(one, Lost)]
    why = "; ".join(list(dict.fromkeys(said))[:_NAMED])
    return FailedPrompt(prompt, "episodes lost", f"{len(said)} of {size} episodes were lost, twice: {why}")


async def _one(prompt: PromptItem, number: int, attempt: int, draw: Draw, retries: Retries) -> Played | Lost:
    for left in range(retries.episode, -1, -1):
        try:
            return await draw(prompt, number, attempt)
        except Lost as lost:
            if not left:
                return lost.stands or lost
    raise AssertionError("the last try returns")


def assembled(prompt: PromptItem, played: list[Played | Lost], environment: str = "") -> Group:
    """Episodes on the beginning that their prompts have in common; what is an episode's own goes before its tokens.

    Resets of equal seeds are alike, so that usually all of a prompt is common.
    """
    whole = [one for one in played if isinstance(one, Played)]
    common = shared_length([(one.prompt, one.media) for one in whole])
    completions = [
        lost_completion(one, environment) if isinstance(one, Lost) else begun_at(common, one) for one in played
    ]
    trunk = whole[0].prompt[:common]
    media = tuple(m for m in whole[0].media if m.start < common)
    return Group(replace(prompt, token_ids=trunk, media=media), tuple(completions))


def begun_at(common: int, played: Played) -> Completion:
    """The completion with what its prompt has behind `common` before it, which nobody sampled."""
    own, completion = played.prompt[common:], played.completion
    if not len(own):
        return completion
    media = moved([m for m in played.media if m.start >= common], -common)
    # of the first sequence it is new; those that follow repeat it
    *forks, last = (
        _behind(own, media, one, REPEATED if number else -1) for number, one in enumerate(completion.sequences)
    )
    return replace(
        completion,
        token_ids=last.token_ids,
        logps=last.logps,
        versions=last.versions,
        sampled=last.sampled,
        media=last.media,
        forks=tuple(forks),
    )


def _behind(own: np.ndarray, media: Sequence[Medium], one: Fork, version: int) -> Fork:
    return Fork(
        token_ids=np.concatenate([own, one.token_ids]),
        logps=np.concatenate([np.zeros(len(own), np.float32), one.logps]),
        versions=np.concatenate([np.full(len(own), version, np.int32), one.versions]),
        sampled=np.concatenate([np.zeros(len(own), bool), one.sampled]),
        media=(*media, *moved(one.media, len(own))),
    )


def lost_completion(lost: Lost, environment: str = "") -> Completion:
    """What stands for an episode that was lost: nothing to train on, and why."""
    failure = EpisodeFailure(lost.cause, lost.message)
    none = np.zeros(0, np.float32)
    return Completion(
        token_ids=np.zeros(0, np.int64),
        logps=none,
        versions=none.astype(np.int32),
        text="",
        finish="eos",
        sampled=np.zeros(0, bool),
        episode=Episode(failure=failure, ended="lost", environment=environment),
    )
