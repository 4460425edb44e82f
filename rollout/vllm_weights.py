"""The weights that a vLLM engine samples with: versions read, compared with the trainer's, served and retired.

Files are read before `publish` returns and never again: the trainer's side, which wrote them, deletes them.
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

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import EngineError
from align.protocols.trainer import Publication, digest_arrays
from rollout import vllm as calls
from rollout.base import EngineSpec
from rollout.vllm_files import read_tensors, tensor_shapes, unchanged
from rollout.vllm_held import held_adapter, held_weights, retie, tied_groups
from rollout.vllm_probe import probe_prompt, require_applied, spread_tokens
from rollout.vllm_start import adapter_slots


class VllmWeights:
    """What an `LLM` holds of the policy.

    version: the one that new requests are sampled from, None before the first and after whole weights that failed.
    adapter: vLLM's LoRARequest that they are sampled with, None for the model's own weights.
    max_rank: of adapters that it was started for. in_use: the adapter of each request that runs, None for the model's
    own weights. alone: vLLM's output for (prompt, parameters, adapter) while no request runs.
    """

    def __init__(
        self,
        llm: Any,
        spec: EngineSpec,
        max_rank: int,
        in_use: Callable[[], list[Any]],
        alone: Callable[[Any, Any, Any], Any],
    ):
        self.version: int | None = None
        self.adapter: Any = None
        self.spec = spec
        self._llm, self._max_rank, self._slots = llm, max_rank, adapter_slots(spec)
        self._in_use, self._alone = in_use, alone
        self._adapters: list[Any] = []  # all that are held
        self._loaded = 0  # adapters so far; each gets the next number as its id
        self._base_intact = True
        self._probed = False

    def accepts(self, publication: Publication) -> bool:
        """See `rollout.base.Engine`."""
        if not self._in_use() or publication.kind == "base":
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
        self._need(self.accepts(publication), publication, f"{len(self._in_use())} requests run on those it holds")
        files = sorted(Path(publication.path).glob("*.safetensors"))
        shapes = tensor_shapes(files, publication)
        dtype = self._llm.model_config.dtype
        idle = not self._in_use()
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
        self.empty_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()  # what the tower before made of pictures
        stale = self._cached_tokens() if idle else 0
        self._need(stale == 0, publication, f"its prefix cache still serves {stale} tokens of the version before")
        self._serve(None, publication)
        return digest

    def prompt_logps(self, prompt: Any, adapter: Any) -> np.ndarray:
        """f32[n - 1]: of a prompt's tokens after its first, under an adapter or (None) the model's own weights."""
        scores = self._alone(prompt, calls.scoring_parameters(), adapter).prompt_logprobs[1:]
        pairs = zip(scores, prompt["prompt_token_ids"][1:], strict=True)
        return np.array([score[token].logprob for score, token in pairs], dtype=np.float32)

    def empty_prefix_cache(self) -> None:
        """Of everything: requests that run read their prompts and what they have written so far again."""
        if not self._llm.reset_prefix_cache(reset_running_requests=bool(self._in_use())):
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
        self.adapter, self.version = adapter, publication.version
        self._llm.llm_engine.set_weight_version(str(publication.version))
        self.retire()

    def retire(self) -> None:
        """Remove every adapter that neither serves nor is used by a request."""
        if len(self._adapters) <= (self.adapter is not None):
            return
        used = {adapter.lora_int_id for adapter in self._in_use() if adapter is not None}
        kept = [a for a in self._adapters if a is self.adapter or a.lora_int_id in used]
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
            prompt, like, shapes, tower, load, lambda a: llm.remove_lora(a.lora_int_id), self.prompt_logps, least
        )
        self._probed = True

    def close(self) -> None:
        """Hold nothing."""
        self._llm = self.adapter = self.version = None
        self._adapters = []
