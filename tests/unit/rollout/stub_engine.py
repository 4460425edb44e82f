"""An engine without a model: what it does is written in the prompts' rows, the publication's path and the options."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from align.errors import EngineError, SetupError
from align.protocols.fleet import Completion, FailedPrompt, Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from align.protocols.trees import Medium
from rollout.base import Answer, EngineSpec, Request


def first(flag: str) -> bool:
    """Whether this is the first engine, of all that may ask at the same moment, to come by this flag."""
    try:
        Path(flag).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class StubEngine:
    """Options: start "fails", start_s; per_step: groups that a step finishes (all); step_s; drain: whether a version
    waits for running requests; begins: ids of an image that it puts behind every prompt, as episodes do. Rows: do, and
    once: a file that is made when it was done, so that it is done once."""

    def __init__(self, spec: EngineSpec):
        options = spec.engine
        if options.get("start") == "fails":
            raise SetupError("no such engine here", remedy="install it")
        if options.get("start") == "no memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
        time.sleep(float(options.get("start_s", 0)))
        self.version: int | None = None
        self._options = options
        self._waiting: list[tuple[Request, int]] = []

    @property
    def running(self) -> int:
        return len(self._waiting)

    def add(self, requests: Sequence[Request]) -> None:
        if self.version is None:
            raise EngineError("the engine was asked to generate before a version was published to it")
        self._waiting += [(request, self.version) for request in requests]

    def step(self) -> list[Answer]:
        count = int(self._options.get("per_step", len(self._waiting)))
        time.sleep(float(self._options.get("step_s", 0)))
        for request, _ in self._waiting[:count]:
            self._misbehave(request.prompt)
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return [(request.ticket, self._answer(request, version)) for request, version in taken]

    def _misbehave(self, item: PromptItem) -> None:
        once = item.row.get("once")
        if once is not None and not first(once):
            return
        match item.row.get("do"):
            case "hang":
                time.sleep(60)
            case "raise":
                raise ValueError("the kernel is on fire\nand so on")
            case "diverge":
                raise EngineError("the policy has diverged", remedy="lower optim.lr")
            case "die":
                os._exit(9)

    def _answer(self, request: Request, version: int) -> Group | FailedPrompt:
        item = request.prompt
        if item.row.get("do") == "refuse":
            return FailedPrompt(item, "too long", "a prompt too long")
        completions = (self._completion(item, i, request.sampling, version) for i in range(request.group_size))
        if begins := self._options.get("begins"):
            shown = Medium("image", "key", "store", len(item.token_ids), len(begins), 1)
            item = replace(item, token_ids=np.concatenate([item.token_ids, np.array(begins)]), media=(shown,))
        return Group(item, tuple(completions))

    def _completion(self, item: PromptItem, number: int, sampling: Sampling, version: int) -> Completion:
        tokens = np.random.default_rng([item.seed, number]).integers(0, 100, sampling.max_tokens)
        about = {"pid": os.getpid(), "environment": dict(os.environ)} if item.row.get("do") == "tell" else {}
        text = json.dumps({"pid": os.getpid(), **about})
        versions = np.full(len(tokens), version, dtype=np.int32)
        return Completion(tokens, np.zeros(len(tokens), np.float32), versions, text, "length")

    def abandon(self, tickets: Sequence[int]) -> None:
        self._waiting = [(request, version) for request, version in self._waiting if request.ticket not in tickets]

    def accepts(self, publication: Publication) -> bool:
        return not (self._options.get("drain") and self._waiting)

    def publish(self, publication: Publication) -> str:
        match publication.path.partition(" "):
            case ("spoiled", _, _):
                return "another digest"
            case ("refused", _, _):
                raise EngineError("adapter not applied")
            case ("slow", _, seconds):
                time.sleep(float(seconds))
            case ("die", _, flag) if first(flag):
                os._exit(9)
        self.version = publication.version
        return publication.digest

    def logps(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.zeros(len(ids) - 1, dtype=np.float32) for ids in token_ids]

    def close(self) -> None:
        self._waiting = []
