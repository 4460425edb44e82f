"""Episodes played before a run: by replies that are written down, or by an engine."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from align.data.tokenizer import ChatTokenizer
from align.episodes.describe import open_host, started
from align.episodes.episode import Lost, Play, seed_of
from align.episodes.images import Images
from align.episodes.setting import Setting, setting_of
from align.errors import DataError
from align.protocols.fleet import Completion, FailedPrompt, PromptItem, Sampling
from align.protocols.trees import Medium
from align.recipe.environment import Environment
from rewards.environments.host import Host

CLOSE_S = 5.0

Sample = Callable[[PromptItem, Sampling], Awaitable[Completion | FailedPrompt]]


@dataclass
class Tried:
    """An episode that was played. prompt: ids, to be decoded, and media that stand in them; completion: None where it
    had no turn, and of one that did not end what there was of it. lost: why there is no whole one; unfinished: why it
    ends before its end, with nothing amiss; unused: written replies that no turn had; closing: how `close` failed.
    """

    origin: str
    prompt: np.ndarray | None = None
    media: tuple[Medium, ...] = ()
    completion: Completion | None = None
    lost: str | None = None
    unfinished: str | None = None
    unused: int = 0
    closing: str | None = None


@dataclass
class Trial:
    """What came of a trial: what the environment says of itself, episodes, and what is wrong with it."""

    description: Mapping[str, Any]
    setting: Setting
    episodes: list[Tried] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class OutOfReplies(Exception):
    """The written replies of an episode are used up."""


async def try_environment(
    rules: Environment,
    folder: Path,
    tokenizer: ChatTokenizer,
    prompts: Callable[[Mapping[str, Any]], Sequence[PromptItem]],
    sampler: Callable[[int], Sample],
    *,
    sampling: Sampling,
    context: int,
    images: Images | None = None,
    log: Path | None = None,
) -> Trial:
    """Play an episode of each prompt, one after the other, as a run would.

    prompts: given the environment's description. sampler: of episode n. images: None where the model sees none.
    Raises PluginError where the environment cannot be loaded, Unsupported where the chat template cannot be continued.
    """
    host = open_host(rules, folder, 0, log)
    try:
        description = await started(host)
        trial = Trial(description, setting_of(rules, tokenizer, description, context, images))
        for number, prompt in enumerate(prompts(description)):
            prompt = replace(prompt, group_id=number, seed=seed_of(prompt.seed, "row", number))
            tried = await _play(trial.setting, host, prompt, sampling, sampler(number))
            trial.episodes.append(tried)
            if (unscored := _unscored(tried)) is not None:
                trial.problems.append(unscored)
            if tried.closing is not None:
                trial.problems.append(tried.closing)
            if (differs := await _resets_differ(host, rules, prompt)) is not None:
                trial.problems.append(differs)
        return trial
    finally:
        host.close()


async def _play(setting: Setting, host: Host, prompt: PromptItem, sampling: Sampling, sample: Sample) -> Tried:
    live = await host.open()
    play = Play(setting, prompt, 0, sampling, sample, live)
    tried = Tried(prompt.origin)
    try:
        tried.prompt, tried.completion, tried.media = await play.play()
    except Lost as lost:
        tried.prompt, tried.completion, tried.media = play.so_far()
        tried.lost = f"{lost.cause}: {lost.message}"
    except OutOfReplies:
        tried.prompt, tried.completion, tried.media = play.so_far()
        tried.unfinished = "the written replies end here"
    finally:
        closed = await live.close(CLOSE_S)
    if closed.kind != "value":
        tried.closing = f"{tried.origin}: close: {closed.message}"
    tried.unused = len(sample.left) if isinstance(sample, Written) else 0
    return tried


def _unscored(tried: Tried) -> str | None:
    """What is wrong with what the environment says of an episode."""
    episode = tried.completion.episode if tried.completion is not None else None
    if episode is None or episode.failure is None:
        return None
    return f"{tried.origin}: no score: {episode.failure.cause}: {episode.failure.message}"


async def _resets_differ(host: Host, rules: Environment, prompt: PromptItem) -> str | None:
    """What speaks against two resets of the same row and seed: the episodes of a group must begin alike."""
    found = []
    for episode_seed in range(2):
        live = await host.open()
        try:
            outcome = await live.reset(prompt.row, seed_of(prompt.seed, "reset"), episode_seed, rules.timeout_s)
            found.append(outcome.value if outcome.kind == "value" else outcome.message)
        finally:
            await live.close(CLOSE_S)
    if found[0] == found[1]:
        return None
    return (
        f"{prompt.origin}: two resets with the same row and seed differ ({str(found[0])[:80]!r} and "
        f"{str(found[1])[:80]!r}): the episodes of a group must begin alike, or there is no baseline; draw what "
        "they read from `seed`, and not from `episode_seed`"
    )


# ------------------------------------------------------------------------------------------------- written replies


def read_replies(path: Path) -> list[list[str]]:
    """Replies of episodes: a line each, a list of texts as JSON, or a text as JSON or as it is, which is an episode of
    its own of one reply. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the replies cannot be read: {error}", where=path) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = line
        replies = value if isinstance(value, list) else [value if isinstance(value, str) else line]
        if not replies or not all(isinstance(reply, str) for reply in replies):
            raise DataError("a line is a text, or a list of texts: the replies of an episode", where=f"{path}:{number}")
        found.append(replies)
    if not found:
        raise DataError("there are no replies", where=path, remedy='write a line for each episode: ["first", "second"]')
    return found


class Written:
    """Gives one reply after the other as if it had been sampled, within its budget; then raises OutOfReplies. left:
    those that nobody asked for yet."""

    def __init__(self, replies: Sequence[str], tokenizer: ChatTokenizer):
        self.left, self._tokenizer = deque(replies), tokenizer

    async def __call__(self, prompt: PromptItem, sampling: Sampling) -> Completion | FailedPrompt:
        await asyncio.sleep(0)
        if not self.left:
            raise OutOfReplies
        text, tokenizer = self.left.popleft(), self._tokenizer
        whole = tokenizer.encode(text + tokenizer.ends.text.token, add_special_tokens=False)
        ids, cut = np.array(whole[: sampling.max_tokens], np.int64), len(whole) > sampling.max_tokens
        zeros = np.zeros(len(ids), np.float32)
        spoken = tokenizer.decode(ids.tolist())
        raw = tokenizer.decode(ids.tolist(), skip_special_tokens=False) if cut else text
        finish: Literal["length", "eos"] = "length" if cut else "eos"
        return Completion(ids, zeros, zeros.astype(np.int32), spoken, finish, None if spoken == raw else raw)
