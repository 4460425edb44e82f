"""Generation with transformers, for machines without a faster engine. The interface is that of `rollout.base.Engine`.

Each completion draws its random numbers from a stream of its own, keyed by (the prompt's seed, its number in the
group): one uniform number per token, turned into a token by inverting the cumulative distribution. So who shares its
batch has no part in its randomness.

At temperature 0 (greedy) log-probabilities are those of temperature 1: there is no distribution at 0.
"""

from __future__ import annotations

import inspect
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from align.errors import AlignError, EngineError, Unsupported
from align.model import adapters
from align.model.generate_facts import MAX_ROWS
from align.model.load import load_model, quiet, resolve_dtype
from align.model.media.places import inside_media
from align.model.media.prompt_inputs import prompt_inputs
from align.model.media.spelled import words_for_marks
from align.model.reading import find_reading, longest_row, take_rows
from align.protocols import (
    Completion,
    FailedPrompt,
    Group,
    Medium,
    PromptItem,
    Publication,
    Sampling,
    end_ids,
    special_tokens,
    texts_of,
)


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


@dataclass
class _Row:
    """One completion in the making. uniforms: f64[max_tokens], its whole stream."""

    prompt: int
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish: Literal["eos", "stop", "length"] | None = None


class TransformersEngine:
    """See `rollout.base.Engine`. Computes on CUDA where there is one, else on the CPU."""

    def __init__(self, spec: Spec):
        from transformers import AutoTokenizer

        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.version: int | None = None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = resolve_dtype(spec.dtype, self.device)
        folder = Path(spec.folder)
        self._model: Any = self._load()
        with quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
            )
        self._end_ids = end_ids(folder, self._tokenizer.eos_token_id, spec.end_ids)
        self._special = special_tokens(self._tokenizer)
        text = self._model.config.get_text_config()
        self._longest = spec.max_model_len or getattr(text, "max_position_embeddings", None)
        self._turning = longest_row(self._model.config)
        self._reading = find_reading(self._model, self.device)
        self._last_only = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._peft: Any = None
        self._adapter: str | None = None  # the one that serves
        self._loaded = 0  # adapters so far; each gets a name of its own
        self._base_intact = True
        self._waiting: deque[Request] = deque()
        self._answers: list[tuple[int, Group | FailedPrompt]] = []

    def _load(self) -> Any:
        return load_model(
            Path(self.spec.folder),
            dtype=self.dtype,
            trust_remote_code=self.spec.trust_remote_code,
            device=self.device,
        )

    # ------------------------------------------------------------------------------------------ generation

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
            self._require_version("generate")
            batch = self._next_batch()
            size = batch[0].group_size
            rows = self._generate_batch([request.prompt for request in batch], size, batch[0].sampling)
            done = [self._completion(row) for row in rows]
            taken = {id(request) for request in batch}
            self._waiting = deque(request for request in self._waiting if id(request) not in taken)
            for n, request in enumerate(batch):
                group = Group(request.prompt, tuple(done[n * size : (n + 1) * size]))
                self._answers.append((request.ticket, group))
        answers, self._answers = self._answers, []
        return answers

    def _next_batch(self) -> list[Request]:
        """The oldest, and those behind it that can be read with it (`align.model.reading`)."""

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
    def _generate_batch(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[_Row]:
        """Rows in order (prompt, number). Each prompt is read once; its cache is then repeated for the group."""
        rows = [
            _Row(n, _uniforms(item.seed, i, sampling.max_tokens))
            for n, item in enumerate(prompts)
            for i in range(group_size)
        ]
        mask, position, inputs = prompt_inputs(self._model, [(i.token_ids, i.media) for i in prompts], self.device)
        if self._reading == "uncached":
            return self._without_cache(prompts, rows, inputs, group_size, sampling)
        logits, cache = self._forward(inputs, None)
        take_rows(cache, torch.arange(len(prompts), device=self.device).repeat_interleave(group_size))
        logits, mask, position = (t.repeat_interleave(group_size, 0) for t in (logits, mask, position))
        live = rows
        while True:
            tokens = self._sample(live, logits, sampling)
            for row, token in zip(live, tokens.tolist(), strict=True):
                self._check_finish(row, token, sampling)
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
        self, prompts: Sequence[PromptItem], rows: list[_Row], inputs: Any, group_size: int, sampling: Sampling
    ) -> list[_Row]:
        """`_generate_batch` for prompts of one length, everything computed again for each token."""
        if any(item.media for item in prompts):
            raise Unsupported(
                f"{type(self._model).__name__} has no cache that can be continued, and the prompts have media",
                where="rollout.name",
                remedy="use rollout.name=vllm",
            )
        ids, live = inputs["input_ids"].repeat_interleave(group_size, 0), rows
        while live:
            logits = self._model(input_ids=ids, use_cache=False).logits[:, -1].float()
            tokens = self._sample(live, logits, sampling)
            for row, token in zip(live, tokens.tolist(), strict=True):
                self._check_finish(row, token, sampling)
            keep = [n for n, row in enumerate(live) if row.finish is None]
            ids, live = torch.cat([ids, tokens[:, None]], 1)[keep], [live[n] for n in keep]
        return rows

    def _forward(self, inputs: Mapping[str, Any], cache: Any) -> tuple[Tensor, Any]:
        """Logits f32[B, V] after the last token of each row, and the cache."""
        extra = {"logits_to_keep": 1} if self._last_only else {}
        out = self._model(**inputs, past_key_values=cache, use_cache=True, **extra)
        return out.logits[:, -1].float(), out.past_key_values

    def _sample(self, rows: list[_Row], logits: Tensor, sampling: Sampling) -> Tensor:
        """Append a token and its log-probability f32 to each row; returns the tokens i64[B]."""
        logps = torch.log_softmax(logits / (sampling.temperature or 1.0), dim=-1)
        if not torch.isfinite(logps.max(dim=-1).values).all():
            raise EngineError(
                f"version {self.version} gives logits that are not finite",
                remedy="the policy has diverged: lower optim.lr, or continue from an earlier checkpoint",
            )
        if sampling.temperature == 0:
            tokens = logps.argmax(-1)
        else:
            cumulative = logps.double().exp().cumsum(-1)
            draws = [row.uniforms[len(row.tokens)] for row in rows]
            # scaled by the total, which differs from 1 by rounding: the last token with probability 0 is never drawn
            points = torch.tensor(draws, dtype=torch.float64, device=logps.device)[:, None] * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=logps.shape[-1] - 1)
        chosen = logps.gather(-1, tokens[:, None])[:, 0].tolist()
        for row, token, logp in zip(rows, tokens.tolist(), chosen, strict=True):
            row.tokens.append(token)
            row.logps.append(logp)
        return tokens

    def _check_finish(self, row: _Row, token: int, sampling: Sampling) -> None:
        if token in self._end_ids:
            row.finish = "eos"
        elif token in sampling.stop_token_ids or self._holds_stop(row, sampling.stop):
            row.finish = "stop"
        elif len(row.tokens) >= sampling.max_tokens:
            row.finish = "length"

    def _holds_stop(self, row: _Row, stop: tuple[str, ...]) -> bool:
        if not stop:
            return False
        # a stop string of n bytes ends in the newest token, so it lies within the last n tokens (each has a byte)
        reach = max(len(text.encode()) for text in stop) + 4
        tail = self._decode(row.tokens[-reach:])
        marked = [text for text in stop if any(token in text for token in self._special)]
        raw = self._decode(row.tokens[-reach:], skip_special=False) if marked else ""
        return any(text in (raw if text in marked else tail) for text in stop)

    def _completion(self, row: _Row) -> Completion:
        assert row.finish is not None
        text, raw = texts_of(row.tokens, self._end_ids, self._decode)
        return Completion(
            token_ids=np.array(row.tokens, dtype=np.int64),
            logps=np.array(row.logps, dtype=np.float32),
            versions=np.full(len(row.tokens), self.version, dtype=np.int32),
            text=text,
            finish=row.finish,
            raw=raw,
        )

    def _decode(self, tokens: list[int], skip_special: bool = True) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text

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
        result = []
        for ids, some in zip(token_ids, media or [()] * len(token_ids), strict=True):
            tokens = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
            inputs = prompt_inputs(self._model, [(ids, some)], self.device).tensors
            inside = inside_media(len(ids), some, [medium.start for medium in some]).to(self.device)
            with words_for_marks(self._model, tokens, inside) as plain:
                inputs = {**inputs, "input_ids": plain[None]}
                logits = self._model(**inputs, use_cache=False).logits[0, :-1].float()
            logps = torch.log_softmax(logits, dim=-1).gather(-1, tokens[1:, None])[:, 0]
            result.append(logps.cpu().numpy())
        return result

    def _require_version(self, what: str) -> None:
        if self.version is None:
            raise EngineError(f"the engine was asked to {what} before a version was published to it")

    # ------------------------------------------------------------------------------------------ weights

    def accepts(self, publication: Publication) -> bool:
        return True  # between two batches nothing runs

    def publish(self, publication: Publication) -> str:
        """Load a version and return the digest of what is held. For kind "base" the publication's own is returned.

        An adapter is loaded beside the one that serves, compared, and only then takes over. Whole weights replace the
        model's own: there a failure leaves the engine without a version.
        """
        if publication.kind != "weights" and not self._base_intact:
            raise EngineError(
                f"the engine cannot load version {publication.version} ({publication.kind}): its base weights were "
                "replaced by an earlier version"
            )
        if publication.kind == "base":
            self._serve(None, publication.version)
            return publication.digest
        load = self._load_adapter if publication.kind == "adapter" else self._load_weights
        try:
            return load(publication)
        except (AlignError, OSError, SafetensorError) as error:
            if isinstance(error, EngineError):
                raise
            raise EngineError(
                f"version {publication.version} cannot be loaded: {error}", where=publication.path
            ) from error

    def _load_adapter(self, publication: Publication) -> str:
        self._loaded += 1
        name = f"adapter{self._loaded}"
        try:
            if self._peft is None:
                self._peft = adapters.load_frozen(self._model, Path(publication.path), name, use="generate")
            else:
                adapters.add_frozen(self._peft, Path(publication.path), name)
            digest = adapters.digest(self._peft, self.dtype, name)
            self._require_equal(digest, publication)
        except BaseException:
            self._forget(name)
            raise
        self._serve(name, publication.version)
        return digest

    def _forget(self, name: str) -> None:
        """Take back an adapter that was loaded in part or in vain; what served before serves on."""
        if self._adapter is None:
            self._model, self._peft = self._load(), None
        elif name in self._peft.peft_config:
            self._peft.delete_adapter(name)

    def _load_weights(self, publication: Publication) -> str:
        if self._peft is not None:
            raise EngineError("whole weights were published to an engine that holds an adapter")
        self.version, self._base_intact = None, False
        sent = {
            k: v for file in sorted(Path(publication.path).glob("*.safetensors")) for k, v in load_file(file).items()
        }
        held = dict(adapters.full_state(self._model))
        if sent.keys() != held.keys():
            odd = sorted(sent.keys() ^ held.keys())
            raise EngineError(f"{len(odd)} weights were sent but are not held, or the reverse: {', '.join(odd[:4])}")
        own = {tensor.data_ptr() for tensor in self._model.state_dict().values()}
        if not all(tensor.data_ptr() in own for tensor in held.values()):  # renamed is no matter: fused is
            raise Unsupported(
                f"{type(self._model).__name__} holds its weights in another form than its checkpoint",
                where="rollout.name",
                remedy="use rollout.name=vllm",
            )
        with torch.no_grad():
            for name, tensor in sent.items():
                held[name].copy_(tensor)
        digest = adapters.weights_digest(self._model, self.dtype)
        self._require_equal(digest, publication)
        self._serve(None, publication.version)
        return digest

    def _serve(self, name: str | None, version: int) -> None:
        """Compute with adapter `name` (None: the model's own weights) from now on, and forget the one before."""
        if self._adapter is not None and name is None:
            self._model, self._peft = self._peft.unload(), None
        elif name is not None:
            self._peft.set_adapter(name)
            self._peft.requires_grad_(False)
            if self._adapter is not None:
                self._peft.delete_adapter(self._adapter)
        self._adapter, self.version = name, version

    def _require_equal(self, digest: str, publication: Publication) -> None:
        if digest != publication.digest:
            raise EngineError(
                f"the engine holds other weights than version {publication.version} was published with "
                f"(digest {digest[:12]}, the trainer's is {publication.digest[:12]})",
                where=publication.path,
            )

    def close(self) -> None:
        """Free the model."""
        self._model = self._peft = self._adapter = self.version = None
        self._waiting.clear()
        self._answers.clear()


def _uniforms(seed: int, number: int, count: int) -> np.ndarray:
    """f64[count] in [0, 1): the stream of completion `number` of the prompt with this seed."""
    key = np.array([seed, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
