"""Generation with transformers: requests, and batches of them from beginning to end.

The interface is that of `rollout.base.Engine`. `sampler.py` draws the tokens, `weights.py` holds the versions.
"""

from __future__ import annotations

import inspect
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from align.errors import EngineError, Unsupported
from align.model.generate.facts import MAX_ROWS
from align.model.generate.reading import find_reading, longest_row, take_rows
from align.model.generate.sampler import Row, Sampler, new_row
from align.model.generate.weights import TransformersWeights
from align.model.load import quiet, resolve_dtype
from align.model.media.placeholders import inside_media
from align.model.media.prompt_inputs import prompt_inputs
from align.model.media.sampled_placeholders import words_for_marks
from align.protocols.ends import end_ids
from align.protocols.fleet import FailedPrompt, Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from align.protocols.trees import Medium


class Spec(Protocol):
    """What this engine reads of `rollout.base.EngineSpec`."""

    @property
    def folder(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def max_model_len(self) -> int | None: ...
    @property
    def end_ids(self) -> tuple[int, ...]: ...
    @property
    def trust_remote_code(self) -> bool: ...


class Request(Protocol):
    """What this engine reads of `rollout.base.Request`."""

    @property
    def ticket(self) -> int: ...
    @property
    def prompt(self) -> PromptItem: ...
    @property
    def group_size(self) -> int: ...
    @property
    def sampling(self) -> Sampling: ...


class TransformersEngine:
    """See `rollout.base.Engine`. Computes on CUDA where there is one, else on the CPU."""

    def __init__(self, spec: Spec):
        from transformers import AutoTokenizer

        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = resolve_dtype(spec.dtype, self.device)
        folder = Path(spec.folder)
        self._weights = TransformersWeights(folder, self.dtype, self.device, spec.trust_remote_code)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
            )
        self._sampler = Sampler(tokenizer, end_ids(folder, tokenizer.eos_token_id, spec.end_ids))
        model = self._weights.model
        text = model.config.get_text_config()
        self._longest = spec.max_model_len or getattr(text, "max_position_embeddings", None)
        self._turning = longest_row(model.config)
        self._reading = find_reading(model, self.device)
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._waiting: deque[Request] = deque()
        self._answers: list[tuple[int, Group | FailedPrompt]] = []

    @property
    def version(self) -> int | None:
        return self._weights.version

    @property
    def running(self) -> int:
        return len(self._waiting) + len(self._answers)

    def add(self, requests: Sequence[Request]) -> None:
        """See `rollout.base.Engine`. A request is sampled from the version that is held when its batch begins."""
        self._require_version("generate")
        for request in requests:
            if request.sampling.temperature == 0 and request.group_size > 1:
                raise Unsupported(
                    f"greedy sampling would draw {request.group_size} equal completions of each prompt",
                    where="rollout.temperature",
                    remedy="set a temperature above 0, or ask for one completion",
                )
        for request in requests:
            failed = self._too_long(request)
            if failed is None:
                self._waiting.append(request)
            else:
                self._answers.append((request.ticket, failed))

    def step(self) -> list[tuple[int, Group | FailedPrompt]]:
        """One batch, from beginning to end: the oldest requests that ask for the same, up to `MAX_ROWS` completions."""
        if not self._answers and self._waiting:
            batch = self._next_batch()
            size = batch[0].group_size
            rows = self._generate_batch([request.prompt for request in batch], size, batch[0].sampling)
            done = [self._sampler.completion(row) for row in rows]
            taken = {id(request) for request in batch}
            self._waiting = deque(request for request in self._waiting if id(request) not in taken)
            for n, request in enumerate(batch):
                group = Group(request.prompt, tuple(done[n * size : (n + 1) * size]))
                self._answers.append((request.ticket, group))
        answers, self._answers = self._answers, []
        return answers

    def _next_batch(self) -> list[Request]:
        """The oldest, and those behind it that can be read with it (see `reading.py`)."""

        def kind(request: Request) -> tuple[Any, ...]:
            length = len(request.prompt.token_ids) if self._reading != "padded" else 0
            return request.group_size, request.sampling, length

        first = self._waiting[0]
        most = max(1, MAX_ROWS // first.group_size)
        if self._reading == "padded":
            return list(itertools.takewhile(lambda r: kind(r) == kind(first), itertools.islice(self._waiting, most)))
        return list(itertools.islice((r for r in self._waiting if kind(r) == kind(first)), most))

    def abandon(self, tickets: Sequence[int]) -> None:
        dropped = set(tickets)
        self._waiting = deque(request for request in self._waiting if request.ticket not in dropped)
        self._answers = [answer for answer in self._answers if answer[0] not in dropped]

    @torch.no_grad()
    def _generate_batch(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Row]:
        """Rows in order (prompt, number). Each prompt is read once; its cache is then repeated for the group."""
        version = self._require_version("generate")
        rows = [
            new_row(item.seed, number, version, sampling.max_tokens) for item in prompts for number in range(group_size)
        ]
        shown = [(item.token_ids, item.media) for item in prompts]
        mask, position, inputs = prompt_inputs(self._weights.model, shown, self.device)
        if self._reading == "uncached":
            return self._without_cache(prompts, rows, inputs, group_size, sampling)
        logits, cache = self._forward(inputs, None)
        take_rows(cache, torch.arange(len(prompts), device=self.device).repeat_interleave(group_size))
        logits, mask, position = (t.repeat_interleave(group_size, 0) for t in (logits, mask, position))
        live = rows
        while True:
            tokens = self._sampler.draw(live, logits, sampling)
            keep = [n for n, row in enumerate(live) if row.finish is None]
            if not keep:
                return rows
            if len(keep) < len(live):
                index = torch.tensor(keep, device=self.device)
                take_rows(cache, index)
                mask, tokens, position, live = mask[index], tokens[index], position[index], [live[n] for n in keep]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            inputs = {"input_ids": tokens[:, None], "attention_mask": mask, "position_ids": position[:, None]}
            logits, cache = self._forward(inputs, cache)
            position = position + 1

    def _without_cache(
        self, prompts: Sequence[PromptItem], rows: list[Row], inputs: Any, group_size: int, sampling: Sampling
    ) -> list[Row]:
        """`_generate_batch` for prompts of one length, everything computed again for each token."""
        if any(item.media for item in prompts):
            raise Unsupported(
                f"{type(self._weights.model).__name__} has no cache that can be continued, and the prompts have media",
                where="rollout.name",
                remedy="use rollout.name=vllm",
            )
        ids, live = inputs["input_ids"].repeat_interleave(group_size, 0), rows
        while live:
            logits = self._weights.model(input_ids=ids, use_cache=False).logits[:, -1].float()
            tokens = self._sampler.draw(live, logits, sampling)
            keep = [n for n, row in enumerate(live) if row.finish is None]
            ids, live = torch.cat([ids, tokens[:, None]], 1)[keep], [live[n] for n in keep]
        return rows

    def _forward(self, inputs: Mapping[str, Any], cache: Any) -> tuple[Tensor, Any]:
        """Logits f32[B, V] after the last token of each row, and the cache."""
        extra = {"logits_to_keep": 1} if self._last_only else {}
        out = self._weights.model(**inputs, past_key_values=cache, use_cache=True, **extra)
        return out.logits[:, -1].float(), out.past_key_values

    def _too_long(self, request: Request) -> FailedPrompt | None:
        length, tokens = len(request.prompt.token_ids), request.sampling.max_tokens
        whole = f"a prompt of {length} tokens and a completion of up to {tokens}"
        if self._longest is not None and length + tokens > self._longest:
            return FailedPrompt(
                request.prompt, "too long", f"{whole} do not fit the engine's length of {self._longest}"
            )
        if self._turning is not None and length + tokens > self._turning:
            return FailedPrompt(
                request.prompt,
                "too long",
                f"{whole} go beyond {self._turning} tokens, where this model's rotary frequencies change with a row's "
                "length: transformers would compute a row by the longest of its batch",
            )
        return None

    @torch.no_grad()
    def logps(self, token_ids: Sequence[np.ndarray], media: Sequence[Sequence[Medium]] = ()) -> list[np.ndarray]:
        """See `rollout.base.Engine`."""
        self._require_version("score")
        model, result = self._weights.model, []
        for ids, some in zip(token_ids, media or [()] * len(token_ids), strict=True):
            tokens = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
            inputs = prompt_inputs(model, [(ids, some)], self.device).tensors
            inside = inside_media(len(ids), some, [medium.start for medium in some]).to(self.device)
            with words_for_marks(model, tokens, inside) as plain:
                inputs = {**inputs, "input_ids": plain[None]}
                logits = model(**inputs, use_cache=False).logits[0, :-1].float()
            logps = torch.log_softmax(logits, dim=-1).gather(-1, tokens[1:, None])[:, 0]
            result.append(logps.cpu().numpy())
        return result

    def _require_version(self, what: str) -> int:
        if self.version is None:
            raise EngineError(f"the engine was asked to {what} before a version was published to it")
        return self.version

    def accepts(self, publication: Publication) -> bool:
        return True  # between two batches nothing runs

    def publish(self, publication: Publication) -> str:
        """See `TransformersWeights.publish`."""
        return self._weights.publish(publication)

    def close(self) -> None:
        """Free the model."""
        self._weights.close()
        self._waiting.clear()
        self._answers.clear()
