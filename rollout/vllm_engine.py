"""The vLLM engine: its offline `LLM` in this process, a step of its scheduler at a time.

Why in process and by our own steps: whatever is added before an idle engine's next step is admitted together and
nothing else shares the scheduler, so which sequences are computed together, and with that every sum, is a function of
that list alone. Tokens and log-probabilities are then bit-equal from one process to the next, given equal prompts,
seeds, weights and threads. An idle engine empties its prefix cache before it takes requests, for the same reason. The
same steps serve asynchronous stages: requests are added and versions published between two of them.

At temperature 0 (greedy) log-probabilities are those of temperature 1: there is no distribution at 0, and greedy
completions are for evaluation, never for training.

How versions are published: `rollout.vllm_weights`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from align.errors import AlignError, EngineError
from align.protocols.ends import end_ids, special_tokens, texts_of
from align.protocols.fleet import Completion, FailedPrompt, Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from align.protocols.trees import Medium
from rollout import vllm as calls
from rollout.base import Answer, EngineSpec, Request, check_engine_options, check_sampling
from rollout.vllm_start import accepted_rank, start, stop
from rollout.vllm_version import require_vllm
from rollout.vllm_weights import VllmWeights


@dataclass(frozen=True, slots=True)
class _Running:
    """A request that vLLM has. adapter: vLLM's LoRARequest that it samples with, None for the model's own weights."""

    request: Request
    version: int
    adapter: Any


class VllmEngine:
    """See `rollout.base.Engine`.

    `threads` is applied to torch in this process. In an actor of its own the worker sets the environment that OpenMP
    reads before torch is imported; where a process is shared, this one wins.

    Raises:
        SetupError: vLLM cannot be imported, or is a version that this file does not fit.
        Unsupported: a LoRA rank for which vLLM has no kernels.
        EngineError: the engine did not start.
    """

    def __init__(self, spec: EngineSpec):
        check_engine_options("vllm", spec.engine)
        require_vllm()
        self.spec = spec
        max_rank = accepted_rank(spec.lora_rank)
        self._running: dict[str, _Running] = {}  # by vLLM's request id
        self._answers: list[Answer] = []
        self._ids = itertools.count()
        self.continuing = False  # what comes next begins as what was: turns of episodes, whose prefixes are kept
        self._llm: Any = start(spec, max_rank)
        self._weights = VllmWeights(self._llm, spec, max_rank, self._in_use, self._alone)
        self._tokenizer = self._llm.get_tokenizer()
        self._end_ids = end_ids(Path(spec.folder), self._tokenizer.eos_token_id, spec.end_ids)
        self._special = special_tokens(self._tokenizer)

    @staticmethod
    def load_libraries() -> None:
        """Ahead of a start: importing vLLM takes longer than all that follows."""
        require_vllm()

    @property
    def version(self) -> int | None:
        return self._weights.version

    @property
    def running(self) -> int:
        return len(self._running) + len(self._answers)

    def add(self, requests: Sequence[Request]) -> None:
        weights = self._weights
        if weights.version is None:
            raise EngineError("the engine was asked to generate before a version was published to it")
        for request in requests:
            check_sampling(request.group_size, request.sampling)
        if requests and not self._running and not self.continuing:
            weights.empty_prefix_cache()
        too_long = [(r.ticket, failed) for r in requests if (failed := self._too_long(r)) is not None]
        failed_tickets = {ticket for ticket, _ in too_long}
        fitting = [request for request in requests if request.ticket not in failed_tickets]
        prompts = self._made_prompts(fitting)  # all, before any is added: an error leaves the engine as it was
        self._answers += too_long
        for request, prompt in zip(fitting, prompts, strict=True):
            name = str(next(self._ids))
            item = request.prompt
            size, sampling = request.group_size, request.sampling
            parameters = calls.sampling_parameters(item, size, sampling, self._end_ids, self._special)
            calls.add_request(self._llm, name, prompt, parameters, weights.adapter)
            self._running[name] = _Running(request, weights.version, weights.adapter)

    def _made_prompts(self, requests: Sequence[Request]) -> list[Any]:
        try:
            return [calls.made_prompt(self._llm, r.prompt.token_ids, r.prompt.media) for r in requests]
        except AlignError:
            if any(request.prompt.media for request in requests):
                self._llm.reset_mm_cache()  # half of vLLM's cache takes what was made for sent
            raise

    def step(self) -> list[Answer]:
        answers, self._answers = self._answers, []
        if answers or not self._running:
            return answers
        for output in calls.step(self._llm):
            running = self._running.pop(output.request_id)
            self._same_prompt(output, running.request.prompt)
            completions = tuple(self._completion(drawn, running) for drawn in output.outputs)
            answers.append((running.request.ticket, Group(running.request.prompt, completions)))
        if answers:
            self._weights.retire()
        return answers

    def abandon(self, tickets: Sequence[int]) -> None:
        dropped = set(tickets)
        names = [name for name, running in self._running.items() if running.request.ticket in dropped]
        self._llm.llm_engine.abort_request(names)
        for name in names:
            del self._running[name]
        self._answers = [answer for answer in self._answers if answer[0] not in dropped]
        self._weights.retire()

    def _completion(self, drawn: Any, running: _Running) -> Completion:
        token_ids = np.array(drawn.token_ids, dtype=np.int64)
        logps = np.array([s[t].logprob for s, t in zip(drawn.logprobs, drawn.token_ids, strict=True)], dtype=np.float32)
        if not np.isfinite(logps).all():
            raise EngineError(
                f"version {running.version} gives a sampled token a log-probability that is not finite",
                remedy="the policy has diverged: lower optim.lr, or continue from an earlier checkpoint",
            )
        text, raw = texts_of(drawn.token_ids, self._end_ids, self._decode)
        return Completion(
            token_ids=token_ids,
            logps=logps,
            versions=self._versions(drawn, running),
            text=text,
            finish=self._finish(drawn, running.request.sampling),
            raw=raw,
        )

    def _decode(self, tokens: list[int], skip_special: bool) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text

    def _versions(self, drawn: Any, running: _Running) -> np.ndarray:
        """i32[n]: of each token, the version that sampled it."""
        versions = np.full(len(drawn.token_ids), running.version, dtype=np.int32)
        for span in drawn.weight_versions if self.spec.in_flight else ():
            versions[span.start : span.end] = int(span.version)
        return versions

    def _finish(self, drawn: Any, sampling: Sampling) -> Literal["eos", "stop", "length"]:
        if drawn.finish_reason == "length":
            return "length"
        if drawn.finish_reason == "stop":
            if drawn.token_ids[-1] in self._end_ids:
                return "eos"
            if isinstance(drawn.stop_reason, str) or drawn.token_ids[-1] in sampling.stop_token_ids:
                return "stop"
        raise EngineError(f"vLLM ended a completion for {drawn.finish_reason!r} ({drawn.stop_reason!r})")

    def _too_long(self, request: Request) -> FailedPrompt | None:
        prompt, tokens = request.prompt, request.sampling.max_tokens
        longest = self._llm.model_config.max_model_len
        if len(prompt.token_ids) + tokens <= longest:
            return None
        return FailedPrompt(
            prompt,
            "too long",
            f"a prompt of {len(prompt.token_ids)} tokens and a completion of up to {tokens} do not fit the engine's "
            f"length of {longest}",
        )

    @staticmethod
    def _same_prompt(output: Any, prompt: PromptItem) -> None:
        """What vLLM read must be what the trainer reads."""
        if output.prompt_token_ids != prompt.token_ids.tolist():
            raise EngineError(
                f"vLLM read a prompt of {len(output.prompt_token_ids)} tokens that differs from the one of "
                f"{len(prompt.token_ids)} tokens it was given",
                where=prompt.origin or f"group {prompt.group_id}",
                remedy="set rollout.name=transformers, and report this: log-probabilities would be of another prompt",
            )

    def logps(self, token_ids: Sequence[np.ndarray], media: Sequence[Sequence[Medium]] = ()) -> list[np.ndarray]:
        pairs = zip(token_ids, media or [()] * len(token_ids), strict=True)
        weights = self._weights
        return [weights.prompt_logps(calls.made_prompt(self._llm, *pair), weights.adapter) for pair in pairs]

    def _alone(self, prompt: Any, parameters: Any, adapter: Any) -> Any:
        """vLLM's output for a prompt that nothing else is computed with: on CPU, its adapter kernels cannot take a
        prompt whose own log-probabilities are asked for together with another sequence."""
        if self._running:
            raise EngineError(f"the engine was asked to score while {len(self._running)} requests ran")
        calls.add_request(self._llm, str(next(self._ids)), prompt, parameters, adapter)
        while not (outputs := calls.step(self._llm)):
            pass
        return outputs[0]

    def _in_use(self) -> list[Any]:
        return [running.adapter for running in self._running.values()]

    def accepts(self, publication: Publication) -> bool:
        return self._weights.accepts(publication)

    def publish(self, publication: Publication) -> str:
        """See `rollout.base.Engine`. For kind "base" nothing is loaded and the publication's own digest is returned."""
        return self._weights.publish(publication)

    def close(self) -> None:
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        self._weights.close()
        self._running, self._answers = {}, []
        stop(llm)
