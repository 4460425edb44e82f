"""The vLLM engine: its offline `LLM` in this process, a step of its scheduler at a time.

Why in process and by our own steps: whatever is added before an idle engine's next step is admitted together and
nothing else shares the scheduler, so which sequences are computed together, and with that every sum, is a function of
that list alone. Tokens and log-probabilities are then bit-equal from one process to the next, given equal prompts,
seeds, weights and threads. An idle engine empties its prefix cache before it takes requests, for the same reason. The
same steps serve asynchronous stages: requests are added and versions published between two of them.

At temperature 0 (greedy) log-probabilities are those of temperature 1: there is no distribution at 0, and greedy
completions are for evaluation, never for training.

Publishing. Files are read before `publish` returns and never again: the trainer's side, which wrote them, deletes them.
Each adapter is a new vLLM adapter with a name and an integer id of its own; it is loaded beside those in use, compared
with the trainer's digest, and only then serves new requests, so a publish that fails leaves the older version serving.
Running requests finish on the adapter they began with, and one that no request uses is removed. Its part of the prefix
cache is keyed by its name: no other version finds it. Whole weights replace the model's own. They wait until no request
runs, or (`EngineSpec.in_flight`) take over between two steps: the cache of what the requests have read and written so
far is then computed again by the new weights, and each token knows the version that sampled it. A failure leaves the
engine without a version. The prefix cache is emptied, which is checked by looking a prompt up in it (by vLLM itself
where requests run).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from align.errors import AlignError, EngineError
from align.protocols import (
    Completion,
    FailedPrompt,
    Group,
    Medium,
    PromptItem,
    Publication,
    Sampling,
    digest_arrays,
    end_ids,
    special_tokens,
    texts_of,
)
from rollout import vllm as calls
from rollout.base import Answer, EngineSpec, Request, check_engine_options, check_sampling
from rollout.vllm_files import read_tensors, tensor_shapes, unchanged
from rollout.vllm_held import held_adapter, held_weights, retie, tied_groups
from rollout.vllm_probe import probe_prompt, require_applied, spread_tokens
from rollout.vllm_start import accepted_rank, adapter_slots, start, stop
from rollout.vllm_version import require_vllm


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
        self.version: int | None = None
        self._max_rank = accepted_rank(spec.lora_rank)
        self._slots = adapter_slots(spec)
        self._running: dict[str, _Running] = {}  # by vLLM's request id
        self._answers: list[Answer] = []
        self._ids = itertools.count()
        self._adapter: Any = None  # the one that serves new requests
        self._adapters: list[Any] = []  # all that are held
        self._loaded = 0  # adapters so far; each gets the next number as its id
        self._base_intact = True
        self._probed = False
        self._llm: Any = start(spec, self._max_rank)
        self._tokenizer = self._llm.get_tokenizer()
        self._end_ids = end_ids(Path(spec.folder), self._tokenizer.eos_token_id, spec.end_ids)
        self._special = special_tokens(self._tokenizer)

    # -------------------------------------------------------------------------------------------- generation

    @property
    def running(self) -> int:
        return len(self._running) + len(self._answers)

    def add(self, requests: Sequence[Request]) -> None:
        if self.version is None:
            raise EngineError("the engine was asked to generate before a version was published to it")
        for request in requests:
            check_sampling(request.group_size, request.sampling)
        if requests and not self._running:
            self._empty_prefix_cache()
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
            calls.add_request(self._llm, name, prompt, parameters, self._adapter)
            self._running[name] = _Running(request, self.version, self._adapter)

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
            self._retire()
        return answers

    def abandon(self, tickets: Sequence[int]) -> None:
        dropped = set(tickets)
        names = [name for name, running in self._running.items() if running.request.ticket in dropped]
        self._llm.llm_engine.abort_request(names)
        for name in names:
            del self._running[name]
        self._answers = [answer for answer in self._answers if answer[0] not in dropped]
        self._retire()

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
        return [self._prompt_logps(calls.made_prompt(self._llm, *pair), self._adapter) for pair in pairs]

    def _prompt_logps(self, prompt: Any, adapter: Any) -> np.ndarray:
        scores = self._alone(prompt, calls.scoring_parameters(), adapter).prompt_logprobs[1:]
        pairs = zip(scores, prompt["prompt_token_ids"][1:], strict=True)
        return np.array([score[token].logprob for score, token in pairs], dtype=np.float32)

    def _alone(self, prompt: Any, parameters: Any, adapter: Any) -> Any:
        """vLLM's output for a prompt that nothing else is computed with: on CPU, its adapter kernels cannot take a
        prompt whose own log-probabilities are asked for together with another sequence."""
        if self._running:
            raise EngineError(f"the engine was asked to score while {len(self._running)} requests ran")
        calls.add_request(self._llm, str(next(self._ids)), prompt, parameters, adapter)
        while not (outputs := calls.step(self._llm)):
            pass
        return outputs[0]

    # -------------------------------------------------------------------------------------------- weights

    def accepts(self, publication: Publication) -> bool:
        if not self._running or publication.kind == "base":
            return True
        if publication.kind == "weights":
            return self.spec.in_flight
        return self._probed and len(self._adapters) < self._slots

    def publish(self, publication: Publication) -> str:
        """See `rollout.base.Engine`. For kind "base" nothing is loaded and the publication's own digest is returned."""
        if publication.kind == "base":
            self._need(self._base_intact, publication, "its base weights were replaced by an earlier version")
            self._serve(None, publication)
            return publication.digest
        if publication.kind == "adapter":
            return self._publish_adapter(publication)
        return self._publish_weights(publication)

    def _publish_adapter(self, publication: Publication) -> str:
        self._need(self._base_intact, publication, "its base weights were replaced by an earlier version")
        self._need(publication.rank <= self._max_rank, publication, f"it was started for rank {self.spec.lora_rank}")
        self._need(len(self._adapters) < self._slots, publication, f"{len(self._adapters)} versions are in use")
        path = Path(publication.path)
        shapes = tensor_shapes([path / "adapter_model.safetensors"], publication)
        self._probe_once(path, shapes)
        adapter = self._load_adapter(path, f"version {publication.version}")
        try:
            digest = digest_arrays(self._held_adapter(adapter.lora_int_id, shapes))
            self._compare(digest, publication)
        except BaseException:
            self._llm.llm_engine.remove_lora(adapter.lora_int_id)
            raise
        self._adapters.append(adapter)
        self._serve(adapter, publication)
        return digest

    def _publish_weights(self, publication: Publication) -> str:
        self._need(self._max_rank == 0, publication, "it was started for adapters")
        self._need(self.accepts(publication), publication, f"{len(self._running)} requests run on those it holds")
        files = sorted(Path(publication.path).glob("*.safetensors"))
        shapes = tensor_shapes(files, publication)
        dtype = self._llm.model_config.dtype
        idle = not self._running
        if idle:
            self._cached_tokens()  # from here on the cache knows the prompt that is looked up below
        self.version, self._base_intact = None, False  # from here on it holds neither the old version nor the new one
        tied = self._apply(tied_groups)
        calls.reload_weights(self._llm, read_tensors(files, dtype))
        self._apply(lambda model: retie(model, tied))
        spare = partial(unchanged, files=files, folder=Path(self.spec.folder))
        held = self._apply(lambda model: held_weights(model, shapes, dtype, calls.parameter_renamer(model), spare))
        digest = digest_arrays(held)
        self._compare(digest, publication)
        self._empty_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()  # what the tower before made of pictures
        stale = self._cached_tokens() if idle else 0
        self._need(stale == 0, publication, f"its prefix cache still serves {stale} tokens of the version before")
        self._serve(None, publication)
        return digest

    def _empty_prefix_cache(self) -> None:
        """Of everything: requests that run read their prompts and what they have written so far again."""
        if not self._llm.reset_prefix_cache(reset_running_requests=bool(self._running)):
            raise EngineError("vLLM's prefix cache could not be emptied: a request still holds it")

    def _cached_tokens(self) -> int:
        """Tokens of a fixed prompt of one whole block that the prefix cache knows; afterwards it knows them all."""
        length = calls.block_size(self._llm) + 1
        if length >= self._llm.model_config.max_model_len:
            return 0  # no prompt fills a block
        prompt = calls.made_prompt(self._llm, spread_tokens(self._llm, length), ())
        output = self._alone(prompt, calls.scoring_parameters(cached=True), None)
        return int(output.num_cached_tokens or 0)

    def _serve(self, adapter: Any, publication: Publication) -> None:
        self._adapter, self.version = adapter, publication.version
        self._llm.llm_engine.set_weight_version(str(publication.version))
        self._retire()

    def _retire(self) -> None:
        """Remove every adapter that neither serves nor is used by a request."""
        if len(self._adapters) <= (self._adapter is not None):
            return
        used = {running.adapter.lora_int_id for running in self._running.values() if running.adapter is not None}
        kept = [a for a in self._adapters if a is self._adapter or a.lora_int_id in used]
        for adapter in self._adapters:
            if adapter not in kept:
                self._llm.llm_engine.remove_lora(adapter.lora_int_id)
        self._adapters = kept

    def _need(self, holds: bool, publication: Publication, why: str) -> None:
        if not holds:
            raise EngineError(
                f"the engine cannot load version {publication.version} ({publication.kind}, rank {publication.rank}): "
                f"{why}"
            )

    def _compare(self, digest: str, publication: Publication) -> None:
        if digest != publication.digest:
            raise EngineError(
                f"the engine holds other weights than version {publication.version} was published with "
                f"(digest {digest[:12]}, the trainer's is {publication.digest[:12]})",
                where=publication.path,
            )

    def _load_adapter(self, path: Path, name: str) -> Any:
        self._loaded += 1
        adapter = calls.adapter_request(f"{name} #{self._loaded}", self._loaded, path)
        if adapter.lora_int_id in self._llm.llm_engine.list_loras():  # vLLM would serve what it has under that id
            raise EngineError(f"vLLM holds an adapter with the id {adapter.lora_int_id} of {name} already", where=path)
        try:
            self._llm.llm_engine.add_lora(adapter)
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"vLLM cannot load the adapter of {name}: {error}", where=path) from error
        return adapter

    def _held_adapter(self, adapter_id: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        held: dict[str, np.ndarray] = self._apply(
            lambda model: held_adapter(model, adapter_id, shapes, calls.adapter_name_parser(model))
        )
        return held

    def _apply(self, function: Callable[[Any], Any]) -> Any:
        return self._llm.apply_model(function)[0]

    def _probe_once(self, like: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Once per engine, see `rollout.vllm_probe`."""
        if self._probed:
            return
        llm = self._llm.llm_engine
        load = partial(self._load_adapter, name="probe")
        tower = self._apply(lambda model: calls.tower_tensors(model, shapes))
        prompt = probe_prompt(self._llm, with_picture=bool(tower or self.spec.media))
        least = 1e-3 if self.spec.dtype == "float32" else 5e-2
        require_applied(
            prompt, like, shapes, tower, load, lambda a: llm.remove_lora(a.lora_int_id), self._prompt_logps, least
        )
        self._probed = True

    def close(self) -> None:
        if self._llm is None:
            return
        llm, self._llm, self._adapter, self.version = self._llm, None, None, None
        self._running, self._answers, self._adapters = {}, [], []
        stop(llm)
