"""The vLLM engine: its offline `LLM`, in this process.

Why offline and in process: the whole batch is admitted before its first step and nothing else shares the scheduler, so
which sequences are computed together, and with that every sum, is a function of the list of prompts alone. Tokens and
log-probabilities are then bit-equal from one process to the next, given equal prompts, seeds, weights and threads. The
prefix cache is emptied before each call, for the same reason; within a call the G completions of a prompt share it.

At temperature 0 (greedy) log-probabilities are those of temperature 1: there is no distribution at 0, and greedy
completions are for evaluation, never for training.

Publishing. Files are read before `publish` returns and never again: the trainer's side, which wrote them, deletes them.
Each adapter is a new vLLM adapter with a name and an integer id of its own; it is loaded beside the one that serves,
compared with the trainer's digest, and only then takes over, so a publish that fails leaves the older version serving.
Whole weights replace the model's own, so there a failure leaves the engine without a version.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from align.errors import DataError, EngineError, Unsupported
from align.protocols import Completion, Group, PromptItem, Publication, Sampling, digest_arrays
from rollout import vllm as calls
from rollout.base import EngineSpec, check_engine_options
from rollout.vllm_held import held_adapter, held_weights, retie, tied_groups


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
        calls.require_vllm()
        self.spec = spec
        self.version: int | None = None
        self._max_rank = calls.accepted_rank(spec.lora_rank)
        self._request: Any = None  # the adapter that serves
        self._loaded = 0  # adapters so far; each gets the next number as its id
        self._base_intact = True
        self._probed = False
        self._llm: Any = calls.start(spec, self._max_rank)
        self._tokenizer = self._llm.get_tokenizer()
        self._end_ids = end_ids(Path(spec.folder), self._tokenizer.eos_token_id)

    # -------------------------------------------------------------------------------------------- generation

    def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        if self.version is None:
            raise EngineError("the engine was asked to generate before a version was published to it")
        if sampling.temperature == 0 and group_size > 1:
            raise Unsupported(
                f"greedy sampling would draw {group_size} equal completions of each prompt",
                where="rollout.temperature",
                remedy="set a temperature above 0, or ask for one completion",
            )
        if not prompts:
            return []
        self._check_lengths(prompts, sampling)
        parameters = [calls.sampling_parameters(item, group_size, sampling, self._end_ids) for item in prompts]
        outputs = self._run([item.token_ids for item in prompts], parameters, self._request)
        return [
            Group(item, tuple(self._completion(drawn, sampling) for drawn in output.outputs))
            for item, output in zip(prompts, outputs, strict=True)
        ]

    def logps(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._prompt_logps(token_ids, self._request)

    def _prompt_logps(self, token_ids: Sequence[np.ndarray], request: Any) -> list[np.ndarray]:
        outputs = self._run(token_ids, [calls.scoring_parameters()] * len(token_ids), request)
        return [
            np.array(
                [
                    scores[token].logprob
                    for scores, token in zip(out.prompt_logprobs[1:], ids[1:].tolist(), strict=True)
                ],
                dtype=np.float32,
            )
            for out, ids in zip(outputs, token_ids, strict=True)
        ]

    def _run(self, token_ids: Sequence[np.ndarray], parameters: Sequence[Any], request: Any) -> list[Any]:
        self._empty_prefix_cache()
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in token_ids]
        outputs: list[Any] = self._llm.generate(prompts, parameters, use_tqdm=False, lora_request=request)
        return outputs

    def _empty_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM's prefix cache could not be emptied: a request still holds it")

    def _check_lengths(self, prompts: Sequence[PromptItem], sampling: Sampling) -> None:
        longest = self._llm.model_config.max_model_len
        for item in prompts:
            if len(item.token_ids) + sampling.max_tokens > longest:
                raise DataError(
                    f"a prompt of {len(item.token_ids)} tokens and a completion of up to {sampling.max_tokens} do not "
                    f"fit the engine's length of {longest}",
                    where=item.origin or f"group {item.group_id}",
                    remedy="raise rollout.max_model_len, lower rollout.max_tokens, or set data.max_length with "
                    "overlong_prompts: filter",
                )

    def _completion(self, drawn: Any, sampling: Sampling) -> Completion:
        token_ids = np.array(drawn.token_ids, dtype=np.int64)
        logps = np.array([s[t].logprob for s, t in zip(drawn.logprobs, drawn.token_ids, strict=True)], dtype=np.float32)
        if not np.isfinite(logps).all():
            raise EngineError(
                f"version {self.version} gives a sampled token a log-probability that is not finite",
                remedy="the policy has diverged: lower optim.lr, or continue from an earlier checkpoint",
            )
        return Completion(
            token_ids=token_ids,
            logps=logps,
            versions=np.full(len(token_ids), self.version, dtype=np.int32),
            text=self._tokenizer.decode(drawn.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            finish=self._finish(drawn, sampling),
        )

    def _finish(self, drawn: Any, sampling: Sampling) -> Literal["eos", "stop", "length"]:
        if drawn.finish_reason == "length":
            return "length"
        if drawn.finish_reason == "stop":
            if drawn.token_ids[-1] in self._end_ids:
                return "eos"
            if isinstance(drawn.stop_reason, str) or drawn.token_ids[-1] in sampling.stop_token_ids:
                return "stop"
        raise EngineError(f"vLLM ended a completion for {drawn.finish_reason!r} ({drawn.stop_reason!r})")

    # -------------------------------------------------------------------------------------------- weights

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
        path = Path(publication.path)
        shapes = tensor_shapes([path / "adapter_model.safetensors"], publication)
        self._probe_once(path, shapes)
        request = self._load_adapter(path, f"version {publication.version}")
        try:
            digest = digest_arrays(self._held_adapter(request.lora_int_id, shapes))
            self._compare(digest, publication)
        except BaseException:
            self._llm.llm_engine.remove_lora(request.lora_int_id)
            raise
        self._serve(request, publication)
        return digest

    def _publish_weights(self, publication: Publication) -> str:
        self._need(self._max_rank == 0, publication, "it was started for adapters")
        files = sorted(Path(publication.path).glob("*.safetensors"))
        shapes = tensor_shapes(files, publication)
        dtype = self._llm.model_config.dtype
        self.version, self._base_intact = None, False  # from here on it holds neither the old version nor the new one
        tied = self._apply(tied_groups)
        calls.reload_weights(self._llm, _tensors(files, dtype))
        self._apply(lambda model: retie(model, tied))
        self._empty_prefix_cache()
        held = self._apply(lambda model: held_weights(model, shapes, dtype, calls.parameter_renamer(model)))
        digest = digest_arrays(held)
        self._compare(digest, publication)
        self._serve(None, publication)
        return digest

    def _serve(self, request: Any, publication: Publication) -> None:
        previous, self._request, self.version = self._request, request, publication.version
        if previous is not None:
            self._llm.llm_engine.remove_lora(previous.lora_int_id)

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
        request = calls.adapter_request(f"{name} #{self._loaded}", self._loaded, path)
        try:
            self._llm.llm_engine.add_lora(request)
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"vLLM cannot load the adapter of {name}: {error}", where=path) from error
        return request

    def _held_adapter(self, adapter_id: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        held: dict[str, np.ndarray] = self._apply(
            lambda model: held_adapter(model, adapter_id, shapes, calls.adapter_name_parser(model))
        )
        return held

    def _apply(self, function: Callable[[Any], Any]) -> Any:
        return self._llm.apply_model(function)[0]

    def _probe_once(self, like: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Once per engine: an adapter of the published one's shape with large random weights must move log-probs.

        Holding an adapter and computing with it are two things; the digest proves the first, this proves the second.
        """
        if self._probed:
            return
        length = min(16, self._llm.model_config.max_model_len - 1)
        tokens = [np.linspace(0, self._llm.model_config.get_vocab_size() - 1, length).astype(np.int64)]
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=like.parent) as folder:
            write_probe_adapter(Path(folder), like, shapes)
            request = self._load_adapter(Path(folder), "probe")
            try:
                (with_adapter,), (without,) = self._prompt_logps(tokens, request), self._prompt_logps(tokens, None)
            finally:
                self._llm.llm_engine.remove_lora(request.lora_int_id)
        moved = float(np.abs(with_adapter - without).max())
        if not moved > (1e-3 if self.spec.dtype == "float32" else 5e-2):
            raise EngineError(
                f"adapter not applied: one with large random weights moved log-probabilities by {moved:.1e} only",
                remedy="this model's layers take no adapter in this vLLM; set rollout.weights=merged",
            )
        self._probed = True

    def close(self) -> None:
        if self._llm is None:
            return
        llm, self._llm, self._request, self.version = self._llm, None, None, None
        calls.stop(llm)


# ------------------------------------------------------------------------------------------------ files


def end_ids(folder: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Token ids that end a turn: the tokenizer's, and those of generation_config.json (else config.json)."""
    found: set[int] = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ids = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if ids is not None:
            return frozenset(found.union(ids if isinstance(ids, list) else [ids]))
    return frozenset(found)


def tensor_shapes(files: Sequence[Path], publication: Publication) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in `files`, from their headers alone.

    Raises:
        EngineError: there is no such file, or one of them is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in files:
            with safe_open(file, framework="np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EngineError(f"version {publication.version} cannot be read: {error}", where=publication.path) from error
    if not shapes:
        raise EngineError(f"version {publication.version} has no tensors", where=publication.path)
    return shapes


def _tensors(files: Sequence[Path], dtype: Any) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                tensor = tensors.get_tensor(name)
                if tensor.dtype != dtype:
                    raise EngineError(
                        f"{name} was published in {tensor.dtype}, the engine computes in {dtype}", where=file
                    )
                yield name, tensor


def write_probe_adapter(folder: Path, like: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """An adapter of the shape and configuration of the one in `like`, with standard normal weights."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    save_file(
        {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_bytes((like / "adapter_config.json").read_bytes())
