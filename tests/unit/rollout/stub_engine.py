"""An engine without a model: what it does is written in the prompts' rows and the publication's path."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

import numpy as np

from align.errors import DataError, SetupError
from align.protocols import Completion, Group, PromptItem, Publication, Sampling
from rollout.base import EngineSpec


class StubEngine:
    def __init__(self, spec: EngineSpec):
        if spec.engine.get("start") == "fails":
            raise SetupError("no such engine here", remedy="install it")
        time.sleep(float(spec.engine.get("start_s", 0)))
        self.version: int | None = None

    def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        for item in prompts:
            match item.row.get("do"):
                case "hang":
                    time.sleep(60)
                case "raise":
                    raise ValueError("the kernel is on fire\nand so on")
                case "refuse":
                    raise DataError("a prompt too long", where=item.origin, remedy="shorten it")
                case "die":
                    os._exit(9)
        return [Group(item, tuple(self._completion(item, i, sampling) for i in range(group_size))) for item in prompts]

    def _completion(self, item: PromptItem, number: int, sampling: Sampling) -> Completion:
        tokens = np.random.default_rng([item.seed, number]).integers(0, 100, sampling.max_tokens)
        about = {"pid": os.getpid(), "environment": dict(os.environ)}
        versions = np.full(len(tokens), self.version, dtype=np.int32)
        return Completion(tokens, np.zeros(len(tokens), np.float32), versions, json.dumps(about), "length")

    def publish(self, publication: Publication) -> str:
        self.version = publication.version
        return "another digest" if publication.path == "spoiled" else publication.digest

    def logps(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.zeros(len(ids) - 1, dtype=np.float32) for ids in token_ids]

    def close(self) -> None:
        pass
